"""The chat database's file: its tables, its version, and how an older file becomes a newer one.

The version is SQLite's own `user_version`, written from the first day. Each migration runs in one transaction, after a
whole copy of the file beside it (`chats.db.v1.backup`). A file from a newer version is refused, never guessed at.
WAL with synchronous=NORMAL: a killed process loses nothing that was committed.
"""
from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from engine import UserError

_V1 = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL DEFAULT '',
    title_by_user INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0,
    deleted_at REAL,
    leaf_id INTEGER,                          -- newest message of the version that is shown
    settings TEXT NOT NULL DEFAULT '{}'       -- system prompt, sampling, thinking, context policy
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,     -- never reused: a live answer is known by it
    conversation_id INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    parent_id INTEGER REFERENCES messages(id) ON DELETE CASCADE,
    role TEXT NOT NULL,
    text TEXT NOT NULL DEFAULT '',
    thinking TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT 'done',
    created_at REAL NOT NULL,
    stats TEXT NOT NULL DEFAULT '{}',
    attachments TEXT NOT NULL DEFAULT '[]'
);
CREATE INDEX messages_by_conversation ON messages(conversation_id, parent_id);
CREATE TABLE waiting (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    text TEXT NOT NULL,
    attachments TEXT NOT NULL DEFAULT '[]',
    created_at REAL NOT NULL
);
CREATE TABLE preferences (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE VIRTUAL TABLE words USING fts5(text, content='messages', content_rowid='id', tokenize='unicode61');
CREATE TRIGGER words_in AFTER INSERT ON messages BEGIN
    INSERT INTO words(rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER words_out AFTER DELETE ON messages BEGIN
    INSERT INTO words(words, rowid, text) VALUES ('delete', old.id, old.text);
END;
CREATE TRIGGER words_change AFTER UPDATE OF text ON messages BEGIN
    INSERT INTO words(words, rowid, text) VALUES ('delete', old.id, old.text);
    INSERT INTO words(rowid, text) VALUES (new.id, new.text);
END;
"""


def _version_1(db: sqlite3.Connection) -> None:
    _run(db, _V1)


MIGRATIONS = [_version_1]


def open_database(path: Path, migrations: list | None = None) -> sqlite3.Connection:
    """The open database at the newest version; UserError if it is damaged, newer than this program, or unwritable."""
    migrations = MIGRATIONS if migrations is None else migrations
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("PRAGMA foreign_keys=ON")
        _migrate(db, path, migrations)
    except sqlite3.DatabaseError as error:
        raise UserError(f"The chat database {path} cannot be opened ({error}); move it away to start with an empty "
                        "one, or put its newest .backup file in its place.") from error
    return db


def _migrate(db: sqlite3.Connection, path: Path, migrations: list) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(migrations):
        raise UserError(f"The chat database {path} was written by a newer Floe Chat (version {version}; this one knows "
                        f"{len(migrations)}): update Floe Chat.")
    for number in range(version + 1, len(migrations) + 1):
        if number > 1:
            _backup(db, path.with_name(f"{path.name}.v{number - 1}.backup"))
        db.execute("BEGIN IMMEDIATE")
        try:
            migrations[number - 1](db)
            db.execute(f"PRAGMA user_version={number}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise


def _backup(db: sqlite3.Connection, target: Path) -> None:
    part = target.with_suffix(".part")
    with closing(sqlite3.connect(part)) as copy:
        db.backup(copy)
    part.replace(target)


def _run(db: sqlite3.Connection, script: str) -> None:
    """Every statement of a script inside the caller's transaction (executescript would commit it)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if statement.strip() and sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
