"""One click makes a zip that helps to find what is wrong, without names, places, keys and messages."""
from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.diagnostics import bundle
from app.http.download import download
from app.incoming import Id


def routes(router: APIRouter, parts) -> None:
    @router.get("/preferences/diagnostics/zip")
    def made(conversation: Annotated[Id | None, Query()] = None):
        """conversation: the one whose messages a person wants to hand over as well."""
        return download(bundle(parts, conversation), "floechat-diagnostics.zip", "application/zip")
