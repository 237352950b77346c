"""How far work is, how fast, how long still; and how work is ended from outside.

A download's speed counts bytes that arrived over the network in the last ten seconds, waiting included; bytes that were
there before do not count. Time left is None until there is a speed to say it with.
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from threading import Event, Lock, Thread

from engine.core import Stopped
from engine.units import size

WINDOW_SECONDS = 10.0
EVERY_SECONDS = 0.25


@dataclass(frozen=True)
class Progress:
    """bytes_per_second over the last seconds; seconds_left None where nobody knows. text: what is happening, if new.

    The bytes of a compression are layers, the trunk as one more, and its speed is in weights.
    """

    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    seconds_left: float | None
    text: str = ""

    def __str__(self) -> str:
        share = 100 * self.done_bytes / self.total_bytes if self.total_bytes else 100.0
        left = "" if self.seconds_left is None else f"  {duration(self.seconds_left)} left"
        return (f"{share:5.1f} %  {size(self.done_bytes)} of {size(self.total_bytes)}  "
                f"{size(self.bytes_per_second)}/s{left}  {self.text}").rstrip()


Report = Callable[[Progress], None]


def unheard(progress: Progress) -> None:
    """The report of work that nobody watches."""


def said(text: str) -> Progress:
    """A sentence about work that has not begun."""
    return Progress(0, 1, 0.0, None, text)


def of_pass(report: Report, n: int, passes: int) -> Report:
    """Of the n-th of several passes of the same work, as a part of all of them. How long those behind it take, nobody
    knows."""
    def told(progress: Progress) -> None:
        left = progress.seconds_left if n + 1 == passes else None
        report(replace(progress, done_bytes=progress.done_bytes + n * progress.total_bytes,
                       total_bytes=passes * progress.total_bytes, seconds_left=left))
    return told


class Meter:
    """Counts arriving bytes, from any thread, and reports a few times a second.

    other_seconds: how long what goes on beside the network will still take; time left is the longer of the two.
    """

    def __init__(self, total_bytes: int, done_bytes: int, report: Report,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self.report, self.clock = total_bytes, done_bytes, report, clock
        self.other_seconds = 0.0
        self._arrived: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._told = float("-inf")
        self._lock = Lock()

    def add(self, n_bytes: int, text: str = "") -> None:
        """n_bytes more; reports at once when there is a text or the end is reached."""
        with self._lock:
            now = self.clock()
            self.done += n_bytes
            if n_bytes:
                self._arrived.append((now, n_bytes))
            if text or self.done >= self.total or now - self._told >= EVERY_SECONDS:
                self._told = now
                self.report(self._progress(now, text))

    def _progress(self, now: float, text: str) -> Progress:
        while len(self._arrived) > 1 and self._arrived[1][0] < now - WINDOW_SECONDS:
            self._arrived.popleft()
        since, _ = self._arrived[0]
        n_bytes = sum(n for _, n in list(self._arrived)[1:])
        speed = max(0.0, n_bytes / (now - since)) if now - since > 0.2 else 0.0
        missing = self.total - self.done
        left = max(missing / speed, self.other_seconds) if speed and missing > 0 else None if missing > 0 else (
            self.other_seconds)
        return Progress(self.done, self.total, speed, left, text)


def check(stop: Event) -> None:
    """Stopped, once `stop` is set."""
    if stop.is_set():
        raise Stopped


def unless(stopped: Callable[[], bool], work: Callable, look_seconds: float = 0.1):
    """What `work` returns, made in a thread of its own; Stopped soon after `stopped` says so, and the thread is left to
    end by itself: what waits for a network or a library cannot be cut short."""
    done: Future = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
    if stopped():
        raise Stopped
    Thread(target=run, daemon=True).start()
    while not wait((done,), look_seconds).done:
        if stopped():
            raise Stopped
    return done.result()


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
