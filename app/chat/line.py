"""The line before the engine: the page's answers and programs' requests, one at a time, the nearest deadline first;
before it who is expected to take less, where that makes nobody late (the rule of eMoE, arXiv 2503.06823).

A person does not wait for a program's answer to end: where it lets over, the engine sets it aside meanwhile.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

from engine import Stopped

LOOK_SECONDS = 0.1  # how often a stop is looked for
DOUBT = 2.0  # an answer may take so many times as long as is expected
UNKNOWN_SECONDS = 30.0  # that one takes of which nobody knows


class Late(Exception):
    """The deadline passed before the turn came."""


class Place(NamedTuple):
    """Of one who waits. deadline: by time.monotonic(); number: of those with one deadline the first comes first;
    seconds: that it is expected to take, 0 where nobody knows."""

    deadline: float
    number: int
    seconds: float


class Line:
    """One per program. on_come: told that somebody waits, so that what is done for nobody ends."""

    def __init__(self, on_come: Callable[[], None] = lambda: None):
        self._on_come = on_come
        self._changed = threading.Condition()
        self._numbers = count()
        self._waiting: set[Place] = set()
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
             seconds: float = 0.0) -> Iterator[None]:
        """The engine is the caller's inside. deadline: by time.monotonic(). Late once it has passed, except for who is
        patient; Stopped soon after `stopped` says so. over: goes in beside one who lets over. seconds: as of Place."""
        place = Place(deadline, next(self._numbers), seconds)
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

    def _wait(self, place: Place, stopped: Callable[[], bool], patient: bool, over: bool) -> None:
        with self._changed:
            while True:
                if stopped():
                    raise Stopped
                if not patient and time.monotonic() > place.deadline:
                    raise Late
                is_next = not self._inside and following(self._waiting, time.monotonic()) == place
                if is_next or over and self._lets_over and self._inside == 1:
                    self._inside += 1
                    return
                self._changed.wait(LOOK_SECONDS)


def following(waiting: Iterable[Place], now: float) -> Place:
    """Whose turn is next: who takes least, where all others, by deadline behind it, can still begin in time; else the
    nearest deadline."""
    by_deadline = sorted(waiting)
    for place in sorted(by_deadline, key=lambda place: place.seconds):
        begins, in_time = now + _most_seconds(place), True
        for other in by_deadline:
            if other is not place:
                in_time = in_time and begins <= other.deadline
                begins += _most_seconds(other)
        if in_time:
            return place
    return by_deadline[0]


def _most_seconds(place: Place) -> float:
    return DOUBT * (place.seconds or UNKNOWN_SECONDS)
