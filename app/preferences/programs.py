"""Keys for programs on this computer (app/openai_api): each is shown once, when it is made."""
from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from app.incoming import Body, Name


class Made(Body):
    name: Annotated[str, Field(max_length=100)]


def routes(router: APIRouter, parts) -> None:
    @router.get("/preferences/programs")
    def read():
        return {"keys": parts.keys.listed(), "model": parts.shelf.names()[0]}

    @router.post("/preferences/programs/keys")
    def make(wish: Made):
        return {"key": parts.keys.make(wish.name), "keys": parts.keys.listed()}

    @router.delete("/preferences/programs/keys/{key_id}")
    def revoke(key_id: Name):
        parts.keys.revoke(key_id)
        return {"keys": parts.keys.listed()}
