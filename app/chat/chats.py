"""Conversations, kept in SQLite so that a reload, a second tab or a crash loses nothing.

Messages form a tree: a regenerated answer or an edited question is one more child of the same parent, and the
conversation's `leaf_id` says which version is shown. Deleting only marks; a mark older than a week is swept at start.
One connection behind one lock: every method may be called from any thread. Where the file turns out to be damaged, all
that can be read of it is put into a new one, and the work goes on. A row that holds nonsense harms no other.
"""
from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from app.chat.recovery import back_up, recover
from app.chat.schema import is_damage, open_database
from app.incoming import TITLE_CHARACTERS
from app.strings import TEXT
from engine import UserError

ROLES = ("user", "assistant")
STATUSES = ("running", "done", "length", "stopped", "error", "interrupted")
UNDO_SECONDS = 7 * 24 * 3600
SEARCHED = 32  # words: each is looked up by its beginning
LOOK_SECONDS = 3600  # whether a backup is due
_STATS_IN_WORDS = ("model", "level", "server", "error")  # the others are numbers
T = TypeVar("T")
_log = logging.getLogger(__name__)


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
        self.mended = ""  # what a person has to know of a recovery
        self._lock, self._copying, self._closed = threading.RLock(), threading.Lock(), threading.Event()
        self._db: sqlite3.Connection | None = None
        self._begun = False
        self._rows("UPDATE messages SET status='interrupted' WHERE status='running'")  # when the last process ended
        self._rows("DELETE FROM conversations WHERE deleted_at < ?", time.time() - UNDO_SECONDS)
        self._begun = True
        self._backups = threading.Thread(target=self._back_up, name="backups", daemon=True)
        self._backups.start()

    def close(self) -> None:
        self._closed.set()
        self._backups.join()
        with self._lock:
            if self._db:
                self._db.close()

    def _back_up(self) -> None:
        while True:
            with self._copying:
                known, error = self.mended, back_up(self.file)
            with self._lock, suppress(sqlite3.Error, UserError, OSError):  # who needs what is lost is told then
                if error and self.mended == known:
                    self._mend(error)
            if self._closed.wait(LOOK_SECONDS):
                return

    def _mend(self, error: sqlite3.DatabaseError) -> None:
        """A new file with what can be read; what is no damage is raised again."""
        if not is_damage(error):
            raise error
        if self._db:
            self._db.close()
        self._db = None
        try:
            with self._copying:
                kept = recover(self.file, error, even_empty=self._begun)
        except (sqlite3.Error, OSError) as trouble:
            raise UserError(TEXT["database_unusable"].format(path=self.file, error=trouble)) from trouble
        self.mended = TEXT["database_mended"].format(kept=kept)
        _log.warning(self.mended)

    def _open(self) -> sqlite3.Connection:
        self._db = self._db or open_database(self.file)
        return self._db

    def _alone(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """No other thread meanwhile; once more where the database had to be mended."""
        with self._lock:
            try:
                return work(self._open())
            except sqlite3.DatabaseError as error:
                self._mend(error)
                return work(self._open())

    def _rows(self, query: str, *values) -> list[sqlite3.Row]:
        return self._alone(lambda db: db.execute(query, values).fetchall())

    def _together(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """All of `work`, or nothing of it."""
        def whole(db: sqlite3.Connection) -> T:
            db.execute("BEGIN IMMEDIATE")
            try:
                done = work(db)
                db.execute("COMMIT")
                return done
            except BaseException:
                if db.in_transaction:  # a full disk may have rolled back already
                    db.execute("ROLLBACK")
                raise
        return self._alone(whole)

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
        return self.conversation(self._rows(
            "INSERT INTO conversations(title, created_at, updated_at, settings) VALUES (?,?,?,?) RETURNING id",
            _one_line(title), now, now, json.dumps(settings or {}))[0]["id"])

    def rename(self, conversation_id: int, title: str, by_user: bool = True) -> None:
        self._change(conversation_id, title=_one_line(title), title_by_user=int(by_user))

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
        self._rows(f"UPDATE conversations SET {names} WHERE id=?", *columns.values(), conversation_id)

    def search(self, text: str, limit: int = 50) -> list[dict]:
        """Conversations whose title or messages contain the words: id, title and a snippet, best first."""
        words = list(dict.fromkeys(text.replace('"', "").replace("\0", " ").split()))[:SEARCHED]
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

    def messages(self, conversation_id: int) -> list[Message]:
        """All versions, each below one that comes before it."""
        return [_message(row) for row in self._rows(
            "SELECT * FROM messages WHERE conversation_id=? ORDER BY id", conversation_id)]

    def path(self, conversation_id: int, leaf_id: int | None = None) -> list[Message]:
        """The shown version, oldest message first; with `leaf_id` the path that ends there."""
        leaf = self.conversation(conversation_id).leaf_id if leaf_id is None else leaf_id
        return [_message(row) for row in self._rows(  # a parent is older than its child: no circle can be gone round
            "WITH RECURSIVE up(id) AS (SELECT ? UNION ALL "
            "SELECT m.parent_id FROM up JOIN messages m ON m.id = up.id WHERE m.parent_id < m.id) "
            "SELECT m.* FROM up JOIN messages m ON m.id = up.id WHERE m.conversation_id=? ORDER BY m.id",
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
        new = Message(0, conversation_id, parent_id, role, text, thinking, status, time.time(), stats or {},
                      attachments or [])
        return self.message(self._together(lambda db: _add(db, new)))

    def save(self, message_id: int, *, text: str, thinking: str, status: str, stats: dict) -> None:
        """A checkpoint of an answer, or its end."""
        self._rows("UPDATE messages SET text=?, thinking=?, status=?, stats=? WHERE id=?",
                   text, thinking, status, json.dumps(stats), message_id)

    def show(self, message_id: int) -> None:
        """Make this version the shown one, with the newest messages below it."""
        message = self.message(message_id)
        leaf = message_id
        while rows := self._rows("SELECT max(id) AS id FROM messages WHERE parent_id=? AND id>parent_id GROUP BY "
                                 "parent_id", leaf):
            leaf = rows[0]["id"]
        self._change(message.conversation_id, leaf_id=leaf)

    def branch(self, message_id: int) -> Conversation:
        """A new conversation with copies of everything up to and with this message."""
        message = self.message(message_id)
        source = self.conversation(message.conversation_id)
        named = TEXT["branch_title"].format(title=source.title.removeprefix(TEXT["branch_title"].format(title="")))
        return self.bring_in([(replace(source, title=named, leaf_id=None, pinned=False),
                               self.path(source.id, message_id))])[0]

    def bring_in(self, copies: list[tuple[Conversation, list[Message]]]) -> list[Conversation]:
        """New conversations like these, all or none. Ids only say how messages hang together; where leaf_id is among
        them, that version is shown, else the newest."""
        def insert(db: sqlite3.Connection) -> list[int]:
            return [_insert(db, conversation, messages) for conversation, messages in copies]
        return [self.conversation(number) for number in self._together(insert)]

    # Messages that wait for the engine

    def waiting(self) -> list[dict]:
        return [_waiting(row) for row in self._rows(
            "SELECT w.* FROM waiting w JOIN conversations c ON c.id = w.conversation_id "
            "WHERE c.deleted_at IS NULL ORDER BY w.id")]

    def wait(self, conversation_id: int, text: str, attachments: list | None = None) -> int:
        return self._rows("INSERT INTO waiting(conversation_id, text, attachments, created_at) VALUES (?,?,?,?) "
                          "RETURNING id", conversation_id, text, json.dumps(attachments or []), time.time())[0]["id"]

    def take(self) -> Message | None:
        """The first message of the queue, moved into its conversation in one step: a kill leaves it in one of them."""
        taken = self._together(_take)
        return taken and self.message(taken)

    def unwait(self, waiting_id: int) -> dict | None:
        """Take a message out of the queue; None if it has left already."""
        rows = self._rows("DELETE FROM waiting WHERE id=? RETURNING *", waiting_id)
        return _waiting(rows[0]) if rows else None

    # Preferences of the page

    def preference(self, name: str, default: T) -> T:
        """What is kept under a name; the default where there is nothing, or something of another kind."""
        rows = self._rows("SELECT value FROM preferences WHERE name=?", name)
        return _json(rows[0]["value"], default) if rows else default

    def set_preference(self, name: str, value) -> None:
        self._rows("INSERT INTO preferences VALUES (?,?) ON CONFLICT(name) DO UPDATE SET value=excluded.value",
                   name, json.dumps(value))


def usable_stats(stats: dict) -> dict:
    """Those that the page can show."""
    return {name: value for name, value in stats.items() if name in _STATS_IN_WORDS and isinstance(value, str)
            or name not in _STATS_IN_WORDS and _is_number(value)}


def _add(db: sqlite3.Connection, message: Message) -> int:
    """A message of a transaction, with an id of its own, the shown one from now on; -> its id."""
    added = db.execute(
        "INSERT INTO messages(conversation_id, parent_id, role, text, thinking, status, created_at, stats, "
        "attachments) VALUES (?,?,?,?,?,?,?,?,?)",
        (message.conversation_id, message.parent_id, message.role, message.text, message.thinking, message.status,
         message.created_at, json.dumps(message.stats), json.dumps(message.attachments))).lastrowid
    db.execute("UPDATE conversations SET leaf_id=?, updated_at=? WHERE id=?",
               (added, time.time(), message.conversation_id))
    return added


def _take(db: sqlite3.Connection) -> int | None:
    rows = db.execute("DELETE FROM waiting WHERE id=(SELECT min(w.id) FROM waiting w JOIN conversations c ON "
                      "c.id=w.conversation_id WHERE c.deleted_at IS NULL) RETURNING *").fetchall()
    for row in rows:
        number = row["conversation_id"]
        leaf = db.execute("SELECT leaf_id FROM conversations WHERE id=?", (number,)).fetchone()["leaf_id"]
        return _add(db, Message(0, number, leaf, "user", str(row["text"]), "", "done", time.time(), {},
                                _attachments(row)))
    return None


def _insert(db: sqlite3.Connection, source: Conversation, messages: list[Message]) -> int:
    """A conversation of a transaction; -> its id."""
    now = time.time()
    number = db.execute("INSERT INTO conversations(title, created_at, updated_at, pinned, settings) VALUES (?,?,?,?,?)",
                        (_one_line(source.title), now, now, int(source.pinned), json.dumps(source.settings))).lastrowid
    ids: dict[int, int] = {}
    for message in messages:
        ids[message.id] = _add(db, replace(
            message, conversation_id=number, parent_id=ids.get(message.parent_id),
            status="interrupted" if message.status == "running" else message.status))
    if source.leaf_id in ids:
        db.execute("UPDATE conversations SET leaf_id=? WHERE id=?", (ids[source.leaf_id], number))
    return number


# What stands in a row may be of any kind: another program, an older import or a damaged page may have written it.

def _conversation(row: sqlite3.Row) -> Conversation:
    leaf = row["leaf_id"]
    return Conversation(row["id"], _one_line(str(row["title"])), bool(row["title_by_user"]), _time(row["created_at"]),
                        _time(row["updated_at"]), bool(row["pinned"]), leaf if isinstance(leaf, int) else None,
                        _json(row["settings"], {}))


def _message(row: sqlite3.Row) -> Message:
    role, status = row["role"], row["status"]
    return Message(row["id"], row["conversation_id"], row["parent_id"], role if role in ROLES else "assistant",
                   str(row["text"]), str(row["thinking"]), status if status in STATUSES else "interrupted",
                   _time(row["created_at"]), usable_stats(_json(row["stats"], {})), _attachments(row))


def _waiting(row: sqlite3.Row) -> dict:
    return dict(row) | {"text": str(row["text"]), "attachments": _attachments(row)}


def _attachments(row: sqlite3.Row) -> list[dict]:
    return [file for file in _json(row["attachments"], [])
            if isinstance(file, dict) and all(isinstance(file.get(name), str) for name in ("name", "text"))]


def _json(text: object, default: T) -> T:
    with suppress(ValueError, TypeError, RecursionError):
        found = json.loads(text, parse_constant=lambda name: None)
        return found if isinstance(found, type(default)) else default
    return default


def _time(value: object) -> float:
    return float(value) if _is_number(value) else 0.0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and -1e300 < value < 1e300  # neither NaN nor a number of a thousand digits


def _one_line(title: str) -> str:
    return " ".join(title[:10 * TITLE_CHARACTERS].split())[:TITLE_CHARACTERS]


def _like(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
