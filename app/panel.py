"""The numbers of the live panel: the engine's snapshot, rates between two samples, the card's and the machine's.

One `Panel` samples for all tabs. Totals are the engine's own counters, passed on unchanged; only rates are computed
here, from the difference of two samples. Draws nothing: assets/ui/engine/panel.js does.
"""
from __future__ import annotations

import time
from collections import deque

import psutil

from app.library.open_model import Models

HISTORY = 120  # samples kept for a tab that opens later: 30 s at 4 a second
SELDOM = 4  # what is large or costs something comes with every fourth sample


class Panel:
    def __init__(self, models: Models):
        self._models = models
        self._process = psutil.Process()
        self._last: tuple[float, int] | None = None
        self._samples = 0
        self.history: deque[dict] = deque(maxlen=HISTORY)

    def now(self) -> dict:
        """Everything at this moment: engine, card, memory, and what binds."""
        payload = self._often()
        return payload | {"why": self._models.why_slow(payload)}

    def sample(self) -> dict:
        """What is drawn next, with rates since the last sample; also remembered for the curves. The experts' activity
        and what binds are in every fourth one."""
        payload = self._often()
        counters = payload.get("counters") or {}
        moved = counters.get("far_bytes", 0) + counters.get("speculative_bytes", 0)
        payload["far_bytes_per_second"] = self._rate(moved)
        self._samples += 1
        if self._samples % SELDOM == 0:
            payload["why"] = self._models.why_slow(payload)
        else:
            payload.pop("activity", None)
        card = payload["card"] or {}
        self.history.append({"tokens_per_second": payload.get("tokens_per_second", 0.0),
                             "far_bytes_per_second": payload["far_bytes_per_second"], "to_card": card.get("to_card")})
        return payload

    def _often(self) -> dict:
        memory = psutil.virtual_memory()
        return self._models.snapshot() | {
            "card": self._models.around.card(), "process_bytes": self._process.memory_info().rss,
            "ram_total_bytes": memory.total, "ram_free_bytes": memory.available}

    def _rate(self, moved: int) -> float:
        now = time.monotonic()
        before, self._last = self._last, (now, moved)
        if before is None or moved < before[1] or now == before[0]:  # first sample, or another model
            return 0.0
        return (moved - before[1]) / (now - before[0])
