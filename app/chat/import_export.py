"""Conversations as files: JSON keeps everything (all versions), Markdown keeps what is shown and can be read by anyone.

Both can be read back: a file is looked at whole before anything of it is stored, and stored in one step. In Markdown a
comment line marks who speaks, so headings inside a message are harmless.
"""
from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from app.chat.chat_settings import anywhere, checked, usable
from app.chat.chats import ROLES, STATUSES, Chats, Conversation, Message, usable_stats
from app.incoming import TEXT_CHARACTERS, Attachments, Id, Title, Words, what_is_wrong
from app.strings import TEXT
from engine import UserError

FORMAT = "floechat-conversations"
VERSION = 1
IMPORT_BYTES = 60 << 20
PARTS = 4_000_000  # strings, commas and brackets of a document: what is parsed takes some hundred times its few bytes
MESSAGES = 100_000  # of one conversation
_PART = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)
_MARK = re.compile(r"^<!-- floe:(user|assistant) -->\n(?:\*\*.*\*\*\n\n?)?", re.MULTILINE)


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)  # names that are not known are ignored


class _Message(_Document):
    id: Id
    parent_id: Id | None
    role: Literal[ROLES]
    text: Words
    thinking: Words = ""
    status: Literal[STATUSES] = "done"
    created_at: float = Field(default_factory=time.time)
    stats: Annotated[dict[str, Any], AfterValidator(usable_stats)] = {}
    attachments: Attachments = []


class _Conversation(_Document):
    title: Title
    messages: Annotated[list[_Message], FailFast(), Field(max_length=MESSAGES)]
    pinned: bool = False
    settings: Annotated[dict[str, Any], AfterValidator(checked)] = {}
    leaf: Id | None = None

    @model_validator(mode="after")
    def _check(self) -> _Conversation:
        """Every message stands below one that comes before it, so no path is endless."""
        seen: set[int | None] = {None}
        for message in self.messages:
            if message.id in seen or message.parent_id not in seen:
                raise ValueError(TEXT["wrong_tree"].format(id=message.id))
            seen.add(message.id)
        return self


class _File(_Document):
    format: Literal[FORMAT]
    version: int = Field(ge=1, le=VERSION)
    conversations: Annotated[list[_Conversation], FailFast()]


def export_json(chats: Chats, conversation_ids: list[int]) -> str:
    """The whole conversations, every version, as one JSON document."""
    return json.dumps({"format": FORMAT, "version": VERSION,
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


def import_text(chats: Chats, text: str) -> list[Conversation]:
    """New conversations from an exported JSON or Markdown text; UserError, and nothing is stored, if it is neither."""
    if text.lstrip()[:1] == "{":
        copies = _read_json(text)
    elif _MARK.search(text):
        copies = [_read_markdown(text)]
    else:
        raise UserError(TEXT["import_foreign"])
    return chats.bring_in(copies)


def _to_dict(chats: Chats, conversation: Conversation) -> dict:
    messages = [{n: v for n, v in asdict(m).items() if n != "conversation_id"} for m in chats.messages(conversation.id)]
    numbers = {message["id"] for message in messages}
    for message in messages:  # what is above a damaged one may be gone
        above = message["parent_id"]
        message["parent_id"] = above if above in numbers and above < message["id"] else None
    return {"title": conversation.title, "created_at": conversation.created_at, "pinned": conversation.pinned,
            "settings": anywhere(usable(conversation.settings)), "leaf": conversation.leaf_id, "messages": messages}


def _read_json(text: str) -> list[tuple[Conversation, list[Message]]]:
    if any(count == PARTS for count, _ in enumerate(_PART.finditer(text))):
        raise UserError(TEXT["import_long"])
    try:
        file = _File.model_validate_json(text)
    except UserError as error:  # settings and attachments have sentences of their own
        said = str(error).rstrip(".")
        raise UserError(TEXT["import_wrong"].format(what=said[:1].lower() + said[1:])) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        newer = first["loc"] == ("version",) and first["type"] == "less_than_equal"
        raise UserError(TEXT["import_newer"] if newer else
                        TEXT["import_wrong"].format(what=what_is_wrong(first))) from error
    return [_copy(conversation) for conversation in file.conversations]


def _copy(source: _Conversation) -> tuple[Conversation, list[Message]]:
    conversation = Conversation(0, source.title, False, 0.0, 0.0, source.pinned, source.leaf,
                                anywhere(source.settings))
    return conversation, [Message(conversation_id=0, **message.model_dump()) for message in source.messages]


def _read_markdown(text: str) -> tuple[Conversation, list[Message]]:
    head, *rest = _MARK.split(text)
    title, now = re.search(r"^# (.+)$", head, re.MULTILINE), time.time()
    if len(rest) > 2 * MESSAGES or any(len(body) > TEXT_CHARACTERS for body in rest):
        raise UserError(TEXT["import_long"])
    messages = [Message(i, 0, i - 1 or None, role, body.strip("\n"), "", "done", now, {}, [])
                for i, (role, body) in enumerate(zip(rest[::2], rest[1::2], strict=True), 1)]
    return Conversation(0, title.group(1) if title else "", False, now, now, False, None), messages
