"""The card's own live numbers beside the engine's: what crosses its link, its memory, how busy it is.

NVML answers in a process of its own (engine/machine/nvml.py), because a broken driver may hang or crash; a thread reads
its lines. What a card does not count is None, and `reason` says why: a zero is only ever a measured zero.
"""
from __future__ import annotations

import json
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from engine.machine import nvml
from engine.machine.detect import SENTENCES, Hardware

SILENT_SECONDS = 3.0  # without a line: the driver hangs
_NO_COUNTER = "{name} has no counter of its link that can be read; the figures are the engine's own."
_SILENT = "The NVIDIA driver does not answer; the figures are the engine's own."
_ENDED = "The NVIDIA driver stopped answering; the figures are the engine's own."


@dataclass(frozen=True)
class CardNumbers:
    """Bytes per second towards and from the card, its memory in bytes, share of time it was busy; None: not counted.

    reason: why a number is missing, "" when none is.
    """

    name: str = ""
    to_card: int | None = None
    from_card: int | None = None
    vram_used_bytes: int | None = None
    vram_total_bytes: int | None = None
    busy: float | None = None
    reason: str = ""


class CardMeter:
    """Reads one card until `close`. Every method may be called from any thread; `now` waits for nothing."""

    def __init__(self, found: Hardware):
        gpu = found.gpu or next(iter(found.gpus), None)
        self._name = gpu.name if gpu else ""
        self._last, self._at, self._child = None, time.monotonic(), None
        self._none = " ".join(found.notes[:1]) or SENTENCES["no_driver"]
        if gpu:
            self._child = nvml.start("--watch", str(gpu.index), stdin=subprocess.PIPE)
            threading.Thread(target=self._read, args=(self._child,), name="card", daemon=True).start()

    def now(self) -> CardNumbers:
        """The newest numbers."""
        child, last = self._child, self._last
        if child is None:
            return CardNumbers(reason=self._none)
        if child.poll() is not None or last is None or "error" in last:
            waiting = last is None and child.poll() is None and time.monotonic() - self._at < SILENT_SECONDS
            return CardNumbers(self._name, reason="" if waiting else _ENDED)
        if time.monotonic() - self._at > SILENT_SECONDS:
            return CardNumbers(self._name, reason=_SILENT)
        counted = last.get("to_card") is not None
        return CardNumbers(self._name, **last, reason="" if counted else _NO_COUNTER.format(name=self._name))

    def close(self) -> None:
        child, self._child = self._child, None
        if child:
            child.stdin.close()
            child.kill()  # not waited for long: a process stuck in the driver cannot even die
            threading.Thread(target=child.wait, daemon=True).start()

    def _read(self, child: subprocess.Popen) -> None:
        for line in child.stdout:
            with suppress(ValueError, TypeError, RecursionError):  # a driver may write lines of its own
                last = dict(json.loads(line))
                CardNumbers(**({} if "error" in last else last))
                self._last, self._at = last, time.monotonic()
