"""One event stream for every open page: panel numbers, the growing answer, and what else changed.

One producer looks at the live answer up to 12 times a second and renders it once, however many tabs watch, in a thread:
neither the engine nor the server waits for that. Events: `state` (something changed: model, queue, list), `text`
(blocks of the live answer from an index on), `stats` (4 a second). A subscriber too slow is dropped and comes back.
"""
from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import TypeVar

from app.chat.answers import Live
from app.markdown import Growing
from app.panel import Panel
from app.strings import TEXT

TICK_SECONDS = 1 / 12
STATS_EVERY = 3  # ticks
REST = 4  # times as long as a rendering took, so that it gets about a fifth of the interpreter's time
LONGEST_REST = 2.0
_log = logging.getLogger(__name__)
T = TypeVar("T")
_BACKLOG = 200  # events a slow tab may lag behind


class Stream:
    """`changed` may be called from any thread; the rest belongs to the server's event loop."""

    def __init__(self, panel: Panel, live: Callable[[], Live | None], state: Callable[[], dict]):
        self._panel, self._live, self._state = panel, live, state
        self._tabs: set[asyncio.Queue] = set()
        self._revision = 0
        self._told = -1
        self._answer: _Answer | None = None
        self._closed = False
        self._failed: dict[str, str] = {}  # what cannot be told, and why
        self.watched = asyncio.Event()  # set when the first page has connected

    def changed(self) -> None:
        self._revision += 1

    def close(self) -> None:
        self._closed = True
        for tab in self._tabs:
            tab.put_nowait(None)

    async def run(self) -> None:
        """The producer; ends when its task is cancelled."""
        await asyncio.gather(self._tell_present(), self._tell_answer())

    async def _tell_present(self) -> None:
        for tick in count(1):
            await asyncio.sleep(TICK_SECONDS)
            if self._tabs:
                await self._produce(tick)

    async def _tell_answer(self) -> None:
        while True:
            began, live = time.monotonic(), self._live()
            if self._tabs and live:
                if self._answer is None or self._answer.live is not live:
                    self._answer = _Answer(live)
                self._tell(self._send, "text", await _beside(self._answer.update))
            await asyncio.sleep(min(max(TICK_SECONDS, REST * (time.monotonic() - began)), LONGEST_REST))

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events for one tab, the whole present state first."""
        self.watched.set()
        present, tab = await _beside(self._state), asyncio.Queue(_BACKLOG)
        self._tabs.add(tab)
        self._told = -1  # what has changed since
        try:
            self._tell(tab.put_nowait, "state", present)
            self._tell(tab.put_nowait, "history", lambda: list(self._panel.history))
            self._tell(tab.put_nowait, "text", lambda: self._answer and self._answer.whole())
            while not self._closed and (text := await tab.get()) is not None:
                yield text
        finally:
            self._tabs.discard(tab)

    async def _produce(self, tick: int) -> None:
        if self._revision != self._told and (self._live() is None or tick % STATS_EVERY == 0):
            revision = self._revision
            if self._tell(self._send, "state", await _beside(self._state)):
                self._told = revision
        if tick % STATS_EVERY == 0:
            self._tell(self._send, "stats", self._panel.sample)

    def _tell(self, send: Callable[[str], None], name: str, make: Callable[[], object]) -> bool:
        """Send what `make` gives, if anything. Where it fails, every page is told once, and the rest goes on."""
        try:
            if (document := make()) is not None:
                send(_event(name, document))
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
            if failed != self._failed.get(name):
                self._failed[name] = failed
                _log.error("The page cannot be told what is new", exc_info=error)
                self._send(_event("trouble", TEXT["page_trouble"].format(error=failed)))
            return False
        self._failed.pop(name, None)
        return True

    def _send(self, text: str) -> None:
        for tab in list(self._tabs):
            if tab.full():
                self._tabs.discard(tab)
                while not tab.empty():
                    tab.get_nowait()
                tab.put_nowait(None)  # ends its stream; the browser connects again
            else:
                tab.put_nowait(text)


class _Answer:
    """What was last sent of one live answer."""

    def __init__(self, live: Live):
        self.live, self._revision = live, -1
        self._text, self._thinking = Growing(), Growing()

    def update(self) -> dict | None:
        """The difference to the last call; None when nothing changed."""
        if self.live.revision == self._revision:
            return None
        self._revision = self.live.revision
        return self._document(self._text.update(self.live.text), self._thinking.update(self.live.thinking))

    def whole(self) -> dict:
        return self._document(0, 0)

    def _document(self, text_from: int, thinking_from: int) -> dict:
        live = self.live
        return {"message": live.message_id, "conversation": live.conversation_id, "phase": live.phase,
                "note": live.note, "from": text_from, "blocks": self._text.blocks[text_from:],
                "thinking_from": thinking_from, "thinking_blocks": self._thinking.blocks[thinking_from:],
                "stats": live.stats}


async def _beside(make: Callable[[], T]) -> Callable[[], T]:
    """Ask in a thread, as the database may be busy for seconds; -> what gives its answer, or raises what it raised."""
    asked = asyncio.ensure_future(asyncio.to_thread(make))
    await asyncio.wait([asked])
    return asked.result


def _event(name: str, document) -> str:
    return f"event: {name}\ndata: {json.dumps(document)}\n\n"
