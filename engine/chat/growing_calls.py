"""Calls of tools while they are written: the name as soon as it stands there, the arguments as they grow.

Only where a format writes its arguments as JSON; the others are told when they are whole (engine/chat/tool_calls.py,
which also has the last word on what is a call). What has been told cannot be taken back.
"""
from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from engine.core import CallPiece

FORCED = r'\s*\{\s*"name":\s*"(?P<name>[\w.-]+)",\s*"arguments":\s*'  # what a grammar makes of one that is asked for


class GrowingCalls:
    """Give it all text of the calls so far, again and again. begins: the pattern of what stands before the arguments of
    one call, from the end of the one before; "" for a format that has no such place. names: what was offered."""

    def __init__(self, begins: str, names: Collection[str]) -> None:
        self._begins, self._names = re.compile(begins, re.S) if begins else None, names
        self._at, self._depth, self._quoted, self._escaped = 0, 0, False, False
        self.begun = 0

    def push(self, text: str) -> Iterator[CallPiece]:
        """What has come since, call by call."""
        while self._begins and self._at < len(text):
            if not self._depth:
                found = self._begins.match(text, self._at)
                if not found or found.end() == len(text):
                    return
                if found["name"] not in self._names or text[found.end()] != "{":
                    self._begins = None  # not one of ours: the rest is read when it is whole
                    return
                self._at = found.end()
                yield CallPiece(self.begun, found["name"])
                self.begun += 1
            end = self._whole(text)
            yield CallPiece(self.begun - 1, "", text[self._at:end])
            self._at = end

    def _whole(self, text: str) -> int:
        """Where the arguments end, or the text."""
        for place in range(self._at, len(text)):
            letter = text[place]
            if self._quoted:
                self._quoted = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._quoted = True
            else:
                self._depth += (letter in "{[") - (letter in "}]")
                if not self._depth:
                    return place + 1
        return len(text)
