"""What the chat database keeps, as values: a conversation, a message, and how either is read from a row and added.

What stands in a row may be of any kind: another program, an older import or a damaged page may have written it.
"""
from __future__ import annotations

import json
import re
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from app.incoming import TITLE_CHARACTERS

ROLES = ("user", "assistant")
STATUSES = ("running", "done", "length", "stopped", "error", "interrupted")
_STATS_IN_WORDS = ("model", "level", "server", "error", "lossy")  # the others are numbers
T = TypeVar("T")


@dataclass(frozen=True)
class Conversation:
    id: int
    title: str
    title_by_user: bool
    created_at: float
    updated_at: float
    pinned: bool
    leaf_id: int | None
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    id: int
    conversation_id: int
    parent_id: int | None
    role: str
    text: str
    thinking: str
    status: str
    created_at: float
    stats: dict
    attachments: list

    def __post_init__(self) -> None:
        assert self.role in ROLES and self.status in STATUSES, (self.role, self.status)


def usable_stats(stats: dict) -> dict:
    """Those that the page can show."""
    return {name: value for name, value in stats.items() if name in _STATS_IN_WORDS and isinstance(value, str)
            or name not in _STATS_IN_WORDS and _is_number(value)}


def add(db: sqlite3.Connection, message: Message) -> int:
    """A message of a transaction, with an id of its own, the shown one from now on; -> its id."""
    added = db.execute(
        "INSERT INTO messages(conversation_id, parent_id, role, text, thinking, status, created_at, stats, "
        "attachments) VALUES (?,?,?,?,?,?,?,?,?)",
        (message.conversation_id, message.parent_id, message.role, message.text, message.thinking, message.status,
         message.created_at, json.dumps(message.stats), json.dumps(message.attachments))).lastrowid
    db.execute("UPDATE conversations SET leaf_id=?, updated_at=? WHERE id=?",
               (added, time.time(), message.conversation_id))
    return added


def conversation_of(row: sqlite3.Row) -> Conversation:
    leaf = row["leaf_id"]
    return Conversation(row["id"], one_line(str(row["title"])), bool(row["title_by_user"]), _time(row["created_at"]),
                        _time(row["updated_at"]), bool(row["pinned"]), leaf if isinstance(leaf, int) else None,
                        json_of(row["settings"], {}))


def message_of(row: sqlite3.Row) -> Message:
    role, status = row["role"], row["status"]
    return Message(row["id"], row["conversation_id"], row["parent_id"], role if role in ROLES else "assistant",
                   str(row["text"]), str(row["thinking"]), status if status in STATUSES else "interrupted",
                   _time(row["created_at"]), usable_stats(json_of(row["stats"], {})), attachments_of(row))


def waiting_of(row: sqlite3.Row) -> dict:
    return dict(row) | {"text": str(row["text"]), "attachments": attachments_of(row)}


def attachments_of(row: sqlite3.Row) -> list[dict]:
    return [file for file in json_of(row["attachments"], [])
            if isinstance(file, dict) and all(isinstance(file.get(name), str) for name in ("name", "text"))]


def json_of(text: object, default: T) -> T:
    with suppress(ValueError, TypeError, RecursionError):
        found = json.loads(text, parse_constant=lambda name: None)
        return found if isinstance(found, type(default)) else default
    return default


def _time(value: object) -> float:
    return float(value) if _is_number(value) else 0.0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and -1e300 < value < 1e300  # neither NaN nor a number of a thousand digits


def one_line(title: str) -> str:
    return " ".join(title[:10 * TITLE_CHARACTERS].split())[:TITLE_CHARACTERS]


def snippet(text: str, words: list[str], around: int = 30) -> str:
    """What stands around the first of the words, each of them between two marks."""
    pattern = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))), re.IGNORECASE)
    at = found.start() if (found := pattern.search(text)) else 0
    shown = " ".join(text[max(0, at - around):at + 2 * around].split())
    marked = pattern.sub("\x02\\g<0>\x03", shown)
    return f"{'…' if at > around else ''}{marked}{'…' if at + 2 * around < len(text) else ''}"


def like(text: str) -> str:
    """As a part of a pattern of LIKE."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
