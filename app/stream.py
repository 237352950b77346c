"""One event stream for every open page: panel numbers, the growing answer, and what else changed.

A single producer looks at the live answer 12 times a second and renders it once, however many tabs watch; the engine
never waits for a page. Events: `state` (something changed: model, queue, list), `text` (blocks of the live answer from
an index on), `stats` (4 a second). A subscriber that is too slow is dropped and comes back by itself.
"""
from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

from app.jobs import Live
from app.markdown import Growing
from app.panel import Panel

TICK_SECONDS = 1 / 12
STATS_EVERY = 3  # ticks
_BACKLOG = 200  # events a slow tab may lag behind


class Stream:
    """`changed` may be called from any thread; the rest belongs to the server's event loop."""

    def __init__(self, panel: Panel, live: Callable[[], Live | None], state: Callable[[], dict]):
        self._panel, self._live, self._state = panel, live, state
        self._tabs: set[asyncio.Queue] = set()
        self._revision = 0
        self._told = -1
        self._answer = _Answer()
        self._closed = False
        self.watched = asyncio.Event()  # set when the first page has connected

    def changed(self) -> None:
        self._revision += 1

    def close(self) -> None:
        self._closed = True
        for tab in self._tabs:
            tab.put_nowait(None)

    async def run(self) -> None:
        """The producer; ends when its task is cancelled."""
        tick = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            tick += 1
            if self._tabs:
                self._produce(tick)

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events for one tab, the whole present state first."""
        tab: asyncio.Queue = asyncio.Queue(_BACKLOG)
        self._tabs.add(tab)
        self.watched.set()
        try:
            yield "retry: 1000\n" + _event("state", self._state())
            yield _event("history", list(self._panel.history))
            yield _event("text", self._answer.whole()) if self._answer.message_id else ": hello\n\n"
            while not self._closed and (text := await tab.get()) is not None:
                yield text
        finally:
            self._tabs.discard(tab)

    def _produce(self, tick: int) -> None:
        live = self._live()
        if live and (update := self._answer.update(live)):
            self._send(_event("text", update))
        if self._revision != self._told and (live is None or tick % STATS_EVERY == 0):
            self._told = self._revision
            self._send(_event("state", self._state()))
        if tick % STATS_EVERY == 0:
            self._send(_event("stats", self._panel.sample()))

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
    """What was last sent of the live answer."""

    def __init__(self):
        self.message_id: int | None = None
        self._revision = -1

    def update(self, live: Live) -> dict | None:
        """The difference to the last call; None when nothing changed."""
        if live.message_id != self.message_id:
            self.message_id, self._live, self._revision = live.message_id, live, -1
            self._text, self._thinking = Growing(), Growing()
        self._live = live
        if live.revision == self._revision:
            return None
        self._revision = live.revision
        return self._document(self._text.update(live.text), self._thinking.update(live.thinking))

    def whole(self) -> dict:
        return self._document(0, 0)

    def _document(self, text_from: int, thinking_from: int) -> dict:
        live = self._live
        return {"message": live.message_id, "conversation": live.conversation_id, "phase": live.phase,
                "note": live.note, "from": text_from, "blocks": self._text.blocks[text_from:],
                "thinking_from": thinking_from, "thinking_blocks": self._thinking.blocks[thinking_from:],
                "stats": live.stats}


def _event(name: str, document) -> str:
    return f"event: {name}\ndata: {json.dumps(document)}\n\n"
