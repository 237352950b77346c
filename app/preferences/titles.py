"""Whether the model writes the titles of conversations."""
from __future__ import annotations

from fastapi import APIRouter

from app.chat.titles import MODEL_TITLES
from app.incoming import Body


class Titles(Body):
    by_model: bool


def routes(router: APIRouter, parts) -> None:
    @router.get("/preferences/titles")
    def read():
        return {"by_model": bool(parts.chats.preference(MODEL_TITLES, True))}

    @router.patch("/preferences/titles")
    def change(wish: Titles):
        parts.chats.set_preference(MODEL_TITLES, wish.by_model)
        return read()
