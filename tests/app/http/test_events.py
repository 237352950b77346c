"""The event stream: nothing that is rendered keeps the server from telling the rest."""
from __future__ import annotations

import asyncio
import threading

from app.chat.answers import Live
from app.http.events import Stream
from app.markdown import Growing


class Panel:
    history = ()

    def sample(self) -> dict:
        return {"sample": True}


async def heard(events, name: str, times: int = 1) -> str:
    """The events up to one of this name, however slow the machine."""
    async with asyncio.timeout(60):
        async for text in events:
            times -= text.startswith(f"event: {name}\n")
            if times == 0:
                return text
    raise AssertionError("it ended")


async def watching(made: Stream, work) -> None:
    producer, events = asyncio.create_task(made.run()), made.events()
    try:
        await work(events)
    finally:
        producer.cancel()
        await events.aclose()


def test_the_numbers_go_on_while_an_answer_is_rendered(monkeypatch):
    """Rendering waits here for the numbers: on the server's own loop it would wait for ever."""
    told, plain = threading.Event(), Growing.update

    def update(self, text):
        assert told.wait(60), "the loop was blocked"
        return plain(self, text)
    monkeypatch.setattr(Growing, "update", update)
    live = Live(1, 1, text="Hello")
    made = Stream(Panel(), lambda: live, dict)

    async def work(events):
        await heard(events, "stats", times=5)
        told.set()
        assert "Hello" in await heard(events, "text")
    asyncio.run(watching(made, work))


def test_the_server_goes_on_while_the_database_is_busy():
    """An import or a recovery keeps it for seconds; the state waits here for the server's own loop."""
    free = threading.Event()

    def state() -> dict:
        assert free.wait(60), "the loop was blocked"
        return {"conversations": "all"}
    made = Stream(Panel(), lambda: None, state)

    async def work(events):
        asyncio.get_running_loop().call_later(0.1, free.set)
        assert "all" in await heard(events, "state")
        free.clear()
        made.changed()
        asyncio.get_running_loop().call_later(0.5, free.set)
        assert "all" in await heard(events, "state")
    asyncio.run(watching(made, work))
