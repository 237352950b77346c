"""Another server answers in place of the engine: a good one, and one that stalls, lies about lengths and breaks off."""
from __future__ import annotations

import json
import socket
import threading
from contextlib import closing

import pytest

from app.chat.answers import Jobs
from app.chat.chat_settings import Drafts, Presets
from app.chat.chats import Chats
from app.chat.import_export import export_json
from app.remote import exchange
from app.remote.answer import RemoteModel, request
from app.remote.server import Servers, whole_address
from engine import Sampling, Stopped, UserError
from tests.app.chat.imported import import_text
from tests.app.remote.model_server import ANSWER, DONE, chunk, model_server
from tests.support.waiting import until

NOBODY = threading.Event()


@pytest.fixture
def server():
    with model_server() as server:
        yield server


@pytest.fixture
def chats(tmp_path):
    chats = Chats(tmp_path / "chats.db")
    yield chats
    chats.close()


@pytest.fixture
def model(server, chats) -> RemoteModel:
    servers = Servers(chats)
    servers.choose(server.address, "secret")
    return servers.model("big-moe")


def said(model: RemoteModel, stop: threading.Event = NOBODY, sampling: Sampling | None = None):
    return list(model.chat([{"role": "user", "content": "Hi"}], sampling or Sampling(), {}, stop))


def test_an_answer_its_reasoning_and_its_end(server, model):
    events = said(model)
    assert [(e.kind, e.text) for e in events] == [("thinking", "Let me "), ("thinking", "see."), ("answer", "Hello, "),
                                                  ("answer", "wörld!"), ("end", "")]
    assert (events[-1].reason, events[-1].n_tokens) == ("stop", 7) and events[-1].tokens_per_second > 0
    assert server.keys == ["Bearer secret"] * 2
    assert server.asked == [{"model": "big-moe", "messages": [{"role": "user", "content": "Hi"}], "stream": True,
                             "stream_options": {"include_usage": True}}]


def test_only_what_a_person_has_set_is_sent():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    body = request("m", messages, Sampling(temperature=0.0, top_k=5, stop=("x",)),
                   {"enable_thinking": False, "reasoning_effort": "low"})
    assert {name: body[name] for name in body.keys() - {"model", "messages", "stream", "stream_options"}} == {
        "temperature": 0.0, "top_k": 5, "stop": ["x"], "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
        "add_generation_prompt": False, "continue_final_message": True}  # the answer goes on


def test_pieces_cut_anywhere_and_answers_that_come_whole(server, model):
    text = b"".join(ANSWER).replace(b"\n", b"\r\n")
    whole = {"message": {"content": "Whole."}, "finish_reason": "length"}
    server.answers = [tuple(text[i:i + 3] for i in range(0, len(text), 3)), (b"".join(ANSWER[:-1]) + b"data: [DONE]",),
                      (json.dumps({"choices": [whole]}).encode(),)]
    for _ in range(2):
        assert "".join(e.text for e in said(model) if e.kind == "answer") == "Hello, wörld!"
    whole = said(model)
    assert [e.text for e in whole] == ["Whole.", ""] and whole[-1].reason == "length"


