"""What programs ask of an answer: a form, log probabilities, a text to go on with, and that nobody else's is reused."""
from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from engine.core import Options, Request, Sampling, UserError
from engine.decode.grammar import checked_schema
from engine.model import load
from tests.engine.chat.test_engine import GREEDY, TALK, chat, finish, told
from tests.engine.decode.test_decoder import engines

engines = engines  # the same model by the host's and by the device's path
SCHEMA = checked_schema({"type": "object", "properties": {
    "hero": {"enum": ["boat", "dragon"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
    "friends": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2}},
    "required": ["hero", "age", "friends"], "additionalProperties": False})


def test_an_answer_keeps_to_its_schema_by_either_path(engines):
    for seed in range(2):
        wild = Sampling(temperature=1.0, seed=seed, max_tokens=200)
        for engine in engines:
            events, end = finish(engine.chat(TALK, wild, request=Request(schema=SCHEMA)))
            found = json.loads(told(events))
            assert found["hero"] in ("boat", "dragon") and 0 <= found["age"] <= 99 and len(found["friends"]) <= 2
            assert end.reason == "stop"
    host, device = (finish(engine.chat(TALK, replace(GREEDY, max_tokens=99), request=Request(schema=SCHEMA)))
                    for engine in engines)
    assert told(host[0]) == told(device[0])


def test_what_was_read_under_a_schema_is_gone_on_with(engines):
    """The device's own path takes over again where the host has looked at every step."""
    host, device = engines
    asked = replace(GREEDY, max_tokens=99)
    talk = [*TALK, {"role": "assistant", "content": told(finish(device.chat(TALK, asked, request=Request(SCHEMA)))[0])},
            *chat("Tell me more.")]
    assert told(finish(device.chat(talk, asked))[0]) == told(finish(host.chat(talk, asked))[0])


def test_log_probabilities(engines):
    rows = []
    for engine in engines:
        events, end = finish(engine.chat(TALK, GREEDY, request=Request(top_logprobs=3)))
        likely = [event.likely for event in events if event.likely]
        assert len(likely) == end.n_tokens - (end.reason == "stop")
        assert "".join(one.text for one in likely) == told(events)
        for one in likely:
            assert one.logprob == one.top[0][1] and one.text == one.top[0][0]  # greedy
            assert sum(math.exp(share) for _, share in one.top) <= 1 + 1e-5
        rows.append([one.logprob for one in likely])
    assert rows[0] == pytest.approx(rows[1], abs=1e-3)  # the two round activations otherwise
    assert not any(event.likely for event in finish(engines[0].chat(TALK, GREEDY))[0])


def test_a_text_is_gone_on_with_and_of_another_owner_nothing_is_reused(engines):
    text = "Once upon a time there was a little boat that"
    for engine in engines:
        said, begun = [], []
        for owner in ("a", "a", "b", "a"):
            events, _ = finish(engine.chat(text, replace(GREEDY, max_tokens=6), request=Request(owner=owner)))
            said.append(told(events))
            begun.append(next(event.n_tokens for event in events if event.kind == "prefill"))
        assert len(set(said)) == 1 and said[0].strip()
        assert begun[0] == 0 and begun[1] > 3 and begun[2:] == [0, 0]
    with pytest.raises(UserError, match="empty"):
        engines[0].count_tokens("")


@pytest.mark.parametrize("schema", [{"type": "wrong"}, {"$ref": "http://127.0.0.1/x"}, [], "x", 1, {"not": {}},
                                    {"type": "string", "pattern": "(a"}, {"enum": ["x" * 100_001]}])
def test_what_cannot_be_kept_to_is_a_sentence(schema):
    with pytest.raises(UserError, match=r"^The JSON schema [^\n]*\.$"):
        checked_schema(schema)


def test_a_schema_that_explodes_ends(demo_checkpoint):
    """Refused when it is checked, or at the latest when the answer would begin."""
    from engine.chat.engine import Engine
    bomb = {"type": "string", "pattern": "((((a{1,100}){1,100}){1,100}){1,100})"}
    options = Options("exact", device="cpu")
    with Engine(load.load(demo_checkpoint, options), options) as engine:
        try:
            answer = engine.chat(TALK, GREEDY, request=Request(schema=checked_schema(bomb)))
            assert finish(answer)[1].reason in ("error", "length")
        except UserError:
            pass
        assert finish(engine.chat(TALK, GREEDY))[1].reason != "error"


def test_a_model_that_is_opened_beside_an_answer_does_it_no_harm(engines):
    """transformers makes a model under its own default dtype, which is the whole process's while it does: buffers of
    half the size would be written past their end."""
    host, _ = engines
    expected = told(finish(host.chat(TALK, GREEDY))[0])
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert told(finish(host.chat(chat("Hello!"), GREEDY))[0])
        assert told(finish(host.chat(TALK, GREEDY))[0]) == expected
    finally:
        torch.set_default_dtype(torch.float32)
