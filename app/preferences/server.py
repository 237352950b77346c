"""Another OpenAI-compatible server that conversations can be sent to: its address, key and models."""
from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from app.http.leaving import while_asked
from app.incoming import Body, Place
from app.remote.server import KEY_CHARACTERS, Servers
from engine import Stopped


class Chosen(Body):
    """key None: the stored one, if the address is the stored one's."""

    address: Place
    key: Annotated[str, Field(max_length=KEY_CHARACTERS)] | None = None


def routes(router: APIRouter, parts) -> None:
    servers = Servers(parts.chats)

    @router.get("/preferences/server")
    def read():
        server = servers.current()
        return {"address": server.address, "has_key": bool(server.key), "models": server.models} if server else {}

    @router.post("/preferences/server")
    async def choose(wish: Chosen, request: Request):
        """Asks the server for its models: nothing goes there before. Stopped by the person it changes nothing."""
        with suppress(Stopped):
            await while_asked(request, partial(servers.choose, wish.address, wish.key))
        parts.stream.changed()
        return await run_in_threadpool(read)

    @router.delete("/preferences/server")
    def forget():
        servers.forget()
        parts.stream.changed()
        return {}
