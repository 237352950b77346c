"""The numbers of the live panel: the engine's snapshot, rates between two samples, and the machine's memory.

One `Panel` samples for all tabs. Totals are the engine's own counters, passed on unchanged; only rates are computed
here, from the difference of two samples. Draws nothing: assets/ui/panel.js does.
"""
from __future__ import annotations

import time
from collections import deque

import psutil

from app.models import Models

HISTORY = 120  # samples kept for a tab that opens later: 30 s at 4 a second


class Panel:
    def __init__(self, models: Models):
        self._models = models
        self._process = psutil.Process()
        self._last: tuple[float, int] | None = None
        self.history: deque[dict] = deque(maxlen=HISTORY)

    def now(self) -> dict:
        """The engine's numbers at this moment, with the machine's memory."""
        memory = psutil.virtual_memory()
        return self._models.snapshot() | {"process_bytes": self._process.memory_info().rss,
                                          "ram_total_bytes": memory.total, "ram_free_bytes": memory.available}

    def sample(self) -> dict:
        """`now` plus rates since the last sample; also remembered for the curves."""
        payload = self.now()
        counters = payload.get("counters") or {}
        moved = counters.get("far_bytes", 0) + counters.get("speculative_bytes", 0)
        payload["far_bytes_per_second"] = self._rate(moved)
        self.history.append({"tokens_per_second": payload.get("tokens_per_second", 0.0),
                             "far_bytes_per_second": payload["far_bytes_per_second"]})
        return payload

    def _rate(self, moved: int) -> float:
        now = time.monotonic()
        before, self._last = self._last, (now, moved)
        if before is None or moved < before[1] or now == before[0]:  # first sample, or another model
            return 0.0
        return (moved - before[1]) / (now - before[0])
