"""Line, keys, orders and errors of the interface for programs, each alone."""
from __future__ import annotations

import json
import threading
import time

import pytest

from app.chat.line import DOUBT, Late, Line, Place, following
from app.openai_api import errors
from app.openai_api.asking import Begun
from app.openai_api.bodies import ChatBody
from app.openai_api.keys import MOST_KEYS, Key, Keys
from app.openai_api.orders import of_chat
from app.openai_api.replies import ChatReply
from engine import CallPiece, Event, MachineError, Stopped, ToolCall, UserError, checked_schema
from tests.support.waiting import until

HI = [{"role": "user", "content": "Hi"}]


def never() -> bool:
    return False


def test_the_nearest_deadline_comes_next_and_nobody_together():
    line, order, inside = Line(), [], []

    def come(name: str, seconds: float) -> None:
        with line.turn(time.monotonic() + seconds, never):
            inside.append(name)
            assert len(inside) == 1
            order.append(inside.pop())

    with line.turn(time.monotonic() + 100, never):
        threads = []
        for name, seconds in (("late", 900), ("soon", 300), ("middle", 600)):
            threads.append(threading.Thread(target=come, args=(name, seconds)))
            threads[-1].start()
            until(lambda: len(line) == len(threads))
        assert not line.is_free
    for thread in threads:
        thread.join()
    assert order == ["soon", "middle", "late"] and len(line) == 0 and line.is_free


def test_a_short_job_goes_before_a_long_one_where_nobody_is_late_by_it():
    long, short, person = Place(100.0, 0, 60.0), Place(300.0, 1, 2.0), Place(120.0, 2, 0.0)
    assert following([long, short], 0.0) == short
    assert following([long, short], 100.0 - DOUBT * 2) == short and following([long, short], 97.0) == long
    assert following([long, short, person], 0.0) == person, "what a person waits for is never behind a guess"
    assert following([long], 1000.0) == long
    late = Place(1.0, 4, 2.0)
    assert following([late, Place(20.0, 5, 0.0)], 0.0) == late, "nor is anybody late by whom nobody knows about"
    two = Place(50.0, 3, 40.0)
    assert following([long, two, short], 0.0) == short
    assert following([long, two], 0.0) == two, "in turn by deadline where the other way makes one late"
    unknown = [Place(seconds, at, 0.0) for at, seconds in enumerate((30.0, 10.0, 20.0))]
    assert following(unknown, 0.0) == unknown[1]


def test_a_person_goes_over_a_program_that_lets_over_and_nobody_else_does():
    line, order = Line(), []

    def come(name: str, over: bool) -> None:
        with line.turn(time.monotonic() + 100, never, patient=True, over=over):
            order.append(name)
            until(lambda: name != "person" or ended)

    ended: list[int] = []
    threads = {name: threading.Thread(target=come, args=(name, name != "program")) for name in ("program", "person",
                                                                                           "another person")}
    with line.turn(time.monotonic() + 100, never):
        threads["program"].start()
        until(lambda: len(line) == 1)
        threads["person"].start()
        until(lambda: len(line) == 2)
        assert not order, "not before it lets over: it may be opening another model"
        with line.letting_over():
            until(lambda: order == ["person"])
            threads["another person"].start()
            until(lambda: len(line) == 2)
    assert order == ["person"] and not line.is_free, "the next one waits for both"
    ended.append(1)
    for thread in threads.values():
        thread.join()
    assert order == ["person", "program", "another person"] and line.is_free


def test_who_is_late_or_stopped_leaves_the_line_and_who_is_patient_stays():
    line, came = Line(), []
    with line.turn(time.monotonic() + 100, never):
        with pytest.raises(Late), line.turn(time.monotonic() - 1, never):
            raise AssertionError
        with pytest.raises(Stopped), line.turn(time.monotonic() + 100, lambda: True):
            raise AssertionError

        def wait() -> None:
            with line.turn(time.monotonic() - 1, never, patient=True):
                came.append(1)
        patient = threading.Thread(target=wait)
        patient.start()
        until(lambda: len(line) == 1)
        assert not came
    patient.join()
    assert came and len(line) == 0
    with pytest.raises(ZeroDivisionError), line.turn(time.monotonic() + 100, never):
        raise ZeroDivisionError
    with line.turn(time.monotonic() + 100, never):  # what fails inside gives the engine back
        pass


