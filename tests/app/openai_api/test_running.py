"""The running program, asked by other makers' clients: answers, streams, forms, tools, limits, and what is refused."""
from __future__ import annotations

import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest

from engine import demo_model
from tests.support import browser
from tests.support.browser import SECONDS
from tests.support.waiting import until

openai = pytest.importorskip("openai")
app = browser.app
web = partial(httpx.request, timeout=SECONDS)  # others keep the machine busy
HI = [{"role": "user", "content": "Hi! How are you today?"}]
STORY = [{"role": "user", "content": "Tell me a story about a small boat."}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
    "additionalProperties": False, "$defs": {"city": {"enum": ["Paris", "Rome"]}}}}}
TIME = {"type": "function", "function": {"name": "get_time"}}
# An answer that cannot end by itself: a text that has to be longer than the context.
ENDLESS = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 20_000}}}


def made(app, name: str) -> SimpleNamespace:
    """A key of its own, the openai client that has it, and its headers for whoever asks without that client."""
    reply = web("POST", app.address + "/api/preferences/programs/keys", json={"name": name},
                headers=app.credentials).json()
    key = reply["key"]
    client = openai.OpenAI(base_url=app.address + "/v1", api_key=key, max_retries=0, timeout=SECONDS)
    return SimpleNamespace(key=key, id=reply["keys"][-1]["id"], client=client, ask=client.chat.completions.create,
                           headers={"authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def one(app):
    return made(app, "one")


@pytest.fixture(scope="module")
def other(app):
    return made(app, "other")


def status(app, who) -> dict:
    return web("GET", app.address + "/v1/status", headers=who.headers).json()


def post(app, who, body, path="/v1/chat/completions", **headers) -> httpx.Response:
    return web("POST", app.address + path, json=body, headers=who.headers | headers)


@contextmanager
def held(app, who):
    """The engine is busy with a stream of this key until the end of the block. -> how many pieces have been read."""
    with who.ask(model="demo", messages=HI, response_format=ENDLESS, stream=True) as stream:
        seen = next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert seen.choices[0].finish_reason is None
        yield
    until(lambda: status(app, who)["phase"] == "idle")


# What is answered

def test_models_and_state(app, one):
    assert [model.id for model in one.client.models.list()] == ["demo"]
    assert one.client.models.retrieve("demo").owned_by == "floe-chat"
    until(lambda: web("GET", app.address + "/health").status_code == 200)
    now = status(app, one)
    assert (now["state"], now["model"], now["level"]) == ("ready", "demo", "balanced") and now["context"]["tokens"] > 0


def test_a_chat_streams_what_it_answers(one):
    whole = one.ask(model="demo", messages=STORY, max_tokens=24, temperature=0)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 24
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 24 and whole.choices[0].message.content
    chunks = list(one.ask(model="demo", messages=STORY, max_tokens=24, temperature=0, stream=True,
                          stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 8
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 24 and chunks[-1].choices == []


def test_a_seed_repeats_and_another_does_not(one):
    texts = [one.ask(model="demo", messages=STORY, max_tokens=16, temperature=1, seed=seed).choices[0].message.content
             for seed in (7, 7, -1)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_texts_end_an_answer_and_are_not_part_of_it(one):
    whole = one.ask(model="demo", messages=STORY, max_tokens=40, temperature=0).choices[0].message.content
    word = whole.split()[4]
    for stop in (word, ["never said", word]):
        cut = one.ask(model="demo", messages=STORY, max_tokens=40, temperature=0, stop=stop).choices[0]
        assert cut.finish_reason == "stop" and cut.message.content == whole[:whole.index(word)]


def test_log_probabilities(one):
    choice = one.ask(model="demo", messages=HI, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    assert bytes(tokens[0].bytes).decode() == tokens[0].token


def test_texts_are_gone_on_with(one):
    ask = one.client.completions.create
    whole = ask(model="demo", prompt="Once upon a time", max_tokens=12, temperature=0, logprobs=1)
    assert whole.choices[0].text and whole.choices[0].finish_reason == "length"
    assert "".join(whole.choices[0].logprobs.tokens) == whole.choices[0].text
    parts = list(ask(model="demo", prompt=["Once upon a time"], max_tokens=12, temperature=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_parts_roles_and_an_answer_to_go_on_with(one):
    said = one.ask(model="demo", max_tokens=4, messages=[
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi!"}, {"type": "text", "text": "Who are you?"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"}])
    assert said.usage.prompt_tokens > 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept_to_whatever_the_model_knows(one, stream):
    schema = {"type": "object", "properties": {"hero": {"enum": ["boat", "dragon"]}, "age": {"type": "integer",
              "minimum": 0, "maximum": 99}}, "required": ["hero", "age"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "hero", "schema": schema, "strict": True}}
    for seed in range(2):
        reply = one.ask(model="demo", messages=STORY, response_format=wanted, temperature=1, seed=seed, stream=stream)
        text = ("".join(chunk.choices[0].delta.content or "" for chunk in reply) if stream
                else reply.choices[0].message.content)
        found = json.loads(text)
        assert set(found) == {"hero", "age"} and found["hero"] in ("boat", "dragon") and 0 <= found["age"] <= 99
    refused = pytest.raises(openai.BadRequestError, match="JSON schema")
    with refused:
        one.ask(model="demo", messages=HI, response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}})


def test_any_json_object(one):
    text = one.ask(model="demo", messages=HI, response_format={"type": "json_object"}, temperature=0,
                   max_tokens=30).choices[0]
    assert text.message.content.startswith("{") and (text.finish_reason == "length" or json.loads(text.message.content))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_of_a_tool_can_be_forced(one, stream, choice):
    reply = one.ask(model="demo", messages=HI, tools=[WEATHER, TIME], tool_choice=choice, max_tokens=60, stream=stream)
    chunks = list(reply) if stream else []
    finish = chunks[-1].choices[0].finish_reason if stream else reply.choices[0].finish_reason
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    calls = assembled(chunks) if stream else reply.choices[0].message.tool_calls
    assert not stream or len(pieces) > 2 and pieces[0].function.name and not pieces[0].function.arguments
    assert finish in ("tool_calls", "length") and not any(c.choices[0].delta.content for c in chunks)
    names = ("get_weather",) if isinstance(choice, dict) else ("get_weather", "get_time")
    assert calls[0].function.name in names and calls[0].id.startswith("call_")
    arguments = json.loads(calls[0].function.arguments)
    assert calls[0].function.name == "get_time" or arguments["city"] in ("Paris", "Rome")


def assembled(chunks: list) -> list:
    """The official client's own way of putting a stream together."""
    from openai.lib.streaming.chat import ChatCompletionStreamState
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(chunk)
    return state.get_final_completion().choices[0].message.tool_calls


# What other makers' clients make of it

def test_langchain(app, one):
    from langchain_openai import ChatOpenAI
    chat = ChatOpenAI(base_url=app.address + "/v1", api_key=one.key, model="demo", max_tokens=60, temperature=0)
    whole = chat.invoke("Hi!")
    assert "".join(piece.content for piece in chat.stream("Hi!")) == whole.content != ""
    assert whole.usage_metadata["output_tokens"] > 0
    called = chat.bind_tools([WEATHER], tool_choice="get_weather").invoke("Hi!").tool_calls
    assert called[0]["name"] == "get_weather" and called[0]["args"]["city"] in ("Paris", "Rome")


def test_litellm(app, one):
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm
    asked = {"model": "openai/demo", "api_base": app.address + "/v1", "api_key": one.key, "messages": HI,
             "max_tokens": 12, "temperature": 0}
    whole = litellm.completion(**asked).choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in litellm.completion(**asked, stream=True)) == whole != ""


def test_gradio_client_can_do_nothing_that_the_page_cannot(app, one):
    from gradio_client import Client
    from gradio_client.exceptions import AuthenticationError
    with pytest.raises(AuthenticationError):
        Client(app.address, verbose=False)
    for path in ("/config", "/api/state", "/gradio_api/info", "/stats", "/"):
        assert web("GET", app.address + path, headers=one.headers).status_code == 401, path
    inside = Client(app.address, headers=app.credentials, verbose=False, download_files=False)
    offered = inside.view_api(return_format="dict", print_info=False)
    assert offered == {"named_endpoints": {}, "unnamed_endpoints": {}}


# Who waits for whom

def test_many_at_once_each_get_their_own(one):
    texts = ("Hi!", "What is your name?", "Goodbye!", "Tell me a story.")

    def ask(text: str) -> str:
        return one.ask(model="demo", messages=[{"role": "user", "content": text}], max_tokens=8, temperature=0
                       ).choices[0].message.content
    alone = [ask(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, texts)) == alone


def test_whoever_leaves_frees_the_engine(app, one):
    before = status(app, one)["tokens"]
    with held(app, one):
        assert status(app, one)["phase"] == "decode"
    written = status(app, one)["tokens"] - before
    assert 0 < written < status(app, one)["context"]["tokens"] - 100  # it was cut off, not written to its end


def test_whoever_leaves_the_line_is_not_waited_for(app, one):
    body = json.dumps({"model": "demo", "messages": HI, "response_format": ENDLESS})
    place = urlsplit(app.address)
    with held(app, one):
        with socket.create_connection((place.hostname, place.port)) as leaving:
            leaving.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"
                            f"Authorization: Bearer {one.key}\r\nContent-Type: application/json\r\n"
                            f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: status(app, one)["waiting"] == 1)
        until(lambda: status(app, one)["waiting"] == 0)


def test_the_line_is_bounded_and_has_an_end(app, one, other):
    body = {"model": "demo", "messages": HI, "max_tokens": 1}
    with ThreadPoolExecutor(7) as pool, held(app, one):
        waiting = [pool.submit(post, app, one, body) for _ in range(7)]
        until(lambda: status(app, one)["waiting"] == 7)
        refused = post(app, one, body)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        late = post(app, other, body, **{"x-stainless-read-timeout": "0"})
        assert late.status_code == 503 and late.json()["error"]["code"] == "busy"
    assert {each.result().status_code for each in waiting} == {200}


def test_a_person_gets_an_answer_while_a_program_is_still_given_its_own(app, one):
    made = web("POST", app.address + "/api/conversations", json={"draft": "line"}, headers=app.credentials).json()
    place = f"{app.address}/api/conversations/{made['id']}"
    with held(app, one):
        web("POST", place + "/send", json={"text": "Hello!"}, headers=app.credentials)
        until(lambda: web("GET", place, headers=app.credentials).json()["messages"][-1]["status"] == "done")


def test_what_one_key_has_asked_no_other_can_tell_by_the_time(one, other):
    def cached(who) -> int:
        return who.ask(model="demo", messages=STORY, max_tokens=1).usage.prompt_tokens_details.cached_tokens
    cached(one)
    assert cached(one) > 0 and cached(other) == 0 and cached(one) == 0


def test_a_revoked_key_ends_what_is_under_way(app):
    who = made(app, "gone")
    with pytest.raises(openai.APIError, match="stopped"):
        for _ in who.ask(model="demo", messages=HI, response_format=ENDLESS, stream=True):
            web("DELETE", f"{app.address}/api/preferences/programs/keys/{who.id}", headers=app.credentials)
    with pytest.raises(openai.AuthenticationError):
        who.client.models.list()


def test_a_model_that_is_asked_for_is_opened(app, one):
    shutil.copytree(demo_model(), app.data / "models" / "second")
    assert {model.id for model in one.client.models.list()} == {"demo", "second"}
    said = {one.ask(model=name, messages=HI, max_tokens=8, temperature=0).choices[0].message.content
            for name in ("second", "demo")}
    assert len(said) == 1 and status(app, one)["model"] == "demo"
    with pytest.raises(openai.NotFoundError, match="no model 'third'"):
        one.ask(model="third", messages=HI)


# What is refused

@pytest.mark.parametrize("change, expected, said", [
    ({"n": 2}, 400, "One answer"), ({"frequency_penalty": 1}, 400, "frequency_penalty"),
    ({"logit_bias": {"1": 5}}, 400, "logit_bias"), ({"messages": []}, 422, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 422, "role"), ({"stop": [""]}, 422, "stop"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "", "text": None}]}]}, 400, 'type ""'),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "needs a text"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "tokens"),
    ({"max_tokens": 0}, 422, "max_tokens"), ({"temperature": 3}, 422, "temperature"),
    ({"temperature": "1"}, 422, "temperature"),
    ({"tools": [TIME]}, 400, "knows no tools"), ({"tools": [TIME], "tool_choice": "auto"}, 400, "knows no tools"),
    ({"tool_choice": "required"}, 400, "not among tools"),
    ({"chat_template_kwargs": {"tools": "x"}}, 400, "not served"),
    ({"top_logprobs": 21, "logprobs": True}, 422, "top_logprobs"), ({"model": None}, 422, "model")])
