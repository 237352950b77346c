"""Device version of kernels/evict.py: count the slots by age, find where the wanted number is reached, free those.

Three kernels of many blocks, once a token or (`free=layer`) before each layer asks. All counts are integers and slots
are freed in slot order, so the tables come out exactly as the reference's. A block adds up the counts of the blocks
before it by itself. The first kernel leaves every slot's age in 16 bits for the two others: 8 bytes a slot are read
once, and 2 twice.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.evict import AGES
from kernels.gpu.planes import device_value
from kernels.gpu.select import bin_of
from kernels.pool import Pool

Tensor = torch.Tensor

TILE = 4096     # slots of a block
# Words of `state`: oldest age not freed whole, how many of it are freed, freed altogether, free before.
STATE = 4


@triton.jit
def _count(object_of, stamp, clock, ages, counts, n_slots, AGES: tl.constexpr, TILE: tl.constexpr):
    """ages int16: tokens since a slot was used, 0 for free slots, pinned ones and those of this token; AGES - 1 for
    anything older."""
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = slot < n_slots
    resident = tl.load(object_of + slot, mask=there, other=-1) >= 0
    age = tl.load(clock) - tl.load(stamp + slot, mask=there, other=0)
    age = tl.where(resident & (age > 0), tl.minimum(age, AGES - 1), 0)
    tl.store(ages + slot, age.to(tl.int16), mask=there)
    here = tl.histogram(age, AGES)
    tl.atomic_add(counts + tl.arange(0, AGES), here, mask=here > 0, sem="relaxed")


@triton.jit
def _decide(ages, n_free, reserve, counts, state, of_block, out, n_slots, n_objects, AGES: tl.constexpr,
            TILE: tl.constexpr):
    """of_block [B, 2]: slots of a block older than the boundary, and of its age. Every block finds the boundary."""
    age = tl.arange(0, AGES)
    old = tl.where(age > 0, tl.load(counts + age), 0)
    free = tl.load(n_free)
    wanted = tl.minimum(tl.load(reserve), n_objects - (n_slots - free)) - free
    n = tl.maximum(tl.minimum(wanted, tl.sum(old, 0)), 0)
    boundary, of_it = bin_of(old, n, AGES)
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = tl.load(ages + slot, mask=slot < n_slots, other=0).to(tl.int32)
    tl.store(of_block + tl.program_id(0) * 2, tl.sum((here > boundary).to(tl.int32), 0))
    tl.store(of_block + tl.program_id(0) * 2 + 1, tl.sum((here == boundary).to(tl.int32), 0))
    if tl.program_id(0) == 0:
        tl.store(state, boundary)
        tl.store(state + 1, of_it)
        tl.store(state + 2, n)
        tl.store(state + 3, free)
        tl.store(out, n.to(tl.int64))
        tl.store(out + 1, tl.zeros((), tl.int64))


@triton.jit
def _free(slot_of, object_of, ahead, free, n_free, ages, state, of_block, out, n_slots, AGES: tl.constexpr,
          TILE: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    earlier = block < tl.program_id(0)
    n_older = tl.sum(tl.load(of_block + block * 2, mask=earlier, other=0), 0)
    n_equal = tl.sum(tl.load(of_block + block * 2 + 1, mask=earlier, other=0), 0)
    boundary = tl.load(state)
    of_it = tl.load(state + 1)
    stack = tl.load(state + 3)
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = tl.load(ages + slot, mask=slot < n_slots, other=0).to(tl.int32)
    equal = (here == boundary).to(tl.int32)
    older = (here > boundary).to(tl.int32)
    equal_before = n_equal + tl.cumsum(equal, 0) - equal
    leaves = (older > 0) | ((equal > 0) & (equal_before < of_it))
    place = stack + n_older + tl.cumsum(older, 0) - older + tl.minimum(equal_before, of_it)
    item = tl.load(object_of + slot, mask=leaves, other=0)
    n_wasted = tl.sum(tl.load(ahead + slot, mask=leaves, other=0), 0)
    tl.store(free + place, slot, mask=leaves)
    tl.store(slot_of + item, -1, mask=leaves)
    tl.store(object_of + slot, -1, mask=leaves)
    tl.store(ahead + slot, 0, mask=leaves)
    tl.atomic_add(out + 1, n_wasted.to(tl.int64), sem="relaxed")
    if tl.program_id(0) == 0:
        tl.store(n_free, stack + tl.load(state + 2))


def age(pool: Pool, clock: int | Tensor, reserve: int | Tensor) -> Tensor:
    """As kernels.evict.age."""
    n_slots, device = len(pool.object_of), pool.stamp.device
    out = torch.zeros(2, dtype=torch.int64, device=device)
    if not n_slots:
        return out
    blocks = triton.cdiv(n_slots, TILE)
    clock, reserve = device_value(clock, device), device_value(reserve, device)
    counts = torch.zeros(AGES, dtype=torch.int32, device=device)
    ages = torch.empty(n_slots, dtype=torch.int16, device=device)
    state = torch.empty(STATE, dtype=torch.int32, device=device)
    of_block = torch.empty(blocks, 2, dtype=torch.int32, device=device)
    shape = {"AGES": AGES, "TILE": TILE, "num_warps": 8}
    _count[(blocks,)](pool.object_of, pool.stamp, clock, ages, counts, n_slots, **shape)
    _decide[(blocks,)](ages, pool.n_free, reserve, counts, state, of_block, out, n_slots, len(pool.slot_of), **shape)
    _free[(blocks,)](pool.slot_of, pool.object_of, pool.ahead, pool.free, pool.n_free, ages, state, of_block, out,
                     n_slots, BLOCKS=triton.next_power_of_2(blocks), **shape)
    return out
