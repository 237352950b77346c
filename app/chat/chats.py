"""Conversations, kept in SQLite so that a reload, a second tab or a crash loses nothing.

Messages form a tree: a regenerated answer or an edited question is one more child of the same parent, and the
conversation's `leaf_id` says which version is shown. Deleting only marks; a mark older than a week is swept at start.
One connection behind one lock: every method may be called from any thread. Knows no engine and no page.
"""
from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from app.chat.schema import open_database
from engine import UserError

ROLES = ("user", "assistant")
STATUSES = ("running", "done", "length", "stopped", "error", "interrupted")
UNDO_SECONDS = 7 * 24 * 3600


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


class Chats:
    """All conversations of one data folder. Times are seconds since 1970."""

    def __init__(self, file: Path):
        self.file = file
        self._lock = threading.RLock()
        self._db = open_database(file)
        self._recover()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have rolled back already
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _recover(self) -> None:
        """What was running when the last process ended is marked so; old deletions become real."""
        with self._transaction() as db:
            db.execute("UPDATE messages SET status='interrupted' WHERE status='running'")
            db.execute("DELETE FROM conversations WHERE deleted_at < ?", (time.time() - UNDO_SECONDS,))

    # Conversations

    def conversations(self) -> list[Conversation]:
        """All that are not deleted, pinned first, newest first."""
        return [_conversation(row) for row in self._rows(
            "SELECT * FROM conversations WHERE deleted_at IS NULL ORDER BY pinned DESC, updated_at DESC, id DESC")]

    def conversation(self, conversation_id: int) -> Conversation:
        rows = self._rows("SELECT * FROM conversations WHERE id=? AND deleted_at IS NULL", conversation_id)
        if not rows:
            raise UserError("This conversation does not exist any more; choose another from the list.")
        return _conversation(rows[0])

    def create(self, title: str = "", settings: dict | None = None) -> Conversation:
        now = time.time()
        with self._transaction() as db:
            cursor = db.execute("INSERT INTO conversations(title, created_at, updated_at, settings) VALUES (?,?,?,?)",
                                (title, now, now, json.dumps(settings or {})))
        return self.conversation(cursor.lastrowid)

    def rename(self, conversation_id: int, title: str, by_user: bool = True) -> None:
        title = " ".join(title.split())[:200]
        self._change(conversation_id, title=title, title_by_user=int(by_user))

    def pin(self, conversation_id: int, pinned: bool) -> None:
        self._change(conversation_id, pinned=int(pinned))

    def set_settings(self, conversation_id: int, settings: dict) -> None:
        self._change(conversation_id, settings=json.dumps(settings))

    def delete(self, conversation_id: int) -> None:
        """Hide it; `restore` brings it back until the sweep."""
        self._change(conversation_id, deleted_at=time.time())

    def restore(self, conversation_id: int) -> None:
        self._change(conversation_id, deleted_at=None)

    def _change(self, conversation_id: int, **columns) -> None:
        names = ", ".join(f"{name}=?" for name in columns)
        with self._transaction() as db:
            db.execute(f"UPDATE conversations SET {names} WHERE id=?", (*columns.values(), conversation_id))

    def search(self, text: str, limit: int = 50) -> list[dict]:
        """Conversations whose title or messages contain the words: id, title and a snippet, best first."""
        words = [word.replace('"', "") for word in text.split()]
        words = [word for word in words if word]
        if not words:
            return []
        found = {row["id"]: dict(row) for row in self._rows(
            "SELECT id, title, '' AS snippet, NULL AS message_id FROM conversations "
            "WHERE deleted_at IS NULL AND title LIKE ? ESCAPE '\\' ORDER BY updated_at DESC LIMIT ?",
            f"%{_like(' '.join(words))}%", limit)}
        query = " ".join(f'"{word}"*' for word in words)
        for row in self._rows(
                "SELECT c.id, c.title, snippet(words, 0, '\x02', '\x03', '…', 12) AS snippet, m.id AS message_id "
                "FROM words JOIN messages m ON m.id = words.rowid JOIN conversations c ON c.id = m.conversation_id "
                "WHERE words MATCH ? AND c.deleted_at IS NULL ORDER BY rank LIMIT ?", query, 4 * limit):
            if not found.get(row["id"], {}).get("snippet"):
                found[row["id"]] = dict(row)
        return list(found.values())[:limit]

    # Messages

    def message(self, message_id: int) -> Message:
        rows = self._rows("SELECT * FROM messages WHERE id=?", message_id)
        if not rows:
            raise UserError("This message does not exist any more; reload the page.")
        return _message(rows[0])

    def path(self, conversation_id: int, leaf_id: int | None = None) -> list[Message]:
        """The shown version, oldest message first; with `leaf_id` the path that ends there."""
        leaf = self.conversation(conversation_id).leaf_id if leaf_id is None else leaf_id
        return [_message(row) for row in self._rows(
            "WITH RECURSIVE up(id, depth) AS (SELECT ?, 0 UNION ALL "
            "SELECT m.parent_id, depth + 1 FROM up JOIN messages m ON m.id = up.id WHERE m.parent_id IS NOT NULL) "
            "SELECT m.* FROM up JOIN messages m ON m.id = up.id WHERE m.conversation_id=? ORDER BY depth DESC",
            leaf, conversation_id)]

    def versions(self, conversation_id: int) -> dict[int, list[int]]:
        """For every message the ids of all messages beside it (itself included), oldest first."""
        beside: dict[int | None, list[int]] = {}
        rows = self._rows("SELECT id, parent_id FROM messages WHERE conversation_id=? ORDER BY id", conversation_id)
        for row in rows:
            beside.setdefault(row["parent_id"], []).append(row["id"])
        return {row["id"]: beside[row["parent_id"]] for row in rows}

    def add(self, conversation_id: int, parent_id: int | None, role: str, text: str = "", *, thinking: str = "",
            status: str = "done", stats: dict | None = None, attachments: list | None = None) -> Message:
        """One more message under `parent_id`; it becomes the shown one."""
        with self._transaction() as db:
            added = _add(db, conversation_id, parent_id, role, text, json.dumps(attachments or []), thinking, status,
                         json.dumps(stats or {}))
        return self.message(added)

    def save(self, message_id: int, *, text: str, thinking: str, status: str, stats: dict) -> None:
        """A checkpoint of an answer, or its end."""
        with self._transaction() as db:
            db.execute("UPDATE messages SET text=?, thinking=?, status=?, stats=? WHERE id=?",
                       (text, thinking, status, json.dumps(stats), message_id))

    def show(self, message_id: int) -> None:
        """Make this version the shown one, with the newest messages below it."""
        message = self.message(message_id)
        leaf = message_id
        while rows := self._rows("SELECT id FROM messages WHERE parent_id=? ORDER BY id DESC LIMIT 1", leaf):
            leaf = rows[0]["id"]
        self._change(message.conversation_id, leaf_id=leaf)

    def branch(self, message_id: int) -> Conversation:
        """A new conversation with copies of everything up to and with this message."""
        message = self.message(message_id)
        source = self.conversation(message.conversation_id)
        new = self.create(source.title, source.settings)
        parent = None
        for old in self.path(source.id, message_id):
            status = "interrupted" if old.status == "running" else old.status
            parent = self.add(new.id, parent, old.role, old.text, thinking=old.thinking, status=status,
                              stats=old.stats, attachments=old.attachments).id
        return self.conversation(new.id)

    # Messages that wait for the engine

    def waiting(self) -> list[dict]:
        return [dict(row) | {"attachments": json.loads(row["attachments"])} for row in self._rows(
            "SELECT w.* FROM waiting w JOIN conversations c ON c.id = w.conversation_id "
            "WHERE c.deleted_at IS NULL ORDER BY w.id")]

    def wait(self, conversation_id: int, text: str, attachments: list | None = None) -> int:
        with self._transaction() as db:
            return db.execute("INSERT INTO waiting(conversation_id, text, attachments, created_at) VALUES (?,?,?,?)",
                              (conversation_id, text, json.dumps(attachments or []), time.time())).lastrowid

    def take(self) -> Message | None:
        """The first message of the queue, moved into its conversation in one step: a kill leaves it in one of them."""
        with self._transaction() as db:
            row = db.execute(
                "DELETE FROM waiting WHERE id=(SELECT min(w.id) FROM waiting w JOIN conversations c ON "
                "c.id=w.conversation_id WHERE c.deleted_at IS NULL) RETURNING *").fetchone()
            if row is None:
                return None
            number = row["conversation_id"]
            leaf = db.execute("SELECT leaf_id FROM conversations WHERE id=?", (number,)).fetchone()["leaf_id"]
            taken = _add(db, number, leaf, "user", row["text"], row["attachments"])
        return self.message(taken)

    def unwait(self, waiting_id: int) -> dict | None:
        """Take a message out of the queue; None if it has left already."""
        with self._transaction() as db:
            row = db.execute("DELETE FROM waiting WHERE id=? RETURNING *", (waiting_id,)).fetchone()
        return dict(row) | {"attachments": json.loads(row["attachments"])} if row else None

    # Preferences of the page

    def preference(self, name: str, default=None):
        rows = self._rows("SELECT value FROM preferences WHERE name=?", name)
        return json.loads(rows[0]["value"]) if rows else default

    def set_preference(self, name: str, value) -> None:
        with self._transaction() as db:
            db.execute("INSERT INTO preferences VALUES (?,?) ON CONFLICT(name) DO UPDATE SET value=excluded.value",
                       (name, json.dumps(value)))


def _add(db: sqlite3.Connection, conversation_id: int, parent_id: int | None, role: str, text: str, attachments: str,
         thinking: str = "", status: str = "done", stats: str = "{}") -> int:
    """A message of a transaction, the shown one from now on; -> its id. attachments, stats: JSON."""
    now = time.time()
    added = db.execute("INSERT INTO messages(conversation_id, parent_id, role, text, attachments, thinking, status, "
                       "stats, created_at) VALUES (?,?,?,?,?,?,?,?,?)",
                       (conversation_id, parent_id, role, text, attachments, thinking, status, stats, now)).lastrowid
    db.execute("UPDATE conversations SET leaf_id=?, updated_at=? WHERE id=?", (added, now, conversation_id))
    return added


def _conversation(row: sqlite3.Row) -> Conversation:
    return Conversation(row["id"], row["title"], bool(row["title_by_user"]), row["created_at"], row["updated_at"],
                        bool(row["pinned"]), row["leaf_id"], json.loads(row["settings"]))


def _message(row: sqlite3.Row) -> Message:
    return Message(**{name: row[name] for name in row.keys() if name not in ("stats", "attachments")},
                   stats=json.loads(row["stats"]), attachments=json.loads(row["attachments"]))


def _like(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
