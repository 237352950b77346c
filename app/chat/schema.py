"""The chat database's file: its tables, its version, and how an older file becomes a newer one.

The version is SQLite's own `user_version`, written from the first day. Each migration runs in one transaction, after a
whole copy of the file beside it (`chats.db.v1.backup`). A file from a newer version is refused, never guessed at.
A damaged one is for recovery.py.
WAL with synchronous=NORMAL: a killed process loses nothing that was committed.
"""
from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from app.strings import TEXT
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


# Scripts without blanks between words: Thai to Khmer, kana, ideographs, Hangul's compounds; for regular expressions and
# for SQLite's GLOB alike.
_LETTERS = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
            "\U00020000-\U0003ffff")
UNSPACED = re.compile(f"[{_LETTERS}]")
# Runs of three letters, of the messages that have such letters: any run inside a longer one is found.
_V2 = f"""
CREATE VIRTUAL TABLE letters USING fts5(text, content='messages', content_rowid='id', tokenize='trigram');
CREATE TRIGGER letters_in AFTER INSERT ON messages WHEN new.text GLOB '*[{_LETTERS}]*' BEGIN
    INSERT INTO letters(rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER letters_out AFTER DELETE ON messages WHEN old.text GLOB '*[{_LETTERS}]*' BEGIN
    INSERT INTO letters(letters, rowid, text) VALUES ('delete', old.id, old.text);
END;
CREATE TRIGGER letters_go AFTER UPDATE OF text ON messages WHEN old.text GLOB '*[{_LETTERS}]*' BEGIN
    INSERT INTO letters(letters, rowid, text) VALUES ('delete', old.id, old.text);
END;
CREATE TRIGGER letters_come AFTER UPDATE OF text ON messages WHEN new.text GLOB '*[{_LETTERS}]*' BEGIN
    INSERT INTO letters(rowid, text) VALUES (new.id, new.text);
END;
"""


def letters_again() -> tuple[str, str]:
    """Statements that make the index of runs anew."""
    return ("INSERT INTO letters(letters) VALUES('delete-all')",
            f"INSERT INTO letters(rowid, text) SELECT id, text FROM messages WHERE text GLOB '*[{_LETTERS}]*'")


def _version_2(db: sqlite3.Connection) -> None:
    _run(db, _V2)
    db.execute(letters_again()[1])


# Which experts the answers took of the model that wrote last (engine.Picks); lost, it is made anew by the next ones.
_V3 = """
CREATE TABLE picks (
    conversation_id INTEGER PRIMARY KEY REFERENCES conversations(id) ON DELETE CASCADE,
    model TEXT NOT NULL,
    packed BLOB NOT NULL
);
"""


def _version_3(db: sqlite3.Connection) -> None:
    _run(db, _V3)


MIGRATIONS = [_version_1, _version_2, _version_3]


def open_database(path: Path, migrations: list | None = None) -> sqlite3.Connection:
    """The open database at the newest version; UserError if it is newer than this program or cannot be written,
    DatabaseError if it is damaged."""
    db = None
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        db.row_factory = sqlite3.Row
        db.text_factory = lambda raw: raw.decode("utf-8", "replace")  # one damaged letter harms nothing else
        db.execute("PRAGMA page_size=8192")  # of a new file: all tables are named on its first page, none on another
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("PRAGMA foreign_keys=ON")
        _migrate(db, path, MIGRATIONS if migrations is None else migrations)
    except (sqlite3.Error, UserError) as error:
        if db:
            db.close()
        if isinstance(error, sqlite3.OperationalError):
            raise UserError(TEXT["database_unusable"].format(path=path, error=error)) from error
        raise
    return db


def _migrate(db: sqlite3.Connection, path: Path, migrations: list) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(migrations):
        raise UserError(TEXT["database_newer"].format(path=path, version=version, known=len(migrations)))
    for number in range(version + 1, len(migrations) + 1):
        if version:  # a new file has nothing to lose
            copy_whole(db, path.with_name(f"{path.name}.v{number - 1}.backup"))
        db.execute("BEGIN IMMEDIATE")
        try:
            migrations[number - 1](db)
            db.execute(f"PRAGMA user_version={number}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise


class Damaged(sqlite3.DatabaseError):
    """What a whole look at a database has found."""


def is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, Damaged) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def copy_whole(db: sqlite3.Connection, target: Path) -> None:
    """One file with all of it, in place of an older copy; Damaged, and no new copy, where something is wrong."""
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    with closing(sqlite3.connect(part)) as copy:
        db.backup(copy)
        found = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        part.unlink()
        raise Damaged(found)
    part.replace(target)


def _run(db: sqlite3.Connection, script: str) -> None:
    """Every statement of a script inside the caller's transaction (executescript would commit it)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if statement.strip() and sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