def test_keys_open_until_they_are_revoked_and_survive_a_start():
    stored, revoked = [], []
    keys = Keys(lambda: stored, lambda documents: stored.__setitem__(slice(None), documents))
    keys.on_revoked = revoked.append
    secret, second = keys.make(" my   editor "), keys.make("script")
    assert keys.of(secret).name == "my editor" and keys.of(second).name == "script"
    assert not any(secret in str(document) for document in stored) and "hashed" not in str(keys.listed())
    again = Keys(lambda: stored, lambda documents: None)
    assert again.of(secret) == keys.of(secret) != keys.of(second)
    for wrong in ("", "floe-", secret[:-1], secret + "x", "\ud800", keys.of(secret).hashed):
        assert keys.of(wrong) is None
    key = keys.of(secret)
    keys.revoke(key.id)
    assert keys.of(secret) is None and keys.of(second) and revoked == [key.id]


def test_names_of_keys_are_checked_and_stored_rubbish_opens_nothing():
    keys = Keys(lambda: [], lambda documents: None)
    keys.make("a")
    for name in ("a", " a ", "", "\n"):
        with pytest.raises(UserError):
            keys.make(name)
    for i in range(MOST_KEYS - 1):
        keys.make(str(i))
    with pytest.raises(UserError, match=str(MOST_KEYS)):
        keys.make("one more")
    for rubbish in (None, 7, {}, [None], [{"id": 1}], [{"id": "a", "name": "b", "hashed": 3, "made_at": 0}],
                    [vars(Key("a", "b", "\xe9", 0.0))]):
        assert Keys(lambda rubbish=rubbish: rubbish, lambda documents: None).of("x") is None


@pytest.mark.parametrize("said, told", [
    ("/home/user/models/a is gone.", "a is gone."), ("C:\\Users\\me\\x.gguf cannot be read", "x.gguf cannot be read"),
    ("see '~/data/chats.db' there", "see 'chats.db' there"), ("1/2 of it, and/or more", "1/2 of it, and/or more"),
    ("cpu 3.5 tok/s", "cpu 3.5 tok/s")])
def test_no_path_of_this_computer_leaves_it(said, told):
    assert errors.without_paths(said) == told
    assert errors.of(UserError(said)).body()["error"]["message"] == told


def test_what_fails_is_told_as_what_it_is(caplog):
    kinds = {UserError("a."): 400, MachineError("b."): 503, ZeroDivisionError("/secret/place"): 500}
    for error, status in kinds.items():
        refused = errors.of(error)
        assert refused.status == status and "secret" not in str(refused.body())
    assert "secret" in caplog.text  # it is in the log


