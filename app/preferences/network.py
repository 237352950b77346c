"""The password by which other devices of this network come in, where the program is started with --lan."""
from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from app.http.sign_in import MOST_CHARACTERS, PREFERENCE, hashed
from app.incoming import Body


class Password(Body):
    password: Annotated[str, Field(max_length=MOST_CHARACTERS)]


def routes(router: APIRouter, parts) -> None:
    def shown() -> dict:
        return {"has_password": bool(parts.chats.preference(PREFERENCE, {}))}

    @router.get("/preferences/network")
    def read():
        return shown()

    @router.post("/preferences/network")
    def choose(wish: Password):
        parts.chats.set_preference(PREFERENCE, hashed(wish.password))
        return shown()

    @router.delete("/preferences/network")
    def forget():
        parts.chats.set_preference(PREFERENCE, {})
        return shown()
