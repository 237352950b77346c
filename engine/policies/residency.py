"""What may stay near: each rule gives what is in the slots an order, and the lowest leave first.

A rule sees what a token used once the token has ended, and acts through the stamps by which kernels/evict.py frees
slots, so that no kernel knows of it. All is tensors changed in place: a recorded step can hold every rule. Never
changes what is computed.

Legend: N objects (experts, or records), S slots, L layers; an object's layer is its number // (N // L). Tables of N
have a row more, where what is no object falls.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.evict import AGES
from kernels.pool import PINNED

Tensor = torch.Tensor
LONG_AGO = -2**30
HALF_LIFE = 32        # tokens
WINDOW, USES = 16, 3  # admission: so many uses within so many tokens
APART = 1e9           # between those that are admitted and those that are not: more than any order has


class Recency:
    """The longest unused leaves first: what the engine does by itself, for the rules that build on it."""

    def __init__(self, objects: int, layers: int, device: str | torch.device = "cpu") -> None:
        self.objects, self.layers, self.clock = objects, layers, torch.zeros((), dtype=torch.int64, device=device)
        self.last = torch.full((objects + 1,), LONG_AGO, dtype=torch.int64, device=device)

    def used(self, things: Tensor, weights: Tensor | None = None) -> None:
        """A token has ended that used `things` int64 [n] (none twice; -1 is none); weights [n]: of their experts."""
        self.clock.add_(1)
        self._note(torch.where(things < 0, self.objects, things), weights)

    def _note(self, things: Tensor, weights: Tensor | None) -> None:
        self.last[things] = self.clock

    def order(self, things: Tensor) -> Tensor:
        """float64 [S], the lowest leaves first; things int64 [S]: what the slots hold, 0 or more."""
        return self.last[things].double()

    def start(self) -> None:
        """Another answer begins."""


class Frequency(Recency):
    """The least used leaves first (LFU), the longest unused of equals. half_life: tokens after which a use counts
    half; 0: all uses count the same. Between answers counts are kept."""

    def __init__(self, objects: int, layers: int, device: str | torch.device = "cpu", half_life: float = 0.0) -> None:
        super().__init__(objects, layers, device)
        self.count = torch.zeros(objects + 1, dtype=torch.float64, device=device)
        self._kept = 0.5 ** (1 / half_life) if half_life else 1.0

    def _note(self, things: Tensor, weights: Tensor | None) -> None:
        super()._note(things, weights)
        if self._kept < 1:
            self.count.mul_(self._kept)
        self.count.index_add_(0, things, torch.ones_like(things, dtype=torch.float64))

    def order(self, things: Tensor) -> Tensor:
        return self.count[things] + 1e-9 * super().order(things)


class Weighted(Frequency):
    """HOBBIT's score (arXiv 2411.01433, equation 3): recency, frequency, frequency at high precision, and how soon the
    layer comes again, each 0..1 since the answer began. High precision: the first half of the router's weight."""

    SHARES = 0.6, 0.2, 0.1, 0.1

    def __init__(self, objects: int, layers: int, device: str | torch.device = "cpu") -> None:
        super().__init__(objects, layers, device)
        self.high = torch.zeros_like(self.count)
        self.since = torch.zeros_like(self.clock)

    def start(self) -> None:
        for table in (self.count, self.high):
            table.zero_()
        self.since.copy_(self.clock)

    def _note(self, things: Tensor, weights: Tensor | None) -> None:
        super()._note(things, weights)
        if weights is not None:
            heavy = torch.where(weights >= 0.5, things, self.objects)
            self.high.index_add_(0, heavy, torch.ones_like(heavy, dtype=torch.float64))

    def order(self, things: Tensor) -> Tensor:
        tokens = (self.clock - self.since).clamp_min(1).double()
        recent = ((self.last[things] - self.since) / tokens).clamp(-1, 1)
        soon = 1 - (things // (self.objects // self.layers)).double() / self.layers
        parts = recent, self.count[things] / tokens, self.high[things] / tokens, soon
        return sum(share * part for share, part in zip(self.SHARES, parts, strict=True))


class Expected(Frequency):
    """FineMoE's rule (arXiv 2502.05370): what leaves first has the largest 1 / (p * frequency), p the probability that
    the expert maps give its expert for the token under way. expected: [all experts], which the predictor writes."""

    def __init__(self, objects: int, layers: int, device: str | torch.device = "cpu", *, expected: Tensor) -> None:
        super().__init__(objects, layers, device, HALF_LIFE)
        self.expected = expected

    def order(self, things: Tensor) -> Tensor:
        expert = things // (self.objects // len(self.expected))
        return self.expected[expert].double() * super().order(things).clamp_min(1e-6)


class Pinned(Recency):
    """A working set that never leaves; the others by recency. chosen: bool [N]."""

    def __init__(self, objects: int, layers: int, device: str | torch.device = "cpu", *, chosen: Tensor) -> None:
        super().__init__(objects, layers, device)
        self.chosen = chosen.to(device)

    def order(self, things: Tensor) -> Tensor:
        return super().order(things) + APART * self.chosen[things]


class Divided(Recency):
    """Slots divided between the layers: what is beyond its layer's share leaves before anything that is not.
    shares: slots of each layer, int64 [L], as engine/policies/split.py finds them."""

    def __init__(self, objects: int, layers: int, device: str | torch.device = "cpu", *, shares: Tensor) -> None:
        super().__init__(objects, layers, device)
        self.shares = shares.to(device)

    def order(self, things: Tensor) -> Tensor:
        layer, last = things // (self.objects // self.layers), super().order(things)
        newest_first = (-last).argsort(stable=True)
        ranked = newest_first[layer[newest_first].argsort(stable=True)]  # by layer, in it the newest first
        per_layer = torch.zeros(self.layers, dtype=torch.int64, device=things.device)
        per_layer.index_add_(0, layer, torch.ones_like(layer))
        first = (per_layer.cumsum(0) - per_layer)[layer[ranked]]
        rank = torch.empty_like(ranked).index_copy_(0, ranked, torch.arange(len(things), device=things.device) - first)
        return last - APART * (rank >= self.shares[layer])


class Admitted:
    """Only what was used USES times within WINDOW tokens has a claim to its slot; the rest leaves before it, by the
    rule behind. A claim lasts as long as the object is near. Free slots fill ungated."""

    def __init__(self, behind: Recency) -> None:
        self.behind = behind
        device, n = behind.last.device, behind.objects
        self.times = torch.full((USES, n + 1), LONG_AGO, dtype=torch.int64, device=device)  # last uses, newest first
        self.claim = torch.zeros(n + 1, dtype=torch.bool, device=device)

    def used(self, things: Tensor, weights: Tensor | None = None) -> None:
        self.behind.used(things, weights)
        self.times[1:, things] = self.times[:-1, things]  # -1 is the last, which is no object
        self.times[0, things] = self.behind.clock
        self.claim[things] |= self.behind.clock - self.times[-1, things] < WINDOW

    def admits(self, things: Tensor) -> Tensor:
        """bool [n]: whether a use in the token under way is the one that admits."""
        return self.behind.clock + 1 - self.times[USES - 2, things] < WINDOW

    def order(self, things: Tensor) -> Tensor:
        near = torch.zeros_like(self.claim)
        near.index_fill_(0, things, True)
        self.claim.logical_and_(near)
        return self.behind.order(things) + APART * self.claim[things]

    def start(self) -> None:
        self.behind.start()


Residency = Recency | Admitted


def stays_far(rule: Residency | None, things: Tensor, missing: Tensor, n_free: int) -> Tensor:
    """bool [n]: of what a layer wants, int64 [n], and misses, bool [n], what has no claim to a slot. Free slots fill
    ungated."""
    if not isinstance(rule, Admitted) or int(missing.sum()) <= n_free:
        return torch.zeros_like(missing)
    return missing & ~rule.admits(things)


RULES: dict[str, Callable[..., Recency]] = {
    "recency": Recency, "lfu": Frequency, "popularity": lambda *given: Frequency(*given, half_life=HALF_LIFE),
    "hobbit": Weighted, "finemoe": Expected, "pinned": Pinned, "divided": Divided}


def stamps(rule: Residency, object_of: Tensor, before: Tensor, clock: Tensor | int, ended: bool = True) -> Tensor:
    """int32 [S]: what stands for the times of last use when slots are freed next; object_of [S], -1 for a free slot;
    before: the stamps so far, of which those of pinned slots stay; clock: the token that has ended, or, where it has
    not, is under way: then what it used stays. Exact for the AGES - 2 that leave first."""
    there = object_of >= 0
    order = torch.where(there, rule.order(object_of.clamp(min=0).long()), float("inf"))
    rank = torch.empty_like(object_of, dtype=torch.int64)
    rank[order.argsort(stable=True)] = torch.arange(len(order), device=order.device)
    found = clock - AGES + 1 + rank.clamp(max=AGES - 2)
    stays = before == PINNED if ended else (before == PINNED) | (before == clock)
    return torch.where(stays, before, found.int())
