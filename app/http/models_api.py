"""What the Models page asks for: plain JSON routes over the shelf. The guard stands in front of them."""
from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from app import incoming
from app.incoming import Context, Name, NearBytes, Place
from app.library.model_library import Shelf


def model_routes(router: APIRouter, shelf: Shelf) -> None:
    """All routes below /api/models."""
    @router.get("/models")
    def shown():
        return shelf.shown()

    @router.get("/models/plan")
    def plan(name: Name, level: Annotated[str, Query(max_length=40)] = "", context: Context | None = None,
             near: NearBytes | None = None):
        return shelf.plan(name, level or None, context, near)

    @router.get("/models/search")
    def search(q: Annotated[str, Query(max_length=400)]):
        return shelf.search(q)

    @router.get("/models/examine")
    def examine(name: Name):
        return shelf.examine(name)

    @router.get("/models/files")
    def files(path: Place = "", kind: Literal["gguf", "text", "folder"] = "gguf"):
        return shelf.suggest(path, kind)

    @router.post("/models/open")
    def open_model(wish: incoming.Opening):
        shelf.open(wish.name, wish.level or None, wish.context, wish.near_bytes, wish.preset)
        return {}

    @router.post("/models/folder")
    def show_folder(wish: incoming.Named):
        return {"folder": shelf.show_folder(wish.name)}

    @router.post("/models/keep")
    def keep_in(wish: incoming.Keeping):
        return {"folder": shelf.keep_in(wish.folder)}

    @router.post("/models/compress")
    def compress(wish: incoming.Compressing):
        shelf.compress(wish.name, wish.text)
        return {}

    @router.post("/models/add")
    def add(wish: incoming.Adding):
        return shelf.add(wish.path, wish.like)

    @router.post("/models/where")
    def where(wish: incoming.Dropped):
        return {"path": shelf.where(wish.name, wish.bytes)}

    @router.post("/models/measure")
    def measure(wish: incoming.Measuring):
        shelf.measure(wish.name, wish.text)
        return {}

    @router.post("/models/cancel")
    def cancel(wish: incoming.Named):
        return {"freed": shelf.cancel(wish.name)}

    @router.post("/models/download")
    def fetch(wish: incoming.Fetching):
        shelf.fetch(wish.name.strip(), wish.file, wish.like.strip())
        return {}

    @router.post("/models/resume")
    def go_on(wish: incoming.Named):
        shelf.works.go_on(wish.name)
        return {}

    @router.post("/models/pause")
    def pause(wish: incoming.Named):
        shelf.pause(wish.name)
        return {}

    @router.post("/models/delete")
    def remove(wish: incoming.Named):
        return {"freed": shelf.remove(wish.name)}
