"""One request to another server and what comes back: bounded, without redirects, ended at once by a person's stop.

httpx does the talking, in an event loop of this thread's own, which is asked every WAKE_SECONDS whether to go on: a
server that says nothing holds nobody. What a server does wrong becomes one sentence (UserError).
"""
from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import closing, suppress

import httpx

from app.remote.place import Place
from app.strings import TEXT
from engine import Stopped, UserError

WAKE_SECONDS = 0.05
CONNECT_SECONDS = 15.0
ASK_SECONDS = 30.0  # for a list of models, which every server has at hand
SILENCE_SECONDS = 600.0  # a large prompt on a slow server; a person may stop at any time
LINE_BYTES = 1 << 20  # of one piece of an answer
ANSWER_BYTES = 64 << 20
SAID_CHARACTERS = 300  # of a server's own words in a sentence of ours


def ask(place: Place, path: str, stopped: Callable[[], bool] = lambda: False) -> object:
    """The JSON document at a path. UserError also where it is not whole within ASK_SECONDS, however it trickles;
    Stopped."""
    end = time.monotonic() + ASK_SECONDS

    def is_over() -> bool:
        return stopped() or time.monotonic() > end
    with closing(_until(is_over, _exchange(place, path, None))) as source:
        text = b"".join(_bounded(source))
    if stopped():
        raise Stopped
    if is_over():
        raise UserError(TEXT["server_gone"].format(host=place.host))
    return _json(text)


def tell(place: Place, path: str, body: dict, stop: threading.Event) -> Generator[object, None, None]:
    """Send a document -> the documents that come back as server-sent events until their end, or the one that comes
    back whole. Ends without a word where `stop` is set. UserError where the connection ends before the answer does."""
    with closing(_until(stop.is_set, _exchange(place, path, body))) as source:
        chunks = _bounded(source)
        first = next(chunks, b"")
        if first.lstrip()[:1] == b"{":
            yield _json(first + b"".join(chunks))
            return
        for data in _events(first, chunks):
            if data == "[DONE]":
                return
            yield _json(data)
    if not stop.is_set():
        raise UserError(TEXT["server_broke"].format(host=place.host))


async def _exchange(place: Place, path: str, body: dict | None) -> AsyncGenerator[bytes, None]:
    headers = {"accept-encoding": "identity", "user-agent": "floechat"}
    if place.key:
        headers["authorization"] = f"Bearer {place.key}"
    limits = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    try:
        async with (httpx.AsyncClient(timeout=limits, follow_redirects=False, trust_env=not place.is_here) as client,
                    client.stream("GET" if body is None else "POST", place.address + path, json=body,
                                  headers=headers) as reply):
            if reply.status_code != 200 or reply.headers.get("content-encoding", "identity") != "identity":
                raise UserError(await _refusal(place, reply))
            async for chunk in reply.aiter_raw():
                yield chunk
    except httpx.ConnectTimeout as error:
        raise UserError(TEXT["server_gone"].format(host=place.host)) from error
    except httpx.TimeoutException as error:
        raise UserError(TEXT["server_silent"].format(host=place.host, minutes=round(SILENCE_SECONDS / 60))) from error
    except httpx.ConnectError as error:
        raise UserError(TEXT["server_gone"].format(host=place.host)) from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # a lie about lengths, a wire cut, no HTTP at all
        raise UserError(TEXT["server_broke"].format(host=place.host)) from error


async def _refusal(place: Place, reply: httpx.Response) -> str:
    """Why there is no answer, in one sentence with the server's own words where it has any."""
    said, body = "", b""
    async for chunk in reply.aiter_raw():
        body += chunk
        if len(body) > LINE_BYTES:
            break
    with suppress(ValueError, TypeError):
        said = words_of(json.loads(body[:LINE_BYTES]))
    known = {401: TEXT["server_key"], 403: TEXT["server_key"], 404: TEXT["server_missing"], 429: TEXT["server_busy"],
             503: TEXT["server_busy"]}
    other = TEXT["server_foreign"] if reply.status_code < 400 else TEXT["server_refused"]
    return known.get(reply.status_code, other).format(host=place.host, said=said or f"HTTP {reply.status_code}")


def words_of(document: object) -> str:
    """The text of an error document of any server, on one line; "" where it holds none."""
    found = document.get("error", document) if isinstance(document, dict) else ""
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or ""
    return " ".join(found.split())[:SAID_CHARACTERS].rstrip(".") if isinstance(found, str) else ""


def _until(is_over: Callable[[], bool], source: AsyncGenerator[bytes, None]) -> Generator[bytes, None, None]:
    """What an asynchronous source gives, in this thread, until its end or until `is_over` says so."""
    loop = asyncio.new_event_loop()
    step = None
    try:
        while not is_over():
            step = step or loop.create_task(_next(source))
            loop.run_until_complete(asyncio.wait({step}, timeout=WAKE_SECONDS))
            if step.done():
                done, step = step, None
                if (chunk := done.result()) is None:
                    return
                yield chunk
    finally:
        if step:
            step.cancel()
            loop.run_until_complete(asyncio.gather(step, return_exceptions=True))
        loop.run_until_complete(source.aclose())
        loop.close()


async def _next(source: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(source, None)


def _bounded(chunks: Iterator[bytes]) -> Iterator[bytes]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > ANSWER_BYTES:
            raise UserError(TEXT["server_too_much"])
        yield chunk


def _events(held: bytes, chunks: Iterator[bytes]) -> Iterator[str]:
    """The data of server-sent events; comments and other fields are nobody's."""
    for chunk in _with_end(chunks):
        *lines, held = (held + chunk).split(b"\n")
        if len(held) > LINE_BYTES or any(len(line) > LINE_BYTES for line in lines):
            raise UserError(TEXT["server_too_much"])
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode(errors="replace")


def _with_end(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """And a line's end behind the last one, which may lack it."""
    yield b""
    yield from chunks
    yield b"\n"


def _json(text: bytes | str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(TEXT["server_foreign"]) from error
