"""The working set: what stays near from one token to all later ones, or comes near before it is asked for, because
somebody says so."""
from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from engine.core import UserError
from engine.experts.cache import kept_objects, pinnable
from engine.experts.runtime import Runtime
from kernels import pool as tables
from kernels.evict import age
from kernels.pool import Pool

Tensor = torch.Tensor


def pin(runtime: Runtime, experts: Iterable[tuple[int, int]] = (),
        neurons: Iterable[tuple[int, int, int]] = ()) -> None:
    """Between tokens: what stays near until the next call, in place of what stayed so far.

    experts: (layer, expert), their sketches or, where near memory holds whole experts, all of them; neurons: (layer,
    expert, neuron), their records. What is far is fetched now and counted as fetched ahead. UserError, nothing changed,
    when a token would find too little room beside it. The runtime's `reset` and `set_level` forget it.
    """
    far, near = runtime.far, runtime.near
    wanted = [[layer * far.experts + expert for layer, expert in experts],
              [(layer * far.experts + expert) * far.neurons + neuron for layer, expert, neuron in neurons]]
    pools = near.pools()
    assert runtime.is_sparse or not wanted[1], "records are near at the sparse levels only"
    for (pool, reserve), objects, kept in zip(pools, wanted, kept_objects(far, near), strict=False):
        objects[:] = {*objects} - {*kept}
        if (n := len(objects)) > (most := pinnable(pool, reserve) - len(kept)):
            raise UserError(f"Near memory has room for {most:,} pinned parts of experts, not for {n:,}; pin less, or "
                            "give it more memory.")
        objects += kept
    for (pool, _), objects, records in zip(pools, wanted, (False, True), strict=False):
        _pin_in(runtime, pool, torch.tensor(sorted(objects), dtype=torch.int64, device=pool.stamp.device), records)
    runtime.counted = None


def _pin_in(runtime: Runtime, pool: Pool, objects: Tensor, records: bool) -> None:
    per_layer = len(pool.slot_of) // runtime.far.layers
    tables.pin(pool, objects, runtime.clock)  # what is there need not make room for the rest
    missing = objects[pool.slot_of[objects] < 0]
    runtime.count_wasted(age(pool, runtime.clock + 1, len(missing)), records)
    for layer in (missing // per_layer).unique().tolist():
        ids = (missing[missing // per_layer == layer] % per_layer).int()
        runtime.counts[3] += runtime.bring(layer, ids, records, ahead=True)
    tables.pin(pool, objects, runtime.clock)


def bring_near(runtime: Runtime, experts: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Between tokens, one (layer, expert) after the other, the most wanted first: what is far takes the place of what
    was unused for longest, as many as fit beside what a token needs, and counts as fetched ahead. Changes no answer.
    Where near memory is the file's map nothing has to come."""
    if not (pools := runtime.near.pools()):
        return
    pool, reserve = pools[0]
    n = runtime.far.experts
    wanted = torch.tensor([layer * n + expert for layer, expert in experts], dtype=torch.int64,
                          device=pool.stamp.device)[:pinnable(pool, reserve) - runtime.near.kept]
    slots = pool.slot_of[wanted].long()
    there = slots[slots >= 0]
    pool.stamp[there] = pool.stamp[there].clamp(min=runtime.clock)      # need not make room for the rest
    for thing in wanted[slots < 0].tolist():
        layer, expert = divmod(thing, n)
        runtime.count_wasted(age(pool, runtime.clock, reserve + 1), False)
        ids = torch.tensor([expert], dtype=torch.int32, device=pool.stamp.device)
        runtime.counts[3] += runtime.bring(layer, ids, ahead=True)
        runtime.counted = None
        yield