def test_refusals_are_sentences_in_openais_shape(app, one, change, expected, said):
    reply = post(app, one, {"model": "demo", "messages": HI, "max_tokens": 2} | change)
    error = reply.json()["error"]
    assert reply.status_code == expected and said in error["message"] and error["message"].endswith("."), reply.text
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"NaN", b'{"temperature": NaN}', b'{"temperature": 1e999}',
                                  b'{"messages": "\\ud800"}', b'{"\\udfff": 1}', b"\xff\xfe", b"[" * 100_000,
                                  b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_bodies_that_are_none(app, one, body):
    reply = web("POST", app.address + "/v1/chat/completions", content=body,
                       headers=one.headers | {"content-type": "application/json"})
    assert reply.status_code in (400, 422) and reply.json()["error"]["message"].endswith(".")


def test_what_is_too_large_is_not_read(app, one):
    def pieces():
        for _ in range(20):
            yield b" " * (1 << 20)
    place = app.address + "/v1/chat/completions"
    for content in (b" " * (17 << 20), pieces()):
        try:
            assert web("POST", place, content=content, headers=one.headers).status_code == 413
        except httpx.WriteError:  # refused while it was still being sent
            pass
    assert web("GET", app.address + "/v1/models", headers=one.headers | {"x": "y" * 40_000}).status_code == 431
    assert one.client.models.list().data


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer"}, {"authorization": "Bearer wrong"},
                                     {"authorization": "Basic {key}"}, {"cookie": "key={key}"}, {"x-api-key": "{key}"}])
