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
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from app.chat.copies import grow, insert, there_already
from app.chat.recovery import back_up, recover
from app.chat.rows import (
    Conversation,
    Message,
    add,
    attachments_of,
    conversation_of,
    json_of,
    like,
    message_of,
    one_line,
    snippet,
    waiting_of,
)
from app.chat.schema import UNSPACED, is_damage, open_database
from app.incoming import whole_letters
from app.strings import TEXT
from engine import UserError

UNDO_SECONDS = 7 * 24 * 3600
SEARCHED = 32  # words: each is looked up by its beginning
RUN = 3  # letters that the index of runs is made of
LOOK_SECONDS = 3600  # whether a backup is due
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TakenIn:
    """What an import has brought. grown: conversations that were here, and have more messages now; known: that were
    here as they are."""

    made: list[Conversation]
    grown: list[Conversation]
    known: int


class Chats:
    """All conversations of one data folder. Times are seconds since 1970."""

    def __init__(self, file: Path):
        self.file = file
        self.mended = ""  # what a person has to know of a recovery
        self.taking_in: float | None = None  # the share of a file under way that has been imported
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
        return [conversation_of(row) for row in self._rows(
            "SELECT * FROM conversations WHERE deleted_at IS NULL ORDER BY pinned DESC, updated_at DESC, id DESC")]

    def conversation(self, conversation_id: int) -> Conversation:
        rows = self._rows("SELECT * FROM conversations WHERE id=? AND deleted_at IS NULL", conversation_id)
        if not rows:
            raise UserError("This conversation does not exist any more; choose another from the list.")
        return conversation_of(rows[0])

    def create(self, title: str = "", settings: dict | None = None) -> Conversation:
        now = time.time()
        return self.conversation(self._rows(
            "INSERT INTO conversations(title, created_at, updated_at, settings) VALUES (?,?,?,?) RETURNING id",
            one_line(title), now, now, json.dumps(settings or {}))[0]["id"])

    def rename(self, conversation_id: int, title: str, by_user: bool = True) -> None:
        self._change(conversation_id, title=one_line(title), title_by_user=int(by_user))

    def pin(self, conversation_id: int, pinned: bool) -> None:
        self._change(conversation_id, pinned=int(pinned))

    def set_settings(self, conversation_id: int, settings: dict) -> None:
        self._change(conversation_id, settings=json.dumps(settings))

    def picks(self, conversation_id: int) -> tuple[str, object]:
        """The model and the packed engine.Picks that were kept; ("", None) where nothing was."""
        rows = self._rows("SELECT model, packed FROM picks WHERE conversation_id=?", conversation_id)
        return (rows[0]["model"], rows[0]["packed"]) if rows else ("", None)

    def keep_picks(self, conversation_id: int, model: str, packed: bytes) -> None:
        self._rows("INSERT OR REPLACE INTO picks(conversation_id, model, packed) VALUES (?,?,?)",
                   conversation_id, model, packed)

    def delete(self, conversation_id: int) -> None:
        """Hide it; `restore` brings it back until the sweep."""
        self._change(conversation_id, deleted_at=time.time())

    def restore(self, conversation_id: int) -> None:
        self._change(conversation_id, deleted_at=None)

    def _change(self, conversation_id: int, **columns) -> None:
        names = ", ".join(f"{name}=?" for name in columns)
        self._rows(f"UPDATE conversations SET {names} WHERE id=?", *columns.values(), conversation_id)

    def search(self, text: str, limit: int = 50) -> list[dict]:
        """Conversations whose title or messages contain the words: id, title and a snippet, best first. Where a script
        has no blanks between its words, any run of its letters is a word."""
        words = list(dict.fromkeys(whole_letters(text).replace('"', "").replace("\0", " ").split()))[:SEARCHED]
        if not words:
            return []
        found = {row["id"]: dict(row) for row in self._rows(
            "SELECT id, title, '' AS snippet, NULL AS message_id FROM conversations "
            "WHERE deleted_at IS NULL AND title LIKE ? ESCAPE '\\' ORDER BY updated_at DESC LIMIT ?",
            f"%{like(' '.join(words))}%", limit)}
        inside = self._runs if UNSPACED.search(text) else self._words
        for row in inside(words, 4 * limit):
            if not found.get(row["id"], {}).get("snippet"):
                found[row["id"]] = row
        return list(found.values())[:limit]

    def _words(self, words: list[str], limit: int) -> list[dict]:
        query = " ".join(f'"{word}"*' for word in words)
        return [dict(row) for row in self._rows(
            "SELECT c.id, c.title, snippet(words, 0, '\x02', '\x03', '…', 12) AS snippet, m.id AS message_id "
            "FROM words JOIN messages m ON m.id = words.rowid JOIN conversations c ON c.id = m.conversation_id "
            "WHERE words MATCH ? AND c.deleted_at IS NULL ORDER BY rank LIMIT ?", query, limit)]

    def _runs(self, words: list[str], limit: int) -> list[dict]:
        """Of three letters and more from their index; of fewer from the texts themselves."""
        long = [word for word in words if len(word) >= RUN and UNSPACED.search(word)]
        first = "m.id IN (SELECT rowid FROM letters WHERE letters MATCH ?) AND " if long else ""
        rows = self._rows(
            f"SELECT c.id, c.title, m.text AS text, m.id AS message_id FROM messages m JOIN conversations c ON "
            f"c.id = m.conversation_id WHERE {first}c.deleted_at IS NULL"
            + " AND m.text LIKE ? ESCAPE '\\'" * len(words) + " ORDER BY m.id DESC LIMIT ?",
            *([" AND ".join(f'"{word}"' for word in long)] if long else []),
            *(f"%{like(word)}%" for word in words), limit)
        return [{"id": row["id"], "title": row["title"], "snippet": snippet(str(row["text"]), words),
                 "message_id": row["message_id"]} for row in rows]

    # Messages

    def message(self, message_id: int) -> Message:
        rows = self._rows("SELECT * FROM messages WHERE id=?", message_id)
        if not rows:
            raise UserError("This message does not exist any more; reload the page.")
        return message_of(rows[0])

    def messages(self, conversation_id: int) -> list[Message]:
        """All versions, each below one that comes before it."""
        return [message_of(row) for row in self._rows(
            "SELECT * FROM messages WHERE conversation_id=? ORDER BY id", conversation_id)]

    def path(self, conversation_id: int, leaf_id: int | None = None) -> list[Message]:
        """The shown version, oldest message first; with `leaf_id` the path that ends there."""
        leaf = self.conversation(conversation_id).leaf_id if leaf_id is None else leaf_id
        return [message_of(row) for row in self._rows(  # a parent is older than its child: no circle can be gone round
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
        return self.message(self._together(lambda db: add(db, new)))

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
        now = time.time()
        copy = replace(source, title=named, leaf_id=None, pinned=False, created_at=now,
                       updated_at=now)
        path = self.path(source.id, message_id)
        return self.conversation(self._together(lambda db: insert(db, copy, path)))

    def take_in(self, copies: Iterable[tuple[Conversation, list[Message]]]) -> TakenIn:
        """Conversations from a file, all or none, however many: hidden until the last of them is there. Ids only say
        how messages hang together; where leaf_id is among them, that version is shown, else the newest."""
        stamp, made, more, known = time.time(), [], [], set()

        def one(copy: tuple[Conversation, list[Message]], db: sqlite3.Connection) -> None:
            number, whole = there_already(db, *copy, stamp)
            if number is None:
                made.append(insert(db, *copy, hidden=stamp))
            elif whole:
                known.add(number)
            else:
                more.append((number, *copy))
        try:
            for copy in copies:
                self._together(partial(one, copy))
            self._together(lambda db: self._appear(db, stamp, more))
        except BaseException:
            self._rows("DELETE FROM conversations WHERE deleted_at=?", stamp)
            raise
        new, grown = set(made), dict.fromkeys(number for number, *_ in more)
        return TakenIn([self.conversation(number) for number in made],
                       [self.conversation(number) for number in grown if number not in new],
                       len(known - new - grown.keys()))

    @staticmethod
    def _appear(db: sqlite3.Connection, stamp: float, more: list[tuple]) -> None:
        for number, source, messages in more:
            grow(db, number, source, messages)
        db.execute("UPDATE conversations SET deleted_at=NULL WHERE deleted_at=?", (stamp,))

    # Messages that wait for the engine

    def waiting(self) -> list[dict]:
        return [waiting_of(row) for row in self._rows(
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
        return waiting_of(rows[0]) if rows else None

    # Preferences of the page

    def preference(self, name: str, default: T) -> T:
        """What is kept under a name; the default where there is nothing, or something of another kind."""
        rows = self._rows("SELECT value FROM preferences WHERE name=?", name)
        return json_of(rows[0]["value"], default) if rows else default

    def set_preference(self, name: str, value) -> None:
        self._rows("INSERT INTO preferences VALUES (?,?) ON CONFLICT(name) DO UPDATE SET value=excluded.value",
                   name, json.dumps(value))


def _take(db: sqlite3.Connection) -> int | None:
    rows = db.execute("DELETE FROM waiting WHERE id=(SELECT min(w.id) FROM waiting w JOIN conversations c ON "
                      "c.id=w.conversation_id WHERE c.deleted_at IS NULL) RETURNING *").fetchall()
    for row in rows:
        number = row["conversation_id"]
        leaf = db.execute("SELECT leaf_id FROM conversations WHERE id=?", (number,)).fetchone()["leaf_id"]
        return add(db, Message(0, number, leaf, "user", str(row["text"]), "", "done", time.time(), {},
                                attachments_of(row)))
    return None
