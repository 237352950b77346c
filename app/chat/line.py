"""The line before the engine: the page's answers and programs' requests, one at a time, the nearest deadline first."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from engine import Stopped

LOOK_SECONDS = 0.1  # how often a stop is looked for


class Late(Exception):
    """The deadline passed before the turn came."""


class Line:
    """One per program. on_come: told that somebody waits, so that what is done for nobody ends."""

    def __init__(self, on_come: Callable[[], None] = lambda: None):
        self._on_come = on_come
        self._changed = threading.Condition()
        self._numbers = count()  # of those with one deadline the first comes first
        self._waiting: set[tuple[float, int]] = set()
        self._taken = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def is_free(self) -> bool:
        """Whether nobody has the engine, and nobody waits for it."""
        return not self._taken and not self._waiting

    @contextmanager
    def turn(self, deadline: float, stopped: Callable[[], bool], patient: bool = False) -> Iterator[None]:
        """The engine is the caller's inside. deadline: by time.monotonic(). Late once it has passed, except for who is
        patient; Stopped soon after `stopped` says so."""
        place = (deadline, next(self._numbers))
        with self._changed:
            self._waiting.add(place)
        self._on_come()
        try:
            self._wait(place, stopped, patient)
        finally:
            with self._changed:
                self._waiting.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()

    def _wait(self, place: tuple[float, int], stopped: Callable[[], bool], patient: bool) -> None:
        with self._changed:
            while True:
                if stopped():
                    raise Stopped
                if not patient and time.monotonic() > place[0]:
                    raise Late
                if not self._taken and min(self._waiting) == place:
                    self._taken = True
                    return
                self._changed.wait(LOOK_SECONDS)
