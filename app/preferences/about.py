"""Which program this is, what it runs on, and under which licences."""
from __future__ import annotations

import platform

from fastapi import APIRouter

from app.about import libraries, version_of_program


def routes(router: APIRouter, parts) -> None:
    @router.get("/preferences/about")
    def read():
        return {"version": version_of_program(), "python": platform.python_version(),
                "system": platform.platform(), "libraries": libraries()}
