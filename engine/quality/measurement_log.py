"""What a calibration has measured so far, a line a document, so that one that was stopped or killed goes on from there.

The lines belong to one subject (this model, these documents, this device); those about another are thrown away, and so
is a last line that was not finished. Numbers come back with all their bits, so the end is that of one that never
stopped. Knows neither models nor torch.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

NOTED = ".calibrating.jsonl"  # in the model's folder, until its calibration has ended


def forget(folder: Path) -> None:
    """Throw away what is noted in the folder of a model."""
    (folder / NOTED).unlink(missing_ok=True)


class Noted:
    """{(plan, text, document): (loss, divergence)} of one folder; plans are told apart by their repr."""

    def __init__(self, folder: Path, subject: str) -> None:
        self._path, self._known = folder / NOTED, {}
        path = self._path
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        if lines and lines[0] == subject:
            self._known = dict(pair for line in lines[1:] if (pair := _read(line)))
        path.write_text("\n".join([subject, *map(_line, self._known.items())]) + "\n", encoding="utf-8")

    def get(self, plan: object, text: int, document: int) -> tuple[float, float] | None:
        return self._known.get(_key(plan, text, document))

    def put(self, plan: object, text: int, document: int, measured: tuple[float, float]) -> None:
        key = _key(plan, text, document)
        self._known[key] = measured
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line((key, measured)) + "\n")


def _key(plan: object, text: int, document: int) -> str:
    return f"{hashlib.sha256(repr(plan).encode()).hexdigest()[:24]} {text} {document}"


def _line(pair: tuple[str, tuple[float, float]]) -> str:
    return json.dumps([pair[0], *pair[1]])


def _read(line: str) -> tuple[str, tuple[float, float]] | None:
    try:
        key, loss, divergence = json.loads(line)
        return str(key), (float(loss), float(divergence))
    except (ValueError, TypeError):
        return None
