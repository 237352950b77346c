"""The machine around the program: what it can do, whether its card is used and why not, the card's live numbers.

A look at the machine may take seconds (a driver may hang), so it is taken in a thread and kept for a minute. Nothing
here loads torch; `measure` is called once torch is there.
"""
from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path

from app.strings import TEXT
from engine import CardMeter, Machine, UserError, this_machine, with_benchmarks

KEPT_SECONDS = 60.0


class Surroundings:
    """One per program. device: what the user asked for with --device."""

    def __init__(self, data: Path, device: str | None):
        self.data, self.device = data, device
        self._lock = threading.Lock()
        self._seen: tuple[float, Machine, object] | None = None
        self._meter: CardMeter | None = None

    def look(self) -> tuple[Machine, object]:
        """The machine for the planner and what was found, at most a minute old. May take seconds."""
        with self._lock:
            if self._seen is None or time.monotonic() - self._seen[0] > KEPT_SECONDS:
                try:
                    self._seen = time.monotonic(), *this_machine(self.data, self.device)
                except UserError:  # --device cuda without a card: opening the model says it
                    self._seen = time.monotonic(), *this_machine(self.data, "cpu")
            if self._meter is None:
                self._meter = CardMeter(self._seen[2])
            return self._seen[1:]

    def look_anew(self) -> None:
        """What was found before counts no more."""
        with self._lock:
            self._seen = None

    def measure(self) -> None:
        """Measure this machine's speeds unless that was done before. Needs torch; half a second the first time."""
        machine, found = self.look()
        with self._lock:
            self._seen = time.monotonic(), with_benchmarks(machine, self.data), found

    @property
    def machine(self) -> Machine | None:
        """What the last look found; waits for nothing."""
        return self._seen[1] if self._seen else None

    def card(self) -> dict | None:
        """The card's live numbers, with a sentence where one is missing; None before the first look."""
        return asdict(self._meter.now()) if self._meter else None

    def graphics(self, running: str | None) -> dict | None:
        """{"used", "text"}: whether the card is used and why not. running: the engine's device, None while it opens."""
        if not self._seen or not running:
            return None
        found = self._seen[2]
        name = found.gpu.name if found.gpu else ""
        if running == "cuda":
            return {"used": True, "text": TEXT["gpu_used"].format(name=name)}
        if self.device == "cpu":
            return {"used": False, "text": TEXT["gpu_refused"]}
        if name:
            return {"used": False, "text": TEXT["gpu_torch"].format(name=name)}
        return {"used": False, "text": TEXT["gpu_none"].format(why=" ".join(found.notes))}

    def close(self) -> None:
        if self._meter:
            self._meter.close()
