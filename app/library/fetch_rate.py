"""How fast models have come to this computer: the bytes of the last downloads over the seconds that they took.

A model counts as it is used, so the seconds are those of the whole work, compressing while it arrives included. Kept in
the data folder's cache. While nothing has been measured, nothing is promised.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from engine import Progress

KEPT = 5  # downloads
LEAST_BYTES = 1 << 20  # fewer say more of the wait for an answer than of the connection
LEAST_SECONDS = 0.05
Report = Callable[[Progress], None]


class FetchRate:
    """memory: the file of what was measured. May be called from any thread."""

    def __init__(self, memory: Path, clock: Callable[[], float] = time.monotonic):
        self._memory, self._clock = memory, clock

    def bytes_per_second(self) -> float | None:
        """None before anything was measured."""
        rows = self._read()
        return sum(n_bytes for n_bytes, _ in rows) / sum(seconds for _, seconds in rows) if rows else None

    def timed(self, work: Callable[[Report], object], report: Report) -> object:
        """What `work` returns; what has arrived while it ran is noted, however it ended."""
        marks: list[tuple[float, int]] = []  # when bytes were heard of first and last, and how many were there

        def heard(progress: Progress) -> None:
            if progress.total_bytes > 1:  # else it is a sentence about what has not begun
                marks[1:] = [(self._clock(), progress.done_bytes)]
            report(progress)
        try:
            return work(heard)
        finally:
            if marks:
                self._note(marks[-1][1] - marks[0][1], marks[-1][0] - marks[0][0])

    def _note(self, n_bytes: int, seconds: float) -> None:
        if n_bytes < LEAST_BYTES or seconds < LEAST_SECONDS:
            return
        try:
            self._memory.write_text(json.dumps([*self._read(), (n_bytes, round(seconds, 3))][-KEPT:]))
        except OSError:
            pass  # costs a forecast, nothing else

    def _read(self) -> list[tuple[int, float]]:
        try:
            rows = [(int(n_bytes), float(seconds)) for n_bytes, seconds in json.loads(self._memory.read_text())]
        except (OSError, ValueError, TypeError, OverflowError, RecursionError):
            return []
        return [row for row in rows if row[0] > 0 and LEAST_SECONDS <= row[1] < 1e9]
