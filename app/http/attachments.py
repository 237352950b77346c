"""What the composer asks of a file that is no plain UTF-8: its text."""
from __future__ import annotations

import binascii
from base64 import b64decode
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from app.chat.attachments import text_of
from app.incoming import BODY_BYTES, Body, Name
from app.strings import TEXT
from engine import UserError


class File(Body):
    """data: its bytes in base64."""

    name: Name
    data: Annotated[str, Field(max_length=BODY_BYTES)]


def routes(router: APIRouter) -> None:
    @router.post("/attachments/text")
    def read(file: File):
        try:
            data = b64decode(file.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(TEXT["not_text"].format(name=file.name)) from error
        text, encoding = text_of(file.name, data)
        return {"text": text, "encoding": encoding}
