"""The run of first light: step after step until the time is up. Standard library alone, so that no card can stop it.

A step that fails does not stop the next, but the first one does: without a card there is nothing to say. What does not
fit into the time that is left is skipped, and said.
"""
from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.bench.first_light import findings
from engine.bench.first_light.process import Part
from engine.bench.first_light.record import Record, rows_of
from engine.bench.first_light.steps import FIRST, LEAST_REST, Step
from engine.bench.rows import CardTable, Row
from engine.core import MachineError, UserError

CHILD = "engine.bench.first_light.child"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What is asked for. table: a folder that keeps measurements by card."""

    folder: Path
    seconds: float
    steps: tuple[Step, ...]
    table: Path | None = None

    def __post_init__(self) -> None:
        if not LEAST_REST <= self.seconds <= 86_400:
            raise UserError(f"--seconds must be at least {LEAST_REST} and at most a day, not {self.seconds:g}.")


def run(wanted: Run, all_steps: tuple[Step, ...], report: Report) -> list[str]:
    """-> the table of this and earlier runs in the same folder. MachineError, one sentence, where there is no card."""
    record, end = Record(wanted.folder), time.monotonic() + wanted.seconds
    steps = list(wanted.steps)
    if FIRST not in {step.number for step in steps} and findings.gpu_of(rows_of(wanted.folder)) is None:
        steps.insert(0, all_steps[FIRST])
    try:
        with _stopped_by_signals():
            for step in steps:
                n_before = len(record.rows)
                ended = _step(step, end - time.monotonic(), record, report)
                _keep(record.rows[n_before:], wanted)
                if step.number == FIRST and not ended:
                    raise MachineError(findings.no_card(record.rows) or "The first step failed, so nothing else was "
                                       f"tried; read {wanted.folder / 'log.txt'}.")
    except KeyboardInterrupt:
        record.row({"outcome": "stopped by hand"})
        raise
    finally:
        lines = findings.table(findings.newest(rows_of(wanted.folder)), all_steps)
        record.table("\n".join(lines) + "\n")
    return lines


def _step(step: Step, left: float, record: Record, report: Report) -> bool:
    """-> whether all of it ended well."""
    known = {"step": step.number}
    if left < step.least_seconds:
        note = f"needs {step.least_seconds:g} s, {max(0, left):.0f} s were left"
        record.row(known | {"outcome": "skipped", "note": note})
        report(f"{step.number:2} {step.title}: skipped, {note}")
        return False
    seconds = min(left, step.seconds or left)
    report(f"{step.number:2} {step.title}: up to {seconds:.0f} s")
    record.log(f"=== {step.number} {step.title}\n".encode())
    rows = _together(step, seconds, record, known) if step.together else _in_turn(step, seconds, record, known)
    for row in rows:
        report(f"   {row['part']}: {row['outcome']} after {row['seconds']} s, {row['n_rows']} rows")
    return all(row["outcome"] == "ended" for row in rows)


def _together(step: Step, seconds: float, record: Record, known: Row) -> list[Row]:
    parts = []
    try:
        for name in step.parts:
            parts.append(_start(name, seconds, record, known))
        return [part.wait() for part in parts]
    finally:
        for part in parts:
            part.end()


def _in_turn(step: Step, seconds: float, record: Record, known: Row) -> list[Row]:
    """What one part leaves of its share is the others'."""
    rows, end = [], time.monotonic() + seconds
    for n_left, name in zip(range(len(step.parts), 0, -1), step.parts, strict=True):
        part = _start(name, (end - time.monotonic()) / n_left, record, known)
        try:
            rows.append(part.wait())
        finally:
            part.end()
    return rows


def _start(name: str, seconds: float, record: Record, known: Row) -> Part:
    return Part(name, ["-m", CHILD, name], seconds, record, known)


def _keep(rows: list[Row], wanted: Run) -> None:
    """What was measured, in the card's own table."""
    card = findings.gpu_of(rows) or findings.gpu_of(rows_of(wanted.folder))
    if wanted.table is None or card is None:
        return
    table = CardTable(wanted.table, str(card["gpu"]), {key: card.get(key) for key in ("torch", "cuda")})
    for row in rows:
        if "measured" in row or "verdict" in row:
            table.add(row)


@contextmanager
def _stopped_by_signals():
    """Inside, being told to end is like Ctrl+C: a child must not outlive the run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame) -> None:
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
