"""Calls of tools as families of models write them: real transcripts, streamed token by token through the splitter."""
from __future__ import annotations

import json

import pytest

from engine.chat.growing_calls import FORCED, GrowingCalls
from engine.chat.reasoning_parser import ReasoningParser
from engine.chat.tool_calls import FORMATS, format_of
from engine.core import CallPiece
from tests.engine.chat.test_tokenizer import encode, load_tokens

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}
PARIS, ROME = {"city": "Paris", "days": 3}, {"city": "Rome"}
# What stands in the family's chat template, its special tokens, what a model wrote, and what it asks for.
TRANSCRIPTS = {
    "hermes": ("<tool_call>", [], 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", '
               '"days": 3}}\n</tool_call>\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n'
               "</tool_call>", [PARIS, ROME]),
    "qwen3-coder": ("<tool_call>\n<function=", [], "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n"
                    "</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>", [PARIS]),
    "glm": ("<tool_call><arg_key>", ["<tool_call>", "</tool_call>"],
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", [PARIS]),
    "mistral": ("[TOOL_CALLS]", ["[TOOL_CALLS]"],
                '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}, '
                '{"name": "get_weather", "arguments": {"city": "Rome"}}]', [PARIS, ROME]),
    "mistral, newer": ("[TOOL_CALLS][ARGS]", ["[TOOL_CALLS]", "[ARGS]"],
                       '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]get_weather[ARGS]'
                       '{"city": "Rome"}', [PARIS, ROME]),
    "gpt-oss": ("<|channel|><|message|>functions.", ["<|start|>", "<|channel|>", "<|message|>", "<|end|>",
                                                      "<|constrain|>"],
                "<|channel|>analysis<|message|>The user wants weather.<|end|><|start|>assistant<|channel|>commentary "
                'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}', [PARIS]),
    "gpt-oss, to before the channel": (
        "<|channel|><|message|>functions.", ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>"],
        ' to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{"city": "Rome"}', [ROME]),
    "gemma 4": ("<|tool_call>call:", ["<|tool_call>", "<tool_call|>", '<|"|>'],
                '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>', [PARIS]),
    "deepseek v3": ("<｜tool▁calls▁begin｜>", ["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"],
                    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
                    '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', [PARIS]),
    "deepseek v3.1": ("<｜tool▁calls▁begin｜>", [],
                      "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
                      '{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', [ROME]),
}


@pytest.mark.parametrize("family", TRANSCRIPTS)
def test_calls_are_read_and_kept_out_of_the_answer(demo_checkpoint, family):
    template, special, written, expected = TRANSCRIPTS[family]
    tokens = load_tokens(demo_checkpoint, f"{{# {template} #}}", special)
    form = format_of(tokens.template.source)
    sections = ReasoningParser(tokens, "", form=form)
    growing, grown, pieces = GrowingCalls(form.begins, ["get_weather"]), [], []
    for token in encode(tokens, written):
        pieces += sections.push(token)
        grown += growing.push(sections.calls)
    pieces += sections.flush()
    assert "".join(text for kind, text in pieces if kind == "answer").strip() == (
        "Let me see." if family == "hermes" else "")
    calls = form.read(sections.calls, [WEATHER])
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("get_weather", each) for each in expected]
    if form.begins:
        assert [json.loads(text) for text in assembled(grown)] == expected
    untouched = ReasoningParser(tokens, "")  # nothing was offered: an answer is an answer
    for token in encode(tokens, written):
        untouched.push(token)
    assert not untouched.calls
    tokens.close()


def assembled(pieces: list[CallPiece]) -> list[str]:
    """As clients do it; the name comes first and once, the arguments in pieces of what came."""
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        assert bool(piece.name) == (piece.index not in calls) and (piece.name != "") != (piece.arguments != "")
        calls.setdefault(piece.index, []).append(piece.arguments)
    assert list(calls) == list(range(len(calls))) and all(len(grown) > 3 for grown in calls.values())
    return ["".join(grown) for grown in calls.values()]


@pytest.mark.parametrize("written", [
    '{"name": "other", "arguments": {"a": 1}}', '{"arguments": {"a": 1}, "name": "get_time"}', '{"name": "get_time"}',
    '{"name": "get_time", "arguments": "{}"}', '{"name": "get_time", "arguments": ', "", '{"name": "get_time", "arg'])
def test_what_may_be_no_call_is_not_begun(written):
    growing = GrowingCalls(FORCED, ["get_time"])
    assert not [piece for end in range(len(written) + 1) for piece in growing.push(written[:end])]


def test_braces_and_quotes_in_a_text_end_no_arguments():
    arguments = json.dumps({"a": '}"\\', "b": [{"c": "{"}, "\\"]})
    growing, written = GrowingCalls(FORCED, ["f"]), f'{{"name": "f", "arguments": {arguments}}}'
    assert assembled([piece for end in range(len(written) + 1) for piece in growing.push(written[:end])]) == [arguments]


def test_every_format_is_of_a_transcript():
    assert {format_of(template) for template, *_ in TRANSCRIPTS.values()} == set(FORMATS)
    assert format_of("{{ messages[0].content }}") is None


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.opens)
@pytest.mark.parametrize("rest", ["", "{", "[" * 100_000, '{"name": 3, "arguments": "x"}', "null", "[null]", "\0",
                                  '{"name": "get_weather", "arguments": "{"}', "call:get_weather{city:" * 1000])
def test_what_is_no_call_is_none(form, rest):
    assert not any(call.name == "get_weather" for call in form.read(form.opens + rest, [WEATHER]))
