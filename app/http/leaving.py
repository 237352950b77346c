"""Whoever asked may go before the answer is there: what was done for it ends then."""
from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

Found = TypeVar("Found")


async def until_gone(request: Request) -> None:
    """Ends when the client has gone. Of a request whose body has been read: nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_asked(request: Request, work: Callable[[Callable[[], bool]], Found]) -> Found:
    """What work(left) comes to, in a thread; left() says whether the client has gone."""
    left = threading.Event()
    watch = asyncio.create_task(until_gone(request))
    watch.add_done_callback(lambda _: left.set())
    try:
        return await run_in_threadpool(work, left.is_set)
    finally:
        watch.cancel()
