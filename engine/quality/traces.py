"""Picks of a run, replayed through the near memory's own bookkeeping at several sizes: the miss curves of a model.

A trace holds, layer by layer, what every token asked for, in order. Replay uses take and age as decode does, so a
curve is what the policy really misses, not what an ideal one would.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.experts.cache import KEEP_FREE
from kernels.evict import age
from kernels.pool import new_pool, take

Tensor = torch.Tensor
SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)  # of all objects near


@dataclass
class Trace:
    """items[l][t] int32: objects of layer l that token t asked for; need[l][t] int32: bytes wanted of each."""

    objects_per_layer: int
    items: list[list[Tensor]] = field(default_factory=list)
    need: list[list[Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.items[0]) if self.items else 0

    def add(self, layer: int, items: Tensor, need: Tensor) -> None:
        """One token of one layer."""
        while len(self.items) <= layer:
            self.items.append([])
            self.need.append([])
        self.items[layer].append(items.int())
        self.need[layer].append(need.int())


def miss_curve(trace: Trace) -> list[list[float]]:
    """[[slots, share of the needed bytes that was missed], ...]; the first half of the trace only warms the cache."""
    total = trace.objects_per_layer * len(trace.items)
    return [[float(round(share * total)), replay(trace, round(share * total))] for share in SHARES]


def replay(trace: Trace, n_slots: int) -> float:
    """Share of the needed bytes that one pool of n_slots misses in the second half of the trace."""
    if not n_slots:
        return 1.0
    pool = new_pool(trace.objects_per_layer * len(trace.items), n_slots)
    per_token = max(sum(len(items[t]) for items in trace.items) for t in range(trace.tokens))
    reserve = min(per_token, max(1, n_slots // KEEP_FREE))
    needed = missed = 0
    for t in range(trace.tokens):
        for layer, (items, need) in enumerate(zip(trace.items, trace.need, strict=True)):
            if not len(items[t]):  # FloE's rule may keep nothing, and a level may leave out a whole layer
                continue
            wanted = items[t] + layer * trace.objects_per_layer
            _, have = take(pool, wanted, need[t], t + 1)
            if t >= trace.tokens // 2:
                needed += int(need[t].sum())
                missed += int((need[t] - have).sum())
        age(pool, t + 1, reserve)
    return missed / needed if needed else 0.0
