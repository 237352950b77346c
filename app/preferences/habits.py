"""Whether it is learned what answers take of a model, how much has been, and its end."""
from __future__ import annotations

from fastapi import APIRouter

from app.incoming import Body


class Wish(Body):
    wanted: bool


def routes(router: APIRouter, parts) -> None:
    habits = parts.jobs.habits

    @router.get("/preferences/habits")
    def read():
        return {"wanted": habits.wanted, "n_bytes": habits.size()}

    @router.patch("/preferences/habits")
    def change(wish: Wish):
        habits.want(wish.wanted)
        return read()

    @router.delete("/preferences/habits")
    def forget():
        habits.forget()
        return read()
