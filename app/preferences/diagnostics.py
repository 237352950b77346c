"""One click makes a zip that helps to find what is wrong, without names, places, keys and messages."""
from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from app.incoming import Id


def routes(router: APIRouter, parts) -> None:
    from app.diagnostics import bundle  # which asks the section about versions

    @router.get("/preferences/diagnostics/zip")
    def made(conversation: Annotated[Id | None, Query()] = None):
        """conversation: the one whose messages a person wants to hand over as well."""
        return Response(bundle(parts, conversation), media_type="application/zip", headers={
            "content-disposition": "attachment; filename=\"floechat-diagnostics.zip\"; "
                                   "filename*=UTF-8''floechat-diagnostics.zip"})
