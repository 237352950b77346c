"""What the model switcher in the header asks: the models of this computer, and another level of the open one."""
from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from app.incoming import Body
from app.library.open_model import Models


class Wish(Body):
    level: Annotated[str, Field(max_length=40)]


def routes(router: APIRouter, shelf, models: Models) -> None:
    @router.get("/switcher")
    def shown():
        """{"models": [{"name", "title", "open"}], "levels": of the open model, "level": the wished one}."""
        return {"models": shelf.titles(), "levels": list(models.info().get("levels") or ()),
                "level": models.options.level}

    @router.patch("/switcher")
    def change(wish: Wish):
        models.configure(level=wish.level)
        return {}
