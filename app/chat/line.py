"""The line before the engine: the page's answers and programs' requests, one at a time, the nearest deadline first.

A person does not wait for a program's answer to end: where it lets over, the engine sets it aside meanwhile.
"""
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
        self._inside = 0  # two where one has been let over another
        self._lets_over = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def is_free(self) -> bool:
        """Whether nobody has the engine, and nobody waits for it."""
        return not self._inside and not self._waiting

    @contextmanager
    def turn(self, deadline: float, stopped: Callable[[], bool], patient: bool = False, over: bool = False,
             ) -> Iterator[None]:
        """The engine is the caller's inside. deadline: by time.monotonic(). Late once it has passed, except for who is
        patient; Stopped soon after `stopped` says so. over: goes in beside one who lets over."""
        place = (deadline, next(self._numbers))
        with self._changed:
            self._waiting.add(place)
        self._on_come()
        try:
            self._wait(place, stopped, patient, over)
        finally:
            with self._changed:
                self._waiting.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def letting_over(self) -> Iterator[None]:
        """Within a turn: who goes over others need not wait for its end. One at a time."""
        self._let(True)
        try:
            yield
        finally:
            self._let(False)

    def _let(self, over: bool) -> None:
        with self._changed:
            self._lets_over = over
            self._changed.notify_all()

    def _wait(self, place: tuple[float, int], stopped: Callable[[], bool], patient: bool, over: bool) -> None:
        with self._changed:
            while True:
                if stopped():
                    raise Stopped
                if not patient and time.monotonic() > place[0]:
                    raise Late
                if not self._inside and min(self._waiting) == place or over and self._lets_over and self._inside == 1:
                    self._inside += 1
                    return
                self._changed.wait(LOOK_SECONDS)