def test_a_key_is_needed_where_it_belongs(app, one, headers):
    sent = {name: value.format(key=one.key) for name, value in headers.items()}
    for path in ("/v1/models", f"/v1/models?key={one.key}", "/v1/status", "/v1/openapi.json", "/v1/nothing"):
        reply = web("GET", app.address + path, headers=sent)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    assert web("GET", app.address + "/v1/models", headers=app.credentials).status_code == 401


@pytest.mark.parametrize("headers, expected", [
    ({"host": "evil.example"}, 421), ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
    ({"sec-fetch-site": "cross-site"}, 403)])
def test_other_places_are_refused_with_a_key_as_well(app, one, headers, expected):
    assert web("GET", app.address + "/v1/models", headers=one.headers | headers).status_code == expected


@pytest.mark.parametrize("name", ["rebound.example", "localhost.rebound.example", "127.0.0.1.rebound.example"])
def test_a_name_that_resolves_to_this_computer_opens_nothing(app, one, monkeypatch, name):
    """DNS rebinding: the page of a stranger asks its own name, whose address has become 127.0.0.1 meanwhile."""
    resolve, port = socket.getaddrinfo, urlsplit(app.address).port
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: resolve(
        "127.0.0.1" if host == name else host, *rest, **more))
    place = f"http://{name}:{port}"
    own = one.headers | {"origin": place, "sec-fetch-site": "same-origin"}
    for method, path, headers in (("GET", "/", app.credentials), ("GET", "/v1/models", own), ("GET", "/health", {}),
                                  ("POST", "/v1/chat/completions", own), ("GET", "/api/state", app.credentials | own)):
        assert web(method, place + path, headers=headers, trust_env=False).status_code == 421, path


def test_keys_are_kept_as_hashes(app, one):
    for file in app.data.glob("chats.db*"):
        assert one.key.encode() not in file.read_bytes()
    assert one.key not in (app.data / "program.log").read_text()
