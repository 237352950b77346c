"""Conversations from elsewhere, put into the database in a transaction of the caller's; what is there is recognised."""
from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import replace

from app.chat.rows import Conversation, Message, add, one_line


def insert(db: sqlite3.Connection, source: Conversation, messages: list[Message], hidden: float | None = None) -> int:
    """A conversation with its dates, now where it has none; -> its id. hidden: a mark of deletion that hides it."""
    created_at = source.created_at or time.time()
    number = db.execute(
        "INSERT INTO conversations(title, title_by_user, created_at, updated_at, pinned, deleted_at, settings) "
        "VALUES (?,?,?,?,?,?,?)", (one_line(source.title), int(source.title_by_user), created_at, created_at,
                                   int(source.pinned), hidden, json.dumps(source.settings))).lastrowid
    _hang(db, number, source, messages, {})
    db.execute("UPDATE conversations SET updated_at=? WHERE id=?", (source.updated_at or created_at, number))
    return number


def grow(db: sqlite3.Connection, number: int, source: Conversation, messages: list[Message]) -> None:
    """The messages that a conversation has not yet; looked at now, for the same file may have brought some of them."""
    ids = _same(db, number, messages)
    leaf, updated_at = db.execute("SELECT leaf_id, updated_at FROM conversations WHERE id=?", (number,)).fetchone()
    has_newer = leaf not in ids.values()  # somebody went on here
    _hang(db, number, source, messages, ids)
    if has_newer:
        db.execute("UPDATE conversations SET leaf_id=? WHERE id=?", (leaf, number))
    db.execute("UPDATE conversations SET updated_at=max(?, ?) WHERE id=?", (updated_at, source.updated_at, number))


def there_already(db: sqlite3.Connection, source: Conversation, messages: list[Message],
                  stamp: float) -> tuple[int | None, bool]:
    """(a conversation that is this one, whether it has all of these messages), (None, False) where there is none.

    It begins at the same time and with the same message; one without a date has the same title and all of the messages.
    stamp: the mark of what the same import has brought so far.
    """
    known = "created_at" if source.created_at else "title"
    rows = db.execute(f"SELECT id FROM conversations WHERE {known}=? AND (deleted_at IS NULL OR deleted_at=?)",
                      (source.created_at or one_line(source.title), stamp)).fetchall()
    for row in rows:
        ids = _same(db, row["id"], messages)
        whole = len(ids) == len(messages)
        if whole or ids and source.created_at:
            return row["id"], whole
    return None, False


def _same(db: sqlite3.Connection, number: int, messages: list[Message]) -> dict[int, int]:
    """Of these messages those that the conversation has at the same place, each with its id there."""
    there: dict[tuple, list[int]] = {}
    for row in db.execute("SELECT id, parent_id, role, text FROM messages WHERE conversation_id=? ORDER BY id DESC",
                          (number,)):
        there.setdefault((row["parent_id"], row["role"], row["text"]), []).append(row["id"])
    ids: dict[int, int] = {}
    for message in messages:
        if message.parent_id is None or message.parent_id in ids:
            place = there.get((ids.get(message.parent_id), message.role, message.text))
            if place:
                ids[message.id] = place.pop()
    return ids


def _hang(db: sqlite3.Connection, number: int, source: Conversation, messages: list[Message],
          ids: dict[int, int]) -> None:
    """Each below the one above it. ids: what is there; the others are added to it."""
    for message in messages:
        if message.id not in ids:
            ids[message.id] = add(db, replace(
                message, conversation_id=number, parent_id=ids.get(message.parent_id),
                status="interrupted" if message.status == "running" else message.status))
    if source.leaf_id in ids:
        db.execute("UPDATE conversations SET leaf_id=? WHERE id=?", (ids[source.leaf_id], number))
