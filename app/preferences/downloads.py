"""Where models come from: another Hub in place of the public one, and hosts that it may send a download on to."""
from __future__ import annotations

import os
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from app.incoming import Body
from engine import allow_hosts, choose_mirror, kept_hosts, mirror, plain_address

MOST_CHARACTERS = 4000


class Sources(Body):
    mirror: Annotated[str, Field(max_length=MOST_CHARACTERS)]
    hosts: Annotated[str, Field(max_length=MOST_CHARACTERS)]


def routes(router: APIRouter, parts) -> None:
    data = parts.around.data

    @router.get("/preferences/downloads")
    def read():
        """variable: the address that HF_ENDPOINT names, which goes before the one that is kept."""
        return {"mirror": mirror(data), "hosts": list(kept_hosts(data)),
                "variable": os.environ.get("HF_ENDPOINT", "")}

    @router.post("/preferences/downloads")
    def choose(wish: Sources):
        plain_address(wish.mirror)  # both are looked at before either is kept
        allow_hosts(wish.hosts, data)
        choose_mirror(wish.mirror, data)
        return read()
