"""The steps of opening a model, and how long it will still take: from how long the same steps took the last time.

Kept in the data folder's cache. A model that was never opened is timed by its size against the others; while nothing
is known, nothing is promised.
"""
from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

LONGEST_SECONDS = 1e6  # what is longer was never measured


@dataclass
class Opening:
    """One opening. `steps` are the names so far, the last one running; times in seconds."""

    name: str
    n_bytes: int
    memory: Path
    started: float = field(default_factory=time.monotonic)
    steps: list[tuple[str, float]] = field(default_factory=list)  # name, when it began

    def __post_init__(self) -> None:
        self._known = _read(self.memory)

    def step(self, text: str) -> None:
        """A new step begins; a changed share of the running one does not."""
        if not self.steps or self.steps[-1][0] != text:
            self.steps.append((text, time.monotonic()))

    def shown(self) -> dict:
        """{"steps": [{"name", "state": done | now, "seconds"}], "left": seconds or None, "elapsed"}."""
        now = time.monotonic()
        steps = list(self.steps)  # the opening goes on meanwhile
        ends = [*(begin for _, begin in steps), now][1:]
        rows = [{"name": name, "state": "done", "seconds": round(end - begin, 1)}
                for (name, begin), end in zip(steps, ends, strict=True)] if steps else []
        if rows:
            rows[-1]["state"] = "now"
        elapsed, whole = now - self.started, self._expected()
        left = None if whole is None else max(0.0, round(whole - elapsed, 1))
        return {"steps": rows, "left": left, "elapsed": round(elapsed, 1)}

    def finish(self) -> None:
        """Remember how long it took."""
        self._known[self.name] = {"seconds": round(time.monotonic() - self.started, 2), "bytes": self.n_bytes}
        part = self.memory.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_text(json.dumps(self._known), encoding="utf-8")
            os.replace(part, self.memory)
        except OSError:
            part.unlink(missing_ok=True)  # costs a forecast, nothing else

    def _expected(self) -> float | None:
        if self.name in self._known:
            return self._known[self.name]["seconds"]
        larger = [row for row in self._known.values() if row["bytes"] > 0]
        if not larger:
            return None
        nearest = min(larger, key=lambda row: abs(row["bytes"] - self.n_bytes))
        return nearest["seconds"] * max(1.0, self.n_bytes / nearest["bytes"])


def _read(path: Path) -> dict:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): {"seconds": float(row["seconds"]), "bytes": int(row["bytes"])}
                for name, row in known.items() if 0 <= row["seconds"] < LONGEST_SECONDS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
