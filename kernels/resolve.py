"""From what a layer wants to places in near memory: routed experts, or the neurons that `select` chose.

`take` with everything around it, so that a device does it in one kernel: which objects these are, how many bytes of
each are wanted, what must be filled, and the bytes counted.

Legend: T tokens of a step, k routed experts, E experts and I neurons of a layer, K neurons chosen.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import twin
from kernels.fill import fill
from kernels.layout import Layout
from kernels.pool import Pool, take
from kernels.select import DOWN_ONLY, select

Tensor = torch.Tensor

NEEDED, HIT, FAR, AHEAD = 0, 1, 2, 3  # of the counters, int64 [4 or more]


class Link(NamedTuple):
    """Where what is missing comes from, where it goes to, and who may copy it (kernels/gpu/turns.py).

    far, near: as of `fill`; turn: int32 [4], zero, for every launch on one stream.
    """

    far: Tensor
    near: Tensor
    turn: Tensor


class Resolved(NamedTuple):
    """What `fill` is given. All int32 [T, n]; misses int32 [1 + T*n]: how many must be filled, then their positions."""

    source: Tensor  # object within its layer, -1 for none
    place: Tensor   # as of `take`
    have: Tensor
    need: Tensor
    misses: Tensor


@twin("kernels.gpu.pool", "kernels.cpu.pool")
def resolve_experts(pool: Pool, ids: Tensor, first: int, n_bytes: int, clock: Tensor, counts: Tensor, done: Tensor,
                    most_ahead: Tensor | None = None, link: Link | None = None) -> Resolved:
    """Places for experts `ids` (int [T, k]; object = first + id), each of n_bytes.

    counts is added to unless done (bool). most_ahead (int32 [1], T = 1): fetch ahead of demand instead, no more than
    so many bytes, the rest of what is missing getting place -1. link: what is missing is filled as well.
    """
    source, need = wanted_experts(pool, ids, first, n_bytes, most_ahead)
    return filled(_resolved(pool, source, first, need, clock, counts, done, most_ahead is not None), link)


def wanted_experts(pool: Pool, ids: Tensor, first: int, n_bytes: int, most_ahead: Tensor | None,
                   ) -> tuple[Tensor, Tensor]:
    """Source and need of `resolve_experts`."""
    source = ids.int()
    if most_ahead is not None:
        missing = pool.slot_of[(source + first).long()] < 0
        source = torch.where(missing & (missing.cumsum(1) * n_bytes > most_ahead), -1, source)
    need = torch.where(source < 0, 0, n_bytes).int()
    return source, need


@twin("kernels.gpu.pool", "kernels.cpu.pool")
def resolve_neurons(pool: Pool, neurons: Tensor, fidelity: Tensor, ids: Tensor, first: int, layout: Layout,
                    clock: Tensor, counts: Tensor, done: Tensor, link: Link | None = None) -> Resolved:
    """Places for the records of neurons int32 [T, K] (of the k routed experts `ids` [T, k] one after the other, -1 for
    none), whole or a prefix by fidelity int8 [T, K]; object = first + expert * I + neuron. link: as above."""
    there, index = neurons >= 0, neurons.clamp(min=0)
    experts = ids.gather(1, (index // layout.neurons).long()).int()
    source = torch.where(there, experts * layout.neurons + index % layout.neurons, -1)
    need = torch.where(there, torch.where(fidelity == DOWN_ONLY, layout.prefix, layout.record), 0).int()
    return filled(_resolved(pool, source, first, need, clock, counts, done, False), link)


@twin("kernels.gpu.fetch")
def choose_neurons(scores: Tensor, n_refined: Tensor, n_total: Tensor, capacity: int, histogram: Tensor, ids: Tensor,
                   pool: Pool, first: int, layout: Layout, clock: Tensor, counts: Tensor, done: Tensor, link: Link,
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """`select` of one token, then `resolve_neurons` -> neurons, fidelity, place, [1, capacity]; arguments as there.
    histogram: int32 [3, BINS], what `score` counted before two rows of zeros; all zero afterwards."""
    neurons, fidelity = select(scores, n_refined, n_total, capacity, histogram)
    found = resolve_neurons(pool, neurons, fidelity, ids, first, layout, clock, counts, done, link)
    return neurons, fidelity, found.place


@twin("kernels.gpu.fetch")
def look_ahead(x: Tensor, router: Tensor, top_k: int, pool: Pool, first: int, n_bytes: int, clock: Tensor,
               counts: Tensor, done: Tensor, most_ahead: Tensor, link: Link) -> Resolved:
    """Of the experts that a router float32 [E, H] would pick on the last row of x float32 [T, H], the top_k are fetched
    ahead of demand, as by `resolve_experts`; all further arguments as there."""
    ids = (x[-1:] @ router.T).topk(top_k).indices
    return resolve_experts(pool, ids, first, n_bytes, clock, counts, done, most_ahead, link)


def new_resolved(shape: tuple[int, int], device: torch.device) -> Resolved:
    """To be written."""
    source, place, have, need = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(4))
    return Resolved(source, place, have, need, torch.empty(source.numel() + 1, dtype=torch.int32, device=device))


def filled(found: Resolved, link: Link | None) -> Resolved:
    """What is missing, copied where there is a link."""
    if link is not None:
        fill.reference(link.far, found.source, link.near, *found[1:])
    return found


def _resolved(pool: Pool, source: Tensor, first: int, need: Tensor, clock: Tensor, counts: Tensor, done: Tensor,
              ahead: bool) -> Resolved:
    misses = torch.zeros(source.numel() + 1, dtype=torch.int32, device=source.device)
    place, have = take.reference(pool, torch.where(source < 0, -1, source + first), need, clock, ahead, misses)
    if not bool(done):
        if ahead:
            counts[AHEAD] += int((need - have)[place >= 0].sum())
        else:
            needed, had = int(need.sum()), int(have.sum())
            counts[NEEDED] += needed
            counts[HIT] += had
            counts[FAR] += needed - had
    return Resolved(source, place, have, need, misses)
