"""Calls of tools in an answer, each family of models in a format of its own: which one, and what it says.

The formats are declared for transformers' response parser, which does the reading. They are ours, chosen by what the
chat template writes: a format that a downloaded folder declares is a pattern, and a pattern can run for ever.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from transformers.utils.chat_parsing import parse_response

from engine.chat.growing_calls import FORCED
from engine.core import ToolCall

_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_WHOLE = {"type": "function", "function": "{content}"}


@dataclass(frozen=True)
class Format:
    """marks: what the chat template writes, all of it. opens: the text that begins the calls; all before it is answer.
    calls: the region of one call, as transformers' parser wants it. begins: what stands before a call's arguments
    where these are JSON (engine/chat/growing_calls.py)."""

    marks: tuple[str, ...]
    opens: str
    calls: str  # JSON: a frozen dataclass holds no dict
    begins: str = ""

    def read(self, text: str, tools: list[dict]) -> tuple[ToolCall, ...]:
        """What follows `opens`, that included, special tokens as text. Empty where it is no call."""
        fields = {"tool_calls": json.loads(self.calls) | {"repeats": True}, "content": {"content": "text"}}
        template = {"defaults": {"role": "assistant"}, "start_anchor": "\0", "fields": fields}
        try:
            found = parse_response(text, template, prefix="", tools=tools).get("tool_calls") or []
            return tuple(call for item in found for call in _calls(item["function"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return ()


def _format(marks: str | tuple[str, ...], opens: str, open_pattern: str, close_pattern: str, begins: str = "",
            **region) -> Format:
    region = {"open_pattern": open_pattern, "close_pattern": close_pattern, "transform": _CALL} | region
    return Format((marks,) if isinstance(marks, str) else marks, opens, json.dumps(region), begins)


_XML = {"content": "xml-inline"}
FORMATS = (  # the first whose marks are there
    _format("<|tool_call>call:", "<|tool_call>", r"<\|tool_call>call:(?P<name>[\w.-]+)", r"<tool_call\|>",  # Gemma 4
            content="json", content_args={"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]}),
    _format(("<|channel|>", "functions."), "<|channel|>",                                                   # gpt-oss
            r".*?to=functions\.(?P<name>[\w.-]+).*?<\|message\|>", r"<\|call\|>|$",
            r"[^{]*?to=functions\.(?P<name>[\w.-]+)[^{]*?<\|message\|>\s*", content="json"),
    _format(("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]",                                                # Mistral, newer
            r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]", r"(?=\[TOOL_CALLS\])|</s>|$",
            r"\s*\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*", content="json"),
    _format("[TOOL_CALLS]", "[TOOL_CALLS]", r"\[TOOL_CALLS\]", r"</s>|$", content="json", transform=_WHOLE),
    _format(("<tool_call>", "<arg_key>"), "<tool_call>",                                                     # GLM 4.x
            r"<tool_call>\s*(?P<name>[\w.-]+)", r"</tool_call>", **_XML, content_args={
                "tag_pattern": r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"}),
    _format(("<tool_call>", "<function="), "<tool_call>",                               # Qwen3-Coder, Qwen 3.5 and 3.6
            r"<tool_call>\s*<function=(?P<name>[^>\n]+)>", r"</function>\s*</tool_call>", **_XML, content_args={
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"}),
    _format("<tool_call>", "<tool_call>", r"<tool_call>", r"</tool_call>",                              # Hermes, Qwen 3
            r"(?:\s*\}\s*</tool_call>)?\s*<tool_call>" + FORCED, content="json", transform=_WHOLE),
    _format("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁begin｜>",                                             # DeepSeek
            r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[\w.-]+)(?:<｜tool▁sep｜>|\s*```json\s*)",
            r"(?:\s*```\s*)?<｜tool▁call▁end｜>",
            r"(?:<｜tool▁calls▁begin｜>|(?:\s*```\s*)?<｜tool▁call▁end｜>)\s*<｜tool▁call▁begin｜>"
            r"(?:function<｜tool▁sep｜>)?(?!function<｜tool▁sep｜>)(?P<name>[\w.-]+)(?:<｜tool▁sep｜>|\s*```json)\s*",
            content="json"),
)


@cache
def format_of(template: str) -> Format | None:
    """How a model with this chat template writes its calls; None where it is not known."""
    return next((form for form in FORMATS if all(mark in template for mark in form.marks)), None)


def _calls(found: object) -> list[ToolCall]:
    """One call or a list of them; under either name that families use for the arguments."""
    if isinstance(found, list):
        return [call for item in found for call in _calls(item)]
    if not isinstance(found, dict):
        raise ValueError("a call is an object")
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    json.loads(arguments)
    return [ToolCall(str(found["name"]), arguments)]
