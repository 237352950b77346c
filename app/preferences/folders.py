"""Where the program keeps what it keeps. Another folder for models is chosen at /api/models/keep."""
from __future__ import annotations

from typing import Literal

from fastapi import APIRouter

from app.incoming import Body
from app.library.folders import as_written, show
from engine import models_dirs

Which = Literal["data", "models", "logs"]


class Shown(Body):
    which: Which


def routes(router: APIRouter, parts) -> None:
    data = parts.around.data

    def folders() -> dict:
        return {"data": data, "models": models_dirs(data)[0], "logs": data / "logs"}

    @router.get("/preferences/folders")
    def read():
        return {which: as_written(folder) for which, folder in folders().items()}

    @router.post("/preferences/folders/show")
    def show_folder(wish: Shown):
        return {"folder": show(folders()[wish.which])}
