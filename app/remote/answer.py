"""A conversation as an OpenAI-compatible server wants it, and its answer as the engine's own events."""
from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

from app.remote.exchange import tell, words_of
from app.remote.place import Place
from app.strings import TEXT
from engine import Event, Sampling, UserError

# What OpenAI's own interface knows; vLLM, SGLang, llama.cpp and Ollama take the others too. Only what was set is sent.
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens")


@dataclass(frozen=True)
class RemoteModel:
    """One model of one server."""

    place: Place
    name: str

    def chat(self, messages: list[dict], sampling: Sampling, wishes: dict,
             stop: threading.Event) -> Generator[Event, None, None]:
        """The answer as the engine gives it: thinking and answer, then one end. UserError in one sentence for whatever
        goes wrong; what has been said until then has been yielded."""
        answer, start = _Answer(), time.monotonic()
        asked = request(self.name, messages, sampling, wishes)
        with closing(tell(self.place, "/chat/completions", asked, stop)) as documents:
            for document in documents:
                yield from answer.take(document, self.place)
        if stop.is_set():
            answer.reason = "stopped"
        elif answer.reason is None:
            raise UserError(TEXT["server_broke"].format(host=self.place.host))
        seconds = time.monotonic() - (answer.first or start)
        yield Event("end", "", answer.tokens, answer.tokens / seconds if seconds else 0.0, reason=answer.reason)


def request(model: str, messages: list[dict], sampling: Sampling, wishes: dict) -> dict:
    """The body of /chat/completions. wishes: variables of a chat template."""
    set_ = {name: value for name in NAMES if (value := getattr(sampling, name)) is not None}
    body = {"model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}} | set_
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if effort := wishes.get("reasoning_effort"):
        body["reasoning_effort"] = effort
    if template := {name: value for name, value in wishes.items() if name != "reasoning_effort"}:
        body["chat_template_kwargs"] = template
    if messages and messages[-1]["role"] == "assistant":  # an answer that ended early goes on
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    return body


class _Answer:
    """What has come of one answer. tokens: as the server counts them, 0 until it says so."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.tokens = 0
        self.first: float | None = None

    def take(self, document: object, place: Place) -> Iterator[Event]:
        if not isinstance(document, dict):
            raise UserError(TEXT["server_foreign"])
        if "error" in document:
            raise UserError(TEXT["server_refused"].format(host=place.host, said=words_of(document)))
        usage = document.get("usage")
        if isinstance(usage, dict) and isinstance(counted := usage.get("completion_tokens"), int) and counted > 0:
            self.tokens = counted
        choices = document.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        yield from self._said(choice.get("delta") or choice.get("message") or {})
        if isinstance(ended := choice.get("finish_reason"), str):
            self.reason = "length" if ended == "length" else "stop"

    def _said(self, part: object) -> Iterator[Event]:
        """Of reasoning several servers have each their own name."""
        part = part if isinstance(part, dict) else {}
        thinking = part.get("reasoning_content") or part.get("reasoning")
        for kind, text in (("thinking", thinking), ("answer", part.get("content"))):
            if isinstance(text, str) and text:
                self.first = self.first or time.monotonic()
                yield Event(kind, text)
