"""Rows of what was measured: plain dictionaries, a line each, on the disk before the next one is measured. No torch."""
from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import sys
from pathlib import Path

Row = dict[str, object]


def append(path: Path, data: bytes) -> None:
    """To the end of a file and onto the disk: a machine that is lost a moment later has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def text(row: Row) -> str:
    """For people."""
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in row.items())


def say(row: Row) -> None:
    """To whoever reads standard output, a line, at once. ValueError for a number that JSON has no word for."""
    print(json.dumps(row, allow_nan=False), flush=True)


class CardTable:
    """`folder`/<card>.csv: rows with the date, the versions and the command that made them, newest last."""

    def __init__(self, folder: Path, gpu: str, versions: Row) -> None:
        self.path = folder / f"{gpu.lower().replace(' ', '-').replace('/', '-')}.csv"
        self._known = {"date": datetime.date.today().isoformat(), **versions, "system": platform.platform(),
                       "command": " ".join(["python -m engine", *sys.argv[1:]])}

    def add(self, row: Row) -> None:
        line = io.StringIO(newline="")
        csv.writer(line).writerow([f"{key}={value}" for key, value in (self._known | row).items()])
        append(self.path, line.getvalue().encode())
