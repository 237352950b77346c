"""Texts of attached files: what the composer asks of one that is no plain UTF-8, and what a message was sent with."""
from __future__ import annotations

import binascii
from base64 import b64decode
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import Field

from app.chat.attachments import text_of
from app.chat.chats import Chats
from app.incoming import BODY_BYTES, Body, Id, Name
from app.strings import TEXT
from engine import UserError


class File(Body):
    """data: its bytes in base64."""

    name: Name
    data: Annotated[str, Field(max_length=BODY_BYTES)]


Place = Annotated[int, Path(ge=0, lt=1 << 31)]


def routes(router: APIRouter, chats: Chats) -> None:
    @router.post("/attachments/text")
    def read(file: File):
        try:
            data = b64decode(file.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(TEXT["not_text"].format(name=file.name)) from error
        text, encoding = text_of(file.name, data)
        return {"text": text, "encoding": encoding}

    @router.get("/messages/{message_id}/attachments/{place}")
    def sent(message_id: Id, place: Place):
        """The file of a message, by its place among them: {"name", "text"}."""
        files = chats.message(message_id).attachments
        if place >= len(files):
            raise UserError(TEXT["no_attachment"])
        return {"name": files[place]["name"], "text": files[place]["text"]}
