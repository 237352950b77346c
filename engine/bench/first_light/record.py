"""What first light leaves in its folder: rows.jsonl, log.txt and table.txt, never more than 8 files and 16 MB.

Standard library alone. A row is one JSON object a line, on the disk before the next. Both readers of every child write
here, so it is behind a lock.
"""
from __future__ import annotations

import datetime
import json
import threading
import time
from pathlib import Path

from engine.bench.rows import Row, append
from engine.core import UserError

MOST_FILES, MOST_BYTES = 8, 16 << 20
PART_BYTES = 1 << 20        # rows and log of one process
PARENTS_BYTES = 1 << 20     # kept for what the parent itself has to say
ROWS, LOG, TABLE = "rows.jsonl", "log.txt", "table.txt"


class Record:
    """One run's writing. What earlier runs left in the folder stays and counts."""

    def __init__(self, folder: Path) -> None:
        """UserError for a folder that has no room for it."""
        self.folder, self.rows, self._lock = folder, [], threading.Lock()
        self._start, self._run = time.monotonic(), datetime.datetime.now().isoformat(timespec="microseconds")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = [path for path in folder.rglob("*") if path.is_file()]
            self._used = sum(path.stat().st_size for path in files)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from error
        others = [path for path in files if path.name not in (ROWS, LOG, TABLE)]
        if len(others) + 3 > MOST_FILES or self.left <= 0:
            raise UserError(f"{folder} is full (8 files and 16 MB are the most); choose another --out.")

    @property
    def left(self) -> int:
        """Bytes that children may still write."""
        return MOST_BYTES - PARENTS_BYTES - self._used

    def row(self, row: Row) -> int:
        """Keep a row, with the run and the second it came in -> its bytes."""
        row = {"run": self._run, "at": round(time.monotonic() - self._start, 2)} | row
        data = json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock:
            self.rows.append(row)
            self._used += len(data)
            append(self.folder / ROWS, data)
        return len(data)

    def log(self, data: bytes) -> None:
        with self._lock:
            self._used += len(data)
            append(self.folder / LOG, data)

    def table(self, text: str) -> None:
        """In place of the last one."""
        (self.folder / TABLE).write_text(text, encoding="utf-8")


def rows_of(folder: Path) -> list[Row]:
    """All rows that are whole, oldest first: the last one may have been cut off."""
    try:
        lines = (folder / ROWS).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [row for row in map(row_in, lines) if row is not None]


def row_in(line: bytes) -> Row | None:
    """The row that a line of a child's output is, or None."""
    if not line.startswith(b"{"):
        return None
    try:
        row = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")
