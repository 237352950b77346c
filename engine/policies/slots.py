"""A pool of near memory in plain numbers, for replaying a trace: what kernels/pool.py and kernels/evict.py do to
places, step by step and to the byte, without the bytes. Thousands of times quicker than the tables of a device.
"""
from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np

from kernels.evict import AGES


class Slots:
    """n_slots of n_objects fit. Counts are in bytes; a miss without a free slot passes through (`take` counts it as
    far and keeps nothing)."""

    def __init__(self, n_objects: int, n_slots: int) -> None:
        self.n_slots, self.fits_all = n_slots, n_slots >= n_objects
        self.slot_of = array("i", [-1]) * n_objects
        self.places = np.frombuffer(self.slot_of, np.int32)
        self._held, self._ahead = array("i", [0]) * n_slots, array("b", [0]) * n_slots
        self._free = list(range(n_slots - 1, -1, -1))
        object_of, stamp = array("i", [-1]) * n_slots, array("i", [-1]) * n_slots
        self._object_of, self._stamp = object_of, stamp
        self.object_of = np.frombuffer(object_of, np.int32) if n_slots else np.empty(0, np.int32)
        self.stamp = np.frombuffer(stamp, np.int32) if n_slots else np.empty(0, np.int32)

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self, objects: Sequence[int], needs: Sequence[int], clock: int) -> tuple[int, int]:
        """-> of the bytes wanted: hit, and of those that were far: passed through without a slot."""
        hit = passed = 0
        for thing, need in zip(objects, needs, strict=True):
            slot = self.slot_of[thing]
            if slot >= 0:
                held = self._held[slot]
                hit += min(held, need)
                self._held[slot] = max(held, need)
                self._stamp[slot] = max(self._stamp[slot], clock)
                self._ahead[slot] = 0
            elif self._free:
                self._assign(thing, need, clock, 0)
            else:
                passed += need
        return hit, passed

    def take_ahead(self, objects: Sequence[int], need: int, clock: int, most_bytes: int) -> int:
        """What is missing of `objects` into free slots, no more than most_bytes -> bytes fetched."""
        fetched = 0
        for thing in objects:
            if self.slot_of[thing] >= 0:
                continue
            if not self._free or fetched + need > most_bytes:
                break
            self._assign(thing, need, clock, 1)
            fetched += need
        return fetched

    def _assign(self, thing: int, need: int, clock: int, ahead: int) -> None:
        slot = self._free.pop()
        self.slot_of[thing], self._object_of[slot] = slot, thing
        self._held[slot], self._stamp[slot], self._ahead[slot] = need, clock, ahead

    def age(self, clock: int, reserve: int, stamps: Callable[[], np.ndarray] | None = None) -> int:
        """Free slots until `reserve` are; stamps: in place of the times of last use, asked for where any has to leave
        -> of those that left, fetched in vain."""
        resident = self.n_slots - len(self._free)
        wanted = min(reserve, len(self.slot_of) - resident) - len(self._free)
        if wanted <= 0:
            return 0
        if stamps is not None:
            self.stamp[:] = stamps()
        old = np.flatnonzero((self.object_of >= 0) & (self.stamp < clock))
        order = old[np.argsort(np.maximum(self.stamp[old], clock - AGES + 1), kind="stable")][:wanted]
        wasted = 0
        for slot in sorted(order.tolist()):
            wasted += self._ahead[slot]
            self.slot_of[self._object_of[slot]] = -1
            self._object_of[slot], self._ahead[slot] = -1, 0
            self._free.append(slot)
        return wasted

    def fill(self, objects: Sequence[int], need: int) -> None:
        """Before the first step: what is near for good, uncounted."""
        self.take(objects, [need] * len(objects), 0)
