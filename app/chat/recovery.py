"""The chat database against damage: a backup every day, and a new database of all that can still be read.

A recovery begins with the newest backup, puts every row over it that the damaged file still gives, and keeps that file.
"""
from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

from app.chat.schema import copy_whole, is_damage, letters_again, open_database
from app.strings import TEXT
from engine import UserError

BACKUP_SECONDS = 24 * 3600
ROWS = 20_000  # looked for in a table that does not say how many it has
_TABLES = ("conversations", "messages", "waiting", "preferences")
_WHOLE_AGAIN = (
    "INSERT INTO conversations(id, created_at, updated_at) SELECT conversation_id, min(created_at), max(created_at) "
    "FROM messages WHERE conversation_id NOT IN (SELECT id FROM conversations) GROUP BY conversation_id",
    "UPDATE messages SET parent_id=(SELECT max(p.id) FROM messages p WHERE p.conversation_id=messages.conversation_id "
    "AND p.id<messages.id) WHERE parent_id NOT IN (SELECT id FROM messages)",
    "UPDATE conversations SET leaf_id=(SELECT max(id) FROM messages WHERE conversation_id=conversations.id) "
    "WHERE leaf_id IS NULL OR leaf_id NOT IN (SELECT id FROM messages)",
    "DELETE FROM waiting WHERE conversation_id NOT IN (SELECT id FROM conversations)",
    "INSERT INTO words(words) VALUES('rebuild')", *letters_again())


def newest_backup(path: Path) -> Path | None:
    """That of a day or of a migration."""
    return max(path.parent.glob(f"{path.name}*.backup"), key=lambda file: file.stat().st_mtime, default=None)


def back_up(path: Path) -> sqlite3.Error | None:
    """Copy the database beside itself, once a day; -> what is damaged in it."""
    target = path.with_name(f"{path.name}.backup")
    try:
        if not target.exists() or time.time() - target.stat().st_mtime > BACKUP_SECONDS:
            with closing(sqlite3.connect(path)) as db:
                if db.execute("SELECT 1 FROM messages LIMIT 1").fetchone():
                    copy_whole(db, target)
    except (sqlite3.Error, OSError) as error:
        return error if is_damage(error) else None  # a full disk: tried again later
    return None


def recover(path: Path, error: sqlite3.Error, even_empty: bool) -> Path:
    """A new database in place of a damaged one that nobody has open; -> where the damaged one is kept. UserError, and
    nothing is changed, where nothing can be read and that may not be."""
    kept = next(file for n in count(1) if not (file := path.with_name(f"{path.name}.damaged-{n}")).exists())
    part = path.with_name(f"{path.name}.part")
    for ending in ("", "-wal"):
        with suppress(FileNotFoundError):
            shutil.copyfile(f"{path}{ending}", f"{kept}{ending}")
    _lengthen(kept)
    begun = _begin(part, newest_backup(path))
    with closing(open_database(part)) as new, closing(sqlite3.connect(kept)) as old:
        found = _merge(new, old)
    if not found and not begun and not even_empty:
        part.unlink()
        kept.unlink()
        raise UserError(TEXT["database_lost"].format(path=path, error=error)) from error
    for ending in ("-wal", "-shm"):  # they belong to the damaged one
        Path(f"{path}{ending}").unlink(missing_ok=True)
    part.replace(path)
    return kept


def _lengthen(file: Path) -> None:
    """SQLite reads nothing of a file that is shorter than its first page says: what was cut off counts as zeros."""
    with open(file, "r+b") as opened:
        head, size = opened.read(32), file.stat().st_size
        wanted = int.from_bytes(head[16:18], "big") * int.from_bytes(head[28:32], "big")
        if size < wanted < 1000 * size:
            opened.truncate(wanted)


def _begin(part: Path, backup: Path | None) -> bool:
    """Whether there is a backup that opens; `part` is its copy then, else nothing."""
    for ending in ("", "-wal", "-shm"):
        Path(f"{part}{ending}").unlink(missing_ok=True)
    if backup is None:
        return False
    shutil.copyfile(backup, part)
    try:
        open_database(part).close()
    except (sqlite3.DatabaseError, UserError):
        part.unlink()
        return False
    return True


def _merge(new: sqlite3.Connection, old: sqlite3.Connection) -> int:
    """Put every row that can be read over those that are there; -> how many."""
    old.row_factory, old.text_factory = sqlite3.Row, new.text_factory
    found = 0
    new.execute("PRAGMA foreign_keys=OFF")
    new.execute("BEGIN")
    new.execute("DELETE FROM waiting")  # what waited then has its answer
    for table in _TABLES:
        known = {column["name"] for column in new.execute(f"PRAGMA table_info({table})")}
        for row in _readable(old, table):
            names = [name for name in row.keys() if name in known]
            with suppress(sqlite3.IntegrityError, OverflowError):
                new.execute(f"INSERT OR REPLACE INTO {table}({', '.join(names)}) "
                            f"VALUES ({', '.join('?' * len(names))})", [row[name] for name in names])
                found += 1
    for statement in _WHOLE_AGAIN:
        new.execute(statement)
    new.execute("COMMIT")
    return found


def _readable(old: sqlite3.Connection, table: str) -> Iterator[sqlite3.Row]:
    """One by one: a damaged page takes only its own rows along."""
    for number in range(1, _highest(old, table) + 1):
        with suppress(sqlite3.DatabaseError):
            yield from old.execute(f"SELECT * FROM {table} WHERE rowid=?", (number,)).fetchall()


def _highest(old: sqlite3.Connection, table: str) -> int:
    for query in (f"SELECT max(rowid) FROM {table}", f"SELECT seq FROM sqlite_sequence WHERE name='{table}'"):
        with suppress(sqlite3.DatabaseError, TypeError):  # nothing there, or nonsense
            return min(int(old.execute(query).fetchone()[0]), 1000 * ROWS)
    return ROWS
