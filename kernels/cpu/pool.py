"""Compiled twins of kernels/pool.py, resolve.py and evict.py: near memory's tables, entry after entry.

Legend as there.
"""
from __future__ import annotations

import numpy as np
import torch
from numba import njit

from kernels.evict import AGES
from kernels.layout import Layout
from kernels.pool import Pool
from kernels.resolve import AHEAD, FAR, HIT, NEEDED, Link, Resolved, filled, wanted_experts
from kernels.select import DOWN_ONLY

Tensor = torch.Tensor

TABLE = "int32[::1]"
POOL = ",".join([TABLE] * len(Pool._fields))


@njit(cache=True, nogil=True)
def _enter(slot_of, object_of, stamp, held, ahead, free, n_free, item, need, clock, is_ahead, bounce):
    """One object -> its place, and the bytes of it that are there. bounce: its row where no slot is free."""
    slot = slot_of[item]
    if slot >= 0:
        there = min(held[slot], need)
        held[slot] = max(held[slot], need)
        if not is_ahead:
            stamp[slot] = max(stamp[slot], clock)
            ahead[slot] = 0
        return slot, there
    if n_free[0] == 0:
        return (-1 if is_ahead else bounce), 0
    n_free[0] -= 1
    slot = free[n_free[0]]
    slot_of[item], object_of[slot], held[slot], stamp[slot], ahead[slot] = slot, item, need, clock, is_ahead
    return slot, 0


@njit(f"void({POOL},{TABLE},{TABLE},int64,boolean,{TABLE},{TABLE},{TABLE})", cache=True, nogil=True)
def _take(slot_of, object_of, stamp, held, ahead, free, n_free, items, need, clock, is_ahead, place, have, misses):
    n_slots, bounced, n_misses = len(object_of), 0, 0
    for i in range(len(items)):
        place[i], have[i] = -1, 0
        if items[i] < 0:
            continue
        place[i], have[i] = _enter(slot_of, object_of, stamp, held, ahead, free, n_free, items[i], need[i], clock,
                                   is_ahead, n_slots + bounced)
        bounced += place[i] >= n_slots
        if have[i] < need[i] and place[i] >= 0:
            n_misses += 1
            if len(misses):
                misses[n_misses] = i
    if len(misses):
        misses[0] = n_misses


def take(pool: Pool, objects: Tensor, need: Tensor, clock: int | Tensor, ahead: bool = False,
         misses: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.pool.take."""
    place, have = torch.empty_like(objects), torch.empty_like(need)
    listed = np.empty(0, np.int32) if misses is None else misses.numpy()
    _take(*(table.numpy() for table in pool), objects.contiguous().view(-1).numpy(), need.contiguous().view(-1).numpy(),
          int(clock), ahead, place.view(-1).numpy(), have.view(-1).numpy(), listed)
    return place, have


@njit(f"void({TABLE},{TABLE},{TABLE},boolean,int64[::1])", cache=True, nogil=True)
def _count(place, have, need, is_ahead, counts):
    needed = had = 0
    for i in range(len(place)):
        if not is_ahead or place[i] >= 0:
            needed += need[i]
            had += have[i]
    if is_ahead:
        counts[AHEAD] += needed - had
    else:
        counts[NEEDED] += needed
        counts[HIT] += had
        counts[FAR] += needed - had


def _resolved(pool: Pool, source: Tensor, first: int, need: Tensor, clock: Tensor, counts: Tensor, done: Tensor,
              ahead: bool) -> Resolved:
    misses = torch.zeros(source.numel() + 1, dtype=torch.int32)
    place, have = take(pool, torch.where(source < 0, -1, source + first), need, clock, ahead, misses)
    if not bool(done):
        _count(place.view(-1).numpy(), have.view(-1).numpy(), need.view(-1).numpy(), ahead, counts.numpy())
    return Resolved(source, place, have, need, misses)


def resolve_experts(pool: Pool, ids: Tensor, first: int, n_bytes: int, clock: Tensor, counts: Tensor, done: Tensor,
                    most_ahead: Tensor | None = None, link: Link | None = None) -> Resolved:
    """As kernels.resolve.resolve_experts."""
    source, need = wanted_experts(pool, ids, first, n_bytes, most_ahead)
    return filled(_resolved(pool, source, first, need, clock, counts, done, most_ahead is not None), link)


@njit("void(int32[:,::1],int8[:,::1],int64[:,::1],int64,int32,int32,int32[:,::1],int32[:,::1])", cache=True,
      nogil=True)
def _records(neurons, fidelity, ids, per_expert, prefix, record, source, need):
    for t in range(len(neurons)):
        for i in range(neurons.shape[1]):
            neuron = neurons[t, i]
            source[t, i], need[t, i] = -1, 0
            if neuron >= 0:
                source[t, i] = ids[t, neuron // per_expert] * per_expert + neuron % per_expert
                need[t, i] = prefix if fidelity[t, i] == DOWN_ONLY else record


def resolve_neurons(pool: Pool, neurons: Tensor, fidelity: Tensor, ids: Tensor, first: int, layout: Layout,
                    clock: Tensor, counts: Tensor, done: Tensor, link: Link | None = None) -> Resolved:
    """As kernels.resolve.resolve_neurons."""
    source, need = torch.empty_like(neurons), torch.empty_like(neurons)
    _records(neurons.contiguous().numpy(), fidelity.contiguous().numpy(), ids.long().contiguous().numpy(),
             layout.neurons, layout.prefix, layout.record, source.numpy(), need.numpy())
    return filled(_resolved(pool, source, first, need, clock, counts, done, False), link)


@njit(f"int64({TABLE},{TABLE},{TABLE},{TABLE},{TABLE},{TABLE},int64,int64,int64[::1])", cache=True, nogil=True)
def _age(slot_of, object_of, stamp, ahead, free, n_free, clock, reserve, evicted):
    ages, first, n_old = np.zeros(AGES, np.int64), clock - AGES + 1, 0
    for slot in range(len(object_of)):
        if object_of[slot] >= 0 and stamp[slot] < clock:
            ages[max(stamp[slot], first) - first] += 1
            n_old += 1
    resident = len(object_of) - n_free[0]
    left = min(min(reserve, len(slot_of) - resident) - n_free[0], n_old)
    if left <= 0:
        return 0
    oldest = 0
    while ages[oldest] < left:      # all of these ages go, and the first slots of the next one
        left -= ages[oldest]
        oldest += 1
    for slot in range(len(object_of)):
        if object_of[slot] < 0 or stamp[slot] >= clock:
            continue
        age = max(stamp[slot], first) - first
        if age > oldest or (age == oldest and left == 0):
            continue
        left -= age == oldest
        evicted[0] += 1
        evicted[1] += ahead[slot]
        slot_of[object_of[slot]], object_of[slot], ahead[slot] = -1, -1, 0
        free[n_free[0]] = slot
        n_free[0] += 1
    return 0


def age(pool: Pool, clock: int | Tensor, reserve: int | Tensor) -> Tensor:
    """As kernels.evict.age."""
    evicted = torch.zeros(2, dtype=torch.int64)
    tables = (pool.slot_of, pool.object_of, pool.stamp, pool.ahead, pool.free, pool.n_free)
    _age(*(table.numpy() for table in tables), int(clock), int(reserve), evicted.numpy())
    return evicted
