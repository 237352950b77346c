"""An answer as it streams, split into what the model thinks and what it says, up to the first stop text.

Models mark their thinking in three ways, and the chat template or the vocabulary tells which: a pair of markers
(`<think>` ... `</think>`, whose first half the template may already have written), a labelled channel
(`<|channel>thought` ... `<channel|>`), or harmony's messages, each with a header (`<|channel|>analysis<|message|>`).
A marker counts where the protocol puts it: the opening one before anything else was said, the closing one in the
thinking that it ends. Elsewhere it is text that somebody asked for, and comes out as it is; nothing is ever lost.
Markers and stop texts may be spread over tokens: only a tail that could still become one is held back.
Invariant: what comes out never contains another special token. Where tools were offered, the text of their calls
is kept apart, special tokens and all. Does not know the model.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.chat.tokenizer import TextStream, Tokens
from engine.chat.tool_calls import Format

THINKING, ANSWER, HEADER, CALLS = "thinking", "answer", "header", "calls"


@dataclass(frozen=True)
class Markers:
    """How one family of models writes its thinking. label: a word that follows the opening marker; around: what stands
    before and behind the answer."""

    open: str
    close: str
    label: str = ""
    around: tuple[str, str] = ("", "")


_ANSWER = ("<answer>", "</answer>")
PAIRS = (Markers("<think>", "</think>"), Markers("[THINK]", "[/THINK]"), Markers("<seed:think>", "</seed:think>"),
         Markers("<mm:think>", "</mm:think>"), Markers("<thought>", "</thought>"),
         Markers("<|START_THINKING|>", "<|END_THINKING|>"), Markers("<|channel>", "<channel|>", "thought"))
# What a header of harmony is made of, besides special tokens.
_HEADER_WORDS = re.compile(r"(?:\s+|(?:assistant|analysis|commentary|final|json)\b|to=\S+)*")
_CHANNEL, _START, _MESSAGE, _TO = "<|channel|>", "<|start|>", "<|message|>", "to=functions."


def find_markers(tokens: Tokens) -> Markers | None:
    """The pair that the template writes, else one that the vocabulary knows, if any."""
    written = [pair for pair in PAIRS if pair.close in tokens.template.source]
    known = [pair for pair in PAIRS if pair.close in tokens.added]
    found = next(iter(written + known), None)
    if found and all(mark in tokens.template.source for mark in _ANSWER):  # Hunyuan
        found = replace(found, around=_ANSWER)
    return found


def is_harmony(tokens: Tokens) -> bool:
    return _CHANNEL in tokens.template.source and _MESSAGE in tokens.template.source


class ReasoningParser:
    """Token ids in, (section, text) pieces out; `stopped` once a stop text has appeared in the answer.

    after: the last tokens of an answer that goes on. form: how calls are written, where tools were offered; their text
    is `calls` then. plain: a text in which nothing is a marker.
    """

    def __init__(self, tokens: Tokens, prompt_text: str, stop: tuple[str, ...] = (), after: Sequence[int] = (),
                 form: Format | None = None, plain: bool = False):
        self._special = tokens.special
        self._stream = TextStream(tokens, after)
        self._harmony = is_harmony(tokens) and not plain
        self._pair = None if self._harmony or plain else find_markers(tokens)
        self._form, self.calls = form, ""
        self._stop = stop
        self._buffer = ""
        self._header = ""
        self.stopped = False
        self.section = ANSWER
        self._label = ""
        self._strip = False  # blanks at the start of a section are the template's layout, not text
        self._said = bool(after)  # whether the answer has begun: no marker opens thinking any more
        self._line = ""  # of the thinking, since its last break
        self._wrapped = False  # the answer began with the mark that stands before answers
        if after:
            self.section = ANSWER
        elif self._harmony:
            self.section = HEADER
        elif self._pair and prompt_text.rstrip().endswith(self._pair.open):
            self._enter(THINKING)

    def push(self, token: int) -> list[tuple[str, str]]:
        """The pieces that became certain with this token, often one, sometimes none."""
        if self.stopped:
            return []
        name = self._special.get(token)
        if self.section == CALLS:
            self.calls += self._stream.push(token) if name is None else self._stream.flush() + name
            return []
        if name is None:
            return self._scan(self._stream.push(token))
        return self._scan(self._stream.flush()) + self._control(name)

    def flush(self) -> list[tuple[str, str]]:
        """What was held back, when the answer has ended."""
        if self.section == CALLS:
            self.calls += self._stream.flush()
            return []
        if self.stopped:
            return []
        pieces = self._scan(self._stream.flush())
        if self.section == HEADER:
            return pieces + self._unannounced()
        if self._wrapped and self._buffer.rstrip() == self._pair.around[1]:
            self._buffer = ""
        return pieces + self._release()

    def _control(self, name: str) -> list[tuple[str, str]]:
        if self.section == ANSWER and name == self._opens_calls:
            pieces = self._release()
            self._begin_calls(name)
            return pieces
        if self._pair and name in (self._pair.open, self._pair.close):
            return self._scan(name)
        if not self._harmony:
            return []
        pieces = self._release() + (self._unannounced() if self.section == HEADER and name != _MESSAGE else [])
        if name == _MESSAGE and self._form and _TO in self._header:
            self._begin_calls(self._header + _MESSAGE)
        elif name == _MESSAGE:
            self._enter(ANSWER if "final" in self._header else THINKING)
        elif name in (_START, _CHANNEL):
            to_tool = name == _CHANNEL and _TO in self._header  # said before the channel or behind it
            self.section, self._header = HEADER, self._header + _CHANNEL if to_tool else ""
        return pieces

    def _unannounced(self) -> list[tuple[str, str]]:
        """Text where a header should be: it is shown."""
        end = _HEADER_WORDS.match(self._header).end()
        text, head = self._header[end:], self._header[:end]
        self._header = head
        return [(THINKING if "analysis" in head else ANSWER, text)] if text.strip() else []

    @property
    def _opens_calls(self) -> str | None:
        return self._form.opens if self._form and not self._harmony else None

    def _begin_calls(self, text: str) -> None:
        self.section, self.calls = CALLS, text

    def _scan(self, text: str) -> list[tuple[str, str]]:
        """Take text in; give out all but a tail that might become a marker or a stop text."""
        if self.section == HEADER:
            self._header += text
            return []
        self._buffer += text
        pieces: list[tuple[str, str]] = []
        while not self.stopped and self._skip_layout():
            found = _first(self._buffer, self._watched())
            if found is None:
                keep = max((_overlap(self._buffer, word) for word in self._watched()), default=0)
                pieces += self._give(len(self._buffer) - keep)
                break
            position, word = found
            pieces += self._give(position)
            if self._is_mention(word):
                if self._may_be_the_end(word):
                    break
                pieces += self._give(len(word))
                continue
            self._buffer = self._buffer[len(word):]
            self._meet(word)
        return pieces

    def _meet(self, word: str) -> None:
        if word in self._stop and self.section == ANSWER:
            self.stopped, self._buffer = True, ""
        elif word == self._opens_calls:
            self._begin_calls(word + self._buffer)
            self._buffer = ""
        elif word == self._pair.around[0]:
            self._wrapped = self._strip = True
        else:
            self._enter(THINKING if word == self._pair.open else ANSWER)

    def _is_mention(self, word: str) -> bool:
        """Whether a marker stands where the protocol does not put it."""
        if word in self._stop and self.section == ANSWER or word == self._opens_calls:
            return False
        if self.section == THINKING:
            return word == self._pair.open or self._pair.open in self._line  # it speaks of both, in one line
        return self._said or word == self._pair.around[1]

    def _may_be_the_end(self, word: str) -> bool:
        """What stands behind answers, with nothing but blanks behind it yet."""
        return self._wrapped and word == self._pair.around[1] and not self._buffer[len(word):].strip()

    def _watched(self) -> tuple[str, ...]:
        if self.section == THINKING:
            return (self._pair.open, self._pair.close) if self._pair else ()
        marks = tuple(filter(None, (self._pair.open, self._pair.close, *self._pair.around))) if self._pair else ()
        return self._stop + marks + ((self._opens_calls,) if self._opens_calls else ())

    def _skip_layout(self) -> bool:
        """Drop the label and blanks at the start of a section; False while more text must come to know."""
        if self._label:
            if self._buffer.startswith(self._label):
                self._buffer = self._buffer[len(self._label):]
            elif self._label.startswith(self._buffer):
                return False
            self._label = ""
        if self._strip:
            self._buffer = self._buffer.lstrip()
            self._strip = not self._buffer
        return bool(self._buffer)

    def _enter(self, section: str) -> None:
        self.section, self._strip, self._line = section, True, ""
        self._label = self._pair.label if self._pair and section == THINKING else ""

    def _release(self) -> list[tuple[str, str]]:
        return self._give(len(self._buffer)) if self.section != HEADER else []

    def _give(self, n_characters: int) -> list[tuple[str, str]]:
        text, self._buffer = self._buffer[:n_characters], self._buffer[n_characters:]
        if self.section == THINKING:
            self._line = (self._line + text).rpartition("\n")[2]
        elif text.strip():
            self._said = True
        return [(self.section, text)] if text else []


def _first(text: str, words: tuple[str, ...]) -> tuple[int, str] | None:
    """The earliest word in the text; of those at one place the longest."""
    found = [(text.find(word), -len(word), word) for word in words if word in text]
    return (min(found)[0], min(found)[2]) if found else None


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of the text that is a beginning of the word."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