LONG = b"data: " + b"x" * (exchange.LINE_BYTES + 1)
BAD = {
    "breaks off": ((chunk(content="Half"), "cut"), {}, "in the middle"),
    "breaks off in a line": ((chunk(content="Half")[:-9], "cut"), {}, "does not answer as"),
    "no end": ((chunk(content="Half"), DONE), {}, "in the middle"),
    "too few bytes": ((chunk(content="Half"), "cut"), {"content-length": "1000"}, "in the middle"),
    "no length": (("cut",), {"content-length": "many"}, "in the middle"),
    "bad pieces": ((b"5\r\nabc\r\n\xff", "cut"), {"transfer-encoding": "chunked"}, "in the middle"),
    "one endless line": ((LONG, "cut"), {}, "more than any answer"),
    "no JSON": ((b"data: <html>\n\n",), {}, "does not answer as"),
    "another kind of JSON": ((b"data: [1]\n\n",), {}, "does not answer as"),
    "nested by the thousand": ((b"data: " + b"[" * 100_000 + b"\n\n",), {}, "does not answer as"),
    "packed": ((b"\x1f\x8b\x08",), {"content-encoding": "gzip"}, "does not answer as"),
    "an error within": ((b'data: {"error": {"message": "out of\\nmemory."}}\n\n',), {},
                        "refuses the question: out of memory."),
    "another page": ((b"Hello\n" * 100, "cut"), {"content-type": "text/html"}, "in the middle"),
    "elsewhere": ((302,), {"location": "http://127.0.0.1:1/"}, "does not answer as"),
    "no key": ((401, b'{"error": "bad key"}'), {}, "does not accept the key \\(bad key\\)"),
    "no model": ((404, b'{"error": {"message": "no such model"}}'), {}, "nothing at this address \\(no such model\\)"),
    "busy": ((429, b"{"), {}, "no room for this question now \\(HTTP 429\\)"),
    "failed": ((500, b'{"detail": "oops"}'), {}, "refuses the question: oops"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_server_that_misbehaves_is_one_sentence(server, model, how):
    pieces, server.headers, why = BAD[how]
    server.answers, got = [pieces], []
    with pytest.raises(UserError, match=why) as caught:
        for event in model.chat([{"role": "user", "content": "Hi"}], Sampling(), {}, NOBODY):
            got.append(event.text)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert got in ([], ["Half"]) and (got == ["Half"] or chunk(content="Half") not in pieces)


def test_more_bytes_than_any_answer_has(server, model, monkeypatch):
    monkeypatch.setattr(exchange, "ANSWER_BYTES", 10_000)
    server.answers = [(chunk(content="x" * 50),) * 400]
    with pytest.raises(UserError, match="more than any answer"):
        said(model)


@pytest.mark.parametrize("pieces", [(), (chunk(content="Half"),)], ids=["before a word", "after one"])
def test_stop_ends_one_that_says_nothing(server, model, pieces):
    held, stop = threading.Event(), threading.Event()
    server.answers = [(*pieces, held, *[chunk(content="y" * 1000)] * 10_000)]
    found = []
    asking = threading.Thread(target=lambda: found.extend(said(model, stop)))
    asking.start()
    until(lambda: server.asked)
    stop.set()
    asking.join()
    assert found[-1].kind == "end" and found[-1].reason == "stopped"
    held.set()
    until(server.gone.is_set)  # the connection was given up, not left to run


def test_one_that_says_nothing_for_too_long(server, model, monkeypatch):
    monkeypatch.setattr(exchange, "SILENCE_SECONDS", 0.2)
    held = threading.Event()
    server.answers = [(chunk(content="Half"), held)]
    with pytest.raises(UserError, match="has said nothing for"):
        said(model)
    held.set()


def test_a_list_of_models_without_an_end_is_not_waited_for(server, chats, monkeypatch):
    monkeypatch.setattr(exchange, "ASK_SECONDS", 0.2)
    server.hold = threading.Event()
    with pytest.raises(UserError, match="does not answer"):
        Servers(chats).choose(server.address, None)
    monkeypatch.setattr(exchange, "ASK_SECONDS", 1e9)
    with pytest.raises(Stopped):
        Servers(chats).choose(server.address, None, lambda: len(server.keys) > 1)  # it has been asked a second time
    server.gone.wait()
    assert Servers(chats).current() is None


def test_nobody_there(chats):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port} does not answer"):
        Servers(chats).choose(f"127.0.0.1:{port}", None)
    assert Servers(chats).current() is None


@pytest.mark.parametrize("typed, whole", [
    ("localhost:8000", "http://localhost:8000/v1"), (" https://api.example/v1/ ", "https://api.example/v1"),
    ("http://[::1]:11434", "http://[::1]:11434/v1"), ("https://a.example/proxy/x", "https://a.example/proxy/x")])
def test_an_address(typed, whole):
    assert whole_address(typed) == whole


@pytest.mark.parametrize("typed", ["", "ftp://a.example", "file:///etc/passwd", "http://", "http://me:pw@a.example",
                                   "http://a.example/?key=1", "http://a.example:99999", "http://a.ex\nample", "http://ä"])
def test_no_address(typed):
    with pytest.raises(UserError, match="not a server address"):
        whole_address(typed)


@pytest.mark.parametrize("models", [b"[]", b'{"data": []}', b'{"data": [{"id": 5}, {"id": "a\\u0007b"}]}', b"<html>",
                                    b'{"data": 5}'])
def test_a_list_of_models_that_is_none(server, chats, models):
    server.models = models
    with pytest.raises(UserError):
        Servers(chats).choose(server.address, None)
    assert Servers(chats).current() is None


def test_a_key_goes_to_its_own_address_alone(server, chats):
    servers = Servers(chats)
    servers.choose(server.address, "secret")
    assert "secret" not in repr(servers.model("small"))
    servers.choose(server.address, None)
    with model_server() as other:
        servers.choose(other.address, None)
        assert server.keys == ["Bearer secret"] * 2 and other.keys == [None]


class Nothing:
    """In place of Models: whoever asks it fails the test."""

    engine = None
    level = "exact"

    def info(self):
        return {}


def test_a_conversation_is_answered_by_the_server_and_stays_readable(server, chats):
    """The engine here is never asked; the next question may go to it again."""
    Servers(chats).choose(server.address, "secret")
    jobs = Jobs(chats, Nothing())
    jobs.start()
    try:
        conversation = chats.create(settings={"remote": "big-moe", "system": "Be brief."})
        answer = jobs.send(conversation.id, "Hi")["message"]
        until(lambda: chats.message(answer).status != "running")
        message = chats.message(answer)
        assert (message.status, message.text, message.thinking) == ("done", "Hello, wörld!", "Let me see.")
        assert message.stats["model"] == "big-moe" and message.stats["server"] == f"127.0.0.1:{server.server_port}"
        assert message.stats["tokens"] == 7 and "hit_rate" not in message.stats and "level" not in message.stats
        assert [m["role"] for m in server.asked[0]["messages"]] == ["system", "user"]
        server.answers = [(chunk(content="Half"), "cut")]
        answer = jobs.send(conversation.id, "More?")["message"]
        until(lambda: chats.message(answer).status != "running")
        half = chats.message(answer)
        assert (half.status, half.text) == ("error", "Half") and "in the middle" in half.stats["error"]
        Servers(chats).forget()
        answer = jobs.send(conversation.id, "And now?")["message"]
        until(lambda: chats.message(answer).status != "running")
        assert "no server any more" in chats.message(answer).stats["error"] and len(server.asked) == 2
    finally:
        jobs.close()


def test_no_file_and_no_preset_sends_a_conversation_away(chats, tmp_path):
    own = chats.create(settings={"remote": "big-moe", "system": "x"})
    document = json.loads(export_json(chats, [own.id]))
    assert "remote" not in document["conversations"][0]["settings"]
    document["conversations"][0]["settings"] = {"remote": "big-moe"}
    with closing(Chats(tmp_path / "another.db")) as another:  # in its own it would be recognised
        assert import_text(another, json.dumps(document))[0].settings == {}
    presets = Presets(chats)
    presets.keep("mine", {"remote": "big-moe", "system": "x"})
    assert presets.chosen("mine", {}) == {"system": "x"}
    assert presets.chosen("mine", {"remote": "small"}) == {"system": "x", "remote": "small"}
    assert presets.chosen("precise", {"remote": "small"})["remote"] == "small"
    assert presets.name_of({"remote": "small", "system": "x"}) == "mine"
    assert Drafts(chats).settings("new") == {}
