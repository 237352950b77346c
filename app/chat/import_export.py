"""Conversations as files: out as JSON (everything, all versions) or Markdown (what is shown, for anyone to read); in
from both, and from what other programs export (app/chat/imports).

A file of any size is read conversation by conversation; all of it is there in the end, or nothing.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import BinaryIO

import pydantic_core

from app.chat.chat_settings import anywhere, usable
from app.chat.chats import Chats, Conversation, Message, TakenIn
from app.chat.imports import chatgpt, claude, floe, jan, lm_studio, open_webui
from app.chat.imports.documents import CONVERSATION_CHARACTERS, Heard, Piece, is_zip, pieces
from app.strings import TEXT
from engine import UserError

FOREIGN = (chatgpt, claude, open_webui, lm_studio)  # a document of these is a conversation; Jan's are in parts
HEAD_BYTES = 64 << 10  # of a file, in which its first letter has to come


def export_json(chats: Chats, conversation_ids: list[int]) -> str:
    """The whole conversations, every version, as one JSON document."""
    return json.dumps({"format": floe.FORMAT, "version": floe.VERSION,
                       "conversations": [_to_dict(chats, chats.conversation(i)) for i in conversation_ids]},
                      ensure_ascii=False, indent=1)


def export_markdown(chats: Chats, conversation_id: int) -> str:
    """The shown version as Markdown."""
    conversation = chats.conversation(conversation_id)
    parts = [f"# {conversation.title or 'Conversation'}\n"]
    for message in chats.path(conversation_id):
        name = "You" if message.role == "user" else "Assistant"
        parts.append(f"<!-- floe:{message.role} -->\n**{name}**\n\n{message.text}\n")
    return "\n".join(parts)


def import_file(chats: Chats, file: BinaryIO, heard: Heard = lambda share: None) -> TakenIn:
    """Conversations of an open file, ours or another program's, found by what it holds. heard: is told the share that
    lies behind. UserError, and nothing is stored, if it is none of these or damaged."""
    if is_zip(file) or _first_letter(file) in (b"{", b"["):
        return chats.take_in(_found(pieces(file, heard)))
    file.seek(0)
    try:
        text = file.read(floe.MARKDOWN_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(TEXT["import_foreign"]) from error
    if not floe.is_markdown(text):
        raise UserError(TEXT["import_foreign"])
    if len(text) > floe.MARKDOWN_BYTES:
        raise UserError(TEXT["import_long"])
    return chats.take_in([floe.read_markdown(text)])


def _first_letter(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _found(stream: Iterator[Piece]) -> Iterator[tuple[Conversation, list[Message]]]:
    """The conversations among the pieces. Other files may lie beside in a zip; a bare file is read whole or not."""
    none, ours, thread = True, False, _Thread()
    for piece in stream:
        if not piece.text:  # a list begins, and each of its conversations comes with the same head
            ours = _is_ours(piece.head)
            none = none and not ours
            continue
        if ours and piece.head:
            yield floe.read(piece.text)
            continue
        document = _parsed(piece.text)
        if document.get("format") == floe.FORMAT:
            floe.check_head(piece.text)
        if jan.recognised(document):
            none = False
            yield from thread.take(piece, document)
        elif reader := next((each for each in FOREIGN if each.recognised(document)), None):
            none = False
            yield reader.read(document)
        elif not piece.file:
            raise UserError(TEXT["import_foreign"])
    yield from thread.end()
    if none:
        raise UserError(TEXT["import_foreign"])


class _Thread:
    """What of one of Jan's threads has come: its documents lie in one folder, or one after the other in a file."""

    def __init__(self) -> None:
        self._documents: list[dict] = []
        self._place, self._characters = "", 0

    def take(self, piece: Piece, document: dict) -> Iterator[tuple[Conversation, list[Message]]]:
        place = str(PurePosixPath(piece.file).parent) if piece.file else jan.key_of(document)
        if place != self._place:
            yield from self.end()
        self._place, self._characters = place, self._characters + len(piece.text)
        if self._characters > CONVERSATION_CHARACTERS:
            raise UserError(TEXT["import_long"])
        self._documents.append(document)

    def end(self) -> Iterator[tuple[Conversation, list[Message]]]:
        conversation, messages = jan.read(self._documents)
        self._documents, self._characters = [], 0
        if messages:
            yield conversation, messages


def _parsed(text: str) -> dict:
    try:
        document = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise UserError(TEXT["import_damaged"]) from error
    return document if isinstance(document, dict) else {}


def _is_ours(head: str) -> bool:
    """Whether our conversations follow; UserError for those of a newer version, or where it is not as we write it."""
    if _parsed(head).get("format") != floe.FORMAT:
        return False
    floe.check_head(head)
    return True


def _to_dict(chats: Chats, conversation: Conversation) -> dict:
    messages = [{n: v for n, v in asdict(m).items() if n != "conversation_id"} for m in chats.messages(conversation.id)]
    numbers = {message["id"] for message in messages}
    for message in messages:  # what is above a damaged one may be gone
        above = message["parent_id"]
        message["parent_id"] = above if above in numbers and above < message["id"] else None
    return {"title": conversation.title, "created_at": conversation.created_at, "updated_at": conversation.updated_at,
            "pinned": conversation.pinned, "settings": anywhere(usable(conversation.settings)),
            "leaf": conversation.leaf_id, "messages": messages}
