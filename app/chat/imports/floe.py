"""Our own exports, read back: JSON with every version, Markdown with what was shown; as strictly as a request."""
from __future__ import annotations

import re
import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from app.chat.chat_settings import anywhere, checked
from app.chat.imports.tree import MESSAGES
from app.chat.rows import ROLES, STATUSES, Conversation, Message, usable_stats
from app.incoming import TEXT_CHARACTERS, Attachments, Id, Title, Words, what_is_wrong
from app.strings import TEXT
from engine import UserError

FORMAT = "floechat-conversations"
VERSION = 1
MARKDOWN_BYTES = 60 << 20
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
    created_at: float = 0.0
    updated_at: float = 0.0
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


def check_head(head: str) -> None:
    """What stands around the conversations. UserError for a newer version."""
    _checked(_File, head)


def read(text: str) -> tuple[Conversation, list[Message]]:
    """One conversation of a document. UserError says what is wrong with it."""
    source = _checked(_Conversation, text)
    dates = [message.created_at for message in source.messages]
    created_at = source.created_at or min(dates, default=0.0)
    conversation = Conversation(0, source.title, bool(source.title), created_at,
                                source.updated_at or max(dates, default=created_at), source.pinned, source.leaf,
                                anywhere(source.settings))
    return conversation, [Message(conversation_id=0, **message.model_dump()) for message in source.messages]


def _checked(kind: type[BaseModel], text: str) -> Any:
    try:
        return kind.model_validate_json(text)
    except UserError as error:  # settings and attachments have sentences of their own
        said = str(error).rstrip(".")
        raise UserError(TEXT["import_wrong"].format(what=said[:1].lower() + said[1:])) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise UserError(TEXT["import_damaged"]) from error
        newer = first["loc"] == ("version",) and first["type"] == "less_than_equal"
        raise UserError(TEXT["import_newer"] if newer else
                        TEXT["import_wrong"].format(what=what_is_wrong(first))) from error


def is_markdown(text: str) -> bool:
    return bool(_MARK.search(text))


def read_markdown(text: str) -> tuple[Conversation, list[Message]]:
    """It has no dates: those of the conversation are unknown."""
    head, *rest = _MARK.split(text)
    title, now = re.search(r"^# (.+)$", head, re.MULTILINE), time.time()
    if len(rest) > 2 * MESSAGES or any(len(body) > TEXT_CHARACTERS for body in rest):
        raise UserError(TEXT["import_long"])
    messages = [Message(i, 0, i - 1 or None, role, body.strip("\n"), "", "done", now, {}, [])
                for i, (role, body) in enumerate(zip(rest[::2], rest[1::2], strict=True), 1)]
    return Conversation(0, title.group(1) if title else "", False, 0.0, 0.0, False, None), messages
