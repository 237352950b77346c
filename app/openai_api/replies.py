"""The engine's events as OpenAI's documents and stream chunks say them."""
from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field

from app.openai_api.asking import Begun
from app.openai_api.orders import Order
from engine import FORCED, CallPiece, Event, GrowingCalls, Likelihood, ToolCall, preset_of

LOWEST = -9999.0  # JSON has no infinity


@dataclass
class Told:
    """An answer so far. `text` is the content, what a forced call writes included."""

    order: Order
    begun: Begun
    text: str = ""
    thinking: str = ""
    likely: list[Likelihood] = field(default_factory=list)
    calls: tuple[ToolCall, ...] = ()
    finish: str | None = None
    marks: dict = field(default_factory=dict)  # beside OpenAI's own fields: why it is no exact answer
    _n_tokens: int = 0
    _n_thinking: int = 0
    _n_cached: int | None = None

    def take(self, event: Event) -> None:
        if event.kind == "prefill" and self._n_cached is None:
            self._n_cached = event.n_tokens
        elif event.kind == "thinking":
            self.thinking += event.text
            self._n_thinking = event.n_tokens
        elif event.kind == "answer":
            self.text += event.text
            self.likely += [event.likely] if event.likely else []
        elif event.kind == "end":
            self._n_tokens, self.finish, self.calls = event.n_tokens, event.reason, event.calls
            self._take_forced()
            self.marks = {"approximate": preset_of(event.lossy)} if event.lossy else {}
            self.finish = "tool_calls" if self.calls and self.finish == "stop" else self.finish

    def _take_forced(self) -> None:
        """A call that was cut off at the limit stays text."""
        if self.order.forced and self.finish == "stop":
            call = json.loads(self.text)
            self.calls = (ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False)),)
            self.text = ""

    def usage(self) -> dict:
        return {"prompt_tokens": self.begun.prompt_tokens, "completion_tokens": self._n_tokens,
                "total_tokens": self.begun.prompt_tokens + self._n_tokens,
                "prompt_tokens_details": {"cached_tokens": self._n_cached or 0},
                "completion_tokens_details": {"reasoning_tokens": self._n_thinking}}


class ChatReply:
    """/v1/chat/completions."""

    def __init__(self, order: Order, begun: Begun):
        self.told = Told(order, begun)
        self._head = _head("chatcmpl", "chat.completion", begun.model)
        names = [tool["function"]["name"] for tool in order.wishes.get("tools", ())]
        self._forced = GrowingCalls(FORCED if order.forced else "", names)
        self._n_begun = 0  # calls that the stream has told of

    def whole(self) -> dict:
        told, message = self.told, {"role": "assistant", "content": self.told.text, "refusal": None}
        if told.thinking:
            message["reasoning_content"] = told.thinking
        if told.calls:
            message |= {"content": told.text.strip() or None, "tool_calls": _calls(told.calls)}
        choice = {"index": 0, "message": message, "finish_reason": told.finish,
                  "logprobs": self._logprobs(told.likely)}
        return self._head | {"choices": [choice], "usage": told.usage()} | told.marks

    def first(self) -> list[dict]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, event: Event) -> list[dict]:
        """What one more event adds to the stream."""
        told = self.told
        told.take(event)
        likely = [event.likely] if event.likely else []
        if event.kind == "thinking" and event.text:
            return [self._chunk({"reasoning_content": event.text})]
        if event.kind == "end":
            return self._last()
        if told.order.forced and event.kind == "answer":
            return [self._piece(piece) for piece in self._forced.push(told.text)]
        if event.piece:
            return [self._piece(event.piece)]
        if event.kind == "answer" and (event.text or likely) and not self._n_begun:  # else a call that came to nothing
            return [self._chunk({"content": event.text}, self._logprobs(likely))]
        return []

    def usage(self) -> dict:
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self.told.usage()}

    def _last(self) -> list[dict]:
        """What is left of the calls, or the text of a forced one that was cut off before its name."""
        told, rest, finish = self.told, [], self.told.finish
        if numbered := [{"index": i} | call for i, call in enumerate(_calls(told.calls)) if i >= self._n_begun]:
            rest = [self._chunk({"tool_calls": numbered})]
        elif told.order.forced and not self._n_begun:
            rest = [self._chunk({"content": told.text})]
        if self._n_begun and finish == "stop":
            finish = "tool_calls"
        return [*rest, self._chunk({}, finish=finish) | told.marks]

    def _piece(self, piece: CallPiece) -> dict:
        """The name with an id of its own, then the arguments, as they come."""
        told = {"index": piece.index, "function": {"arguments": piece.arguments}}
        if piece.name:
            self._n_begun = piece.index + 1
            told |= _call(piece.name, "")
        return self._chunk({"tool_calls": [told]})

    def _chunk(self, delta: dict, logprobs: dict | None = None, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, likely: list[Likelihood]) -> dict | None:
        if self.told.order.request.top_logprobs is None:
            return None
        return {"content": [_token(one.text, one.logprob) | {"top_logprobs": [_token(*other) for other in one.top]}
                            for one in likely], "refusal": None}


class TextReply:
    """/v1/completions."""

    def __init__(self, order: Order, begun: Begun):
        self.told = Told(order, begun)
        self._head = _head("cmpl", "text_completion", begun.model)
        self._at = 0  # characters told before

    def whole(self) -> dict:
        told = self.told
        return self._one(told.text, told.likely, told.finish) | {"usage": told.usage()} | told.marks

    def first(self) -> list[dict]:
        return []

    def chunks(self, event: Event) -> list[dict]:
        self.told.take(event)
        likely = [event.likely] if event.likely else []
        if event.kind == "end":
            return [self._one("", [], self.told.finish) | self.told.marks]
        return [self._one(event.text, likely, None)] if event.kind == "answer" and (event.text or likely) else []

    def usage(self) -> dict:
        return self._head | {"choices": [], "usage": self.told.usage()}

    def _one(self, text: str, likely: list[Likelihood], finish: str | None) -> dict:
        told = None
        if self.told.order.request.top_logprobs is not None:
            offsets = []
            for one in likely:
                offsets.append(self._at)
                self._at += len(one.text)
            told = {"tokens": [one.text for one in likely], "token_logprobs": [_share(one.logprob) for one in likely],
                    "top_logprobs": [{name: _share(share) for name, share in one.top} for one in likely],
                    "text_offset": offsets}
        return self._head | {"choices": [{"index": 0, "text": text, "logprobs": told, "finish_reason": finish}]}


def _head(prefix: str, kind: str, model: str) -> dict:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _calls(calls: tuple[ToolCall, ...]) -> list[dict]:
    return [_call(call.name, call.arguments) for call in calls]


def _call(name: str, arguments: str) -> dict:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name,
                                                                                    "arguments": arguments}}


def _token(text: str, logprob: float) -> dict:
    """bytes: None for a token that is a part of a character."""
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {"token": text, "logprob": _share(logprob), "bytes": list(text.encode()) if whole else None}


def _share(logprob: float) -> float:
    return max(logprob, LOWEST)