def test_forced_calls_keep_each_tool_to_its_own_schema():
    """Two tools that use one name for different things."""
    def tool(name: str, values: list[str]) -> dict:
        return {"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"enum": values}}}}}
    order = of_chat(ChatBody.model_validate({
        "model": "m", "messages": HI, "tools": [tool("a", ["1"]), tool("b", ["2"])], "tool_choice": "required"}), "me")
    schema = json.loads(order.request.schema)
    assert schema["$defs"] == {"0.X": {"enum": ["1"]}, "1.X": {"enum": ["2"]}}
    assert checked_schema(schema) and order.forced and order.request.owner == "me"
    named = of_chat(ChatBody.model_validate({
        "model": "m", "messages": HI, "tools": [tool("a", ["1"]), tool("b", ["2"])],
        "tool_choice": {"type": "function", "function": {"name": "b"}}}), "me")
    assert [offered["function"]["name"] for offered in named.wishes["tools"]] == ["b"]
    none = of_chat(ChatBody.model_validate({"model": "m", "messages": HI, "tools": [tool("a", ["1"])],
                                            "tool_choice": "none"}), "me")
    assert "tools" not in none.wishes and not none.request.schema


def test_settings_reach_the_engine():
    order = of_chat(ChatBody.model_validate({
        "model": "m", "messages": HI, "temperature": 1, "seed": -1, "stop": "x", "max_tokens": 5,
        "max_completion_tokens": 7, "reasoning_effort": "none", "chat_template_kwargs": {"a": 1}}), "me")
    assert order.sampling.max_tokens == 7 and order.sampling.stop == ("x",) and order.sampling.seed == 2**63 - 1
    assert order.wishes == {"enable_thinking": False, "reasoning_effort": "none", "a": 1}


def told(order, events: list[Event]) -> tuple[dict, list[dict]]:
    """The same answer as a whole and as chunks."""
    whole, parts = (ChatReply(order, Begun("m", 11)) for _ in range(2))
    for event in events:
        whole.told.take(event)
    return whole.whole(), [chunk for event in events for chunk in parts.chunks(event)]


def test_thinking_and_calls_are_told_apart_from_the_answer():
    order = of_chat(ChatBody.model_validate({"model": "m", "messages": HI}), "me")
    events = [Event("prefill", n_tokens=4), Event("thinking", "Hm.", 1), Event("answer", "Let me see.\n", 3),
              Event("end", "", 9, reason="stop", calls=(ToolCall("get_time", '{"zone": "UTC"}'),))]
    whole, chunks = told(order, events)
    message, usage = whole["choices"][0]["message"], whole["usage"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Let me see.")
    assert message["tool_calls"][0]["function"] == {"name": "get_time", "arguments": '{"zone": "UTC"}'}
    assert whole["choices"][0]["finish_reason"] == "tool_calls" == chunks[-1]["choices"][0]["finish_reason"]
    assert (usage["total_tokens"], usage["prompt_tokens_details"]["cached_tokens"],
            usage["completion_tokens_details"]["reasoning_tokens"]) == (20, 4, 1)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"reasoning_content": "Hm."} and deltas[1] == {"content": "Let me see.\n"}
    assert deltas[2]["tool_calls"][0]["function"]["name"] == "get_time" and deltas[3] == {}


def test_an_approximate_answer_says_by_what():
    order = of_chat(ChatBody.model_validate({"model": "m", "messages": HI}), "me")
    for lossy, marks in (("route=near-only", {"approximate": "cached_only"}), ("route=drop:0.2", {
            "approximate": "route=drop:0.2"}), ("", {})):
        events = [Event("answer", "Yes.", 1, lossy=lossy), Event("end", "", 1, reason="stop", lossy=lossy)]
        whole, chunks = told(order, events)
        assert [{name: said[name] for name in ("approximate",) if name in said} for said in (whole, chunks[-1])] == [
            marks, marks]


def test_a_forced_call_that_was_cut_off_is_told_as_text():
    body = {"model": "m", "messages": HI, "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "a"}}]}
    order = of_chat(ChatBody.model_validate(body), "me")
    whole, chunks = told(order, [Event("answer", '{"name": "a', 3), Event("end", "", 3, reason="length")])
    message = whole["choices"][0]["message"]
    assert message["content"] == '{"name": "a' and "tool_calls" not in message
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]
    whole, chunks = told(order, [Event("answer", '{"name": "a", "arguments": {}}', 9),
                                 Event("end", "", 9, reason="stop")])
    message = whole["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["arguments"] == "{}"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert message["content"] is None and [call["function"] for delta in deltas for call in delta.get(
        "tool_calls", ())] == [{"name": "a", "arguments": ""}, {"arguments": "{}"}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_of_its_own_is_told_as_it_is_written_and_what_is_left_at_the_end():
    order = of_chat(ChatBody.model_validate({"model": "m", "messages": HI}), "me")
    pieces = [CallPiece(0, "get_time"), CallPiece(0, "", '{"zone"'), CallPiece(0, "", ': "UTC"}')]
    calls = (ToolCall("get_time", '{"zone": "UTC"}'), ToolCall("get_date", "{}"))
    _, chunks = told(order, [*(Event("answer", piece=piece) for piece in pieces),
                             Event("end", "", 9, reason="stop", calls=calls)])
    told_of = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"]["arguments"]) for call in told_of] == [
        (0, ""), (0, '{"zone"'), (0, ': "UTC"}'), (1, "{}")]
    assert ["id" in call for call in told_of] == [True, False, False, True]
    _, chunks = told(order, [Event("answer", piece=pieces[0]), Event("answer", "<tool_call>{", 3),
                             Event("end", "", 9, reason="length")])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]
