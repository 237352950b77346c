"""How many slots each layer should have: dynamic programming over miss curves that a trace gives (AdapMoE's idea, arXiv
2408.10284, with curves measured instead of a formula). Plain numbers.

A curve is a list: misses[s] is what a layer misses with s slots, s = 0 .. as many as it may have.

And misses between a card and the processor beside it: what of a layer's missing experts is computed where it lies,
so that both sides end together (DAOP, arXiv 2501.10375, and APTMoE, SC 2024). Rates are measured, never assumed.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Curve = Sequence[float]


def recency_curve(tokens: Iterable[Sequence[int]], objects: int) -> list[float]:
    """Misses of one layer's least-recently-used cache with 0 .. objects slots, from one pass: a use hits with s slots
    where fewer than s others were used since (Mattson's stack distance)."""
    stack: list[int] = []  # newest first
    hits = [0] * (objects + 1)
    uses = 0
    for things in tokens:
        for thing in things:
            uses += 1
            if thing in stack:
                at = stack.index(thing)
                hits[at + 1] += 1
                del stack[at]
            stack.insert(0, thing)
    misses, left = [], uses
    for found in hits:
        left -= found
        misses.append(float(left))
    return misses


def divide(curves: Sequence[Curve], slots: int, least: int = 0) -> tuple[list[int], float]:
    """-> slots of each layer, no fewer than `least` and `slots` in all at most, with the fewest misses together; the
    misses. Of equal divisions the one that gives the later layers less."""
    best, chosen = np.zeros(slots + 1), []
    for curve in curves:
        found, choice = np.full(slots + 1, np.inf), np.zeros(slots + 1, np.int64)
        for share in range(least, min(len(curve) - 1, slots) + 1):
            misses = best[:slots + 1 - share] + curve[share]
            better = misses < found[share:]
            found[share:][better], choice[share:][better] = misses[better], share
        best = found
        chosen.append(choice)
    assert np.isfinite(best[slots]), f"{slots} slots are fewer than {least} for each of {len(curves)} layers"
    shares, left = [], slots
    for choice in reversed(chosen):
        shares.append(int(choice[left]))
        left -= shares[-1]
    return shares[::-1], float(best[slots])


@dataclass(frozen=True)
class Rates:
    """link: bytes a second that a card fetches; host: bytes a second of packed experts that the processor computes;
    asking: seconds that it costs to ask the processor at all."""

    link: float
    host: float
    asking: float = 0.0

    def __post_init__(self) -> None:
        assert self.link > 0 and self.host > 0 and self.asking >= 0, self

    def seconds(self, fetched: int, computed: int) -> float:
        """Until both sides are done with so many bytes."""
        return max(fetched / self.link, computed / self.host + (self.asking if computed else 0.0))


def host_takes(missing: int, each_bytes: int, rates: Rates) -> int:
    """How many of a layer's missing experts, or neurons, the processor computes; of equally good numbers the least."""
    # Both sides' times are lines: none, or beside where they meet.
    meet = (missing * each_bytes / rates.link - rates.asking) / (each_bytes / rates.link + each_bytes / rates.host)
    near = range(max(1, int(meet) - 1), min(missing, int(meet) + 2) + 1)
    return min((0, *near), key=lambda n: (rates.seconds((missing - n) * each_bytes, n * each_bytes), n))
