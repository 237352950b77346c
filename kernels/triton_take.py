"""Device version of kernels/take.py: one block goes through the list, so slots are handed out in list order.

The same list and tables therefore give the same slots as the reference, and the rows of one step (T tokens) see each
other: an object wanted twice gets one slot, and only what the first row did not ask for is fetched for the second.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.take import Pool
from kernels.triton_planes import device_value

Tensor = torch.Tensor

LARGEST_TILE = 1024     # entries looked up at a time, one a thread: more would cost layout changes


@triton.jit
def _take(objects, need, slot_of, object_of, stamp, held, ahead_of, free, n_free, clock, place, have, misses,
          n_columns, n_slots, ROWS: tl.constexpr, AHEAD: tl.constexpr, LISTED: tl.constexpr, TILE: tl.constexpr):
    left = tl.load(n_free)
    now = tl.load(clock)
    n_bounced = 0
    n_listed = 0
    for row in range(ROWS):
        for start in range(0, n_columns, TILE):
            column = start + tl.arange(0, TILE)
            entry = row * n_columns + column
            item = tl.load(objects + entry, mask=column < n_columns, other=-1)
            wanted = tl.load(need + entry, mask=column < n_columns, other=0)
            valid = item >= 0
            # Volatile: an earlier row may have written the entry, and this one must not see a cached older value.
            slot = tl.load(slot_of + item, mask=valid, other=-1, volatile=True)
            hit = slot >= 0
            missing = (valid & (slot < 0)).to(tl.int32)
            rank = tl.cumsum(missing, 0) - missing
            new = (missing > 0) & (rank < left)
            to = tl.load(free + (left - 1 - rank), mask=new, other=-1)
            there = tl.minimum(tl.load(held + slot, mask=hit, other=0, volatile=True), wanted)
            last = tl.load(stamp + slot, mask=hit, other=0, volatile=True)
            n_new = tl.sum(new.to(tl.int32), 0)
            n_missing = tl.sum(missing, 0)
            if not AHEAD:
                bounce = n_slots + n_bounced + rank - left
                to = tl.where((missing > 0) & (rank >= left), bounce, to)
            to = tl.where(hit, slot, to)
            tl.store(place + entry, to, mask=column < n_columns)
            tl.store(have + entry, there, mask=column < n_columns)
            used = (hit | new)
            tl.store(slot_of + item, to, mask=new)
            tl.store(object_of + to, item, mask=new)
            tl.store(held + to, wanted, mask=new | (hit & (wanted > there)))
            if AHEAD:
                tl.store(stamp + to, now, mask=new)
                tl.store(ahead_of + to, 1, mask=new)
            else:
                tl.store(stamp + to, tl.maximum(last, now), mask=used)  # pinned slots keep their stamp
                tl.store(ahead_of + to, 0, mask=used)
            if LISTED:
                fetch = ((to >= 0) & (there < wanted)).to(tl.int32)
                tl.store(misses + n_listed + tl.cumsum(fetch, 0), entry, mask=fetch > 0)
                n_listed += tl.sum(fetch, 0)
            n_bounced += n_missing - n_new
            left -= n_new
        tl.debug_barrier()
    tl.store(n_free, left)
    if LISTED:
        tl.store(misses, n_listed)


def take(pool: Pool, objects: Tensor, need: Tensor, clock: int | Tensor, ahead: bool = False,
         misses: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.take.take."""
    assert objects.dtype == need.dtype == torch.int32 and objects.is_contiguous() and need.is_contiguous()
    assert objects.shape == need.shape and (misses is None or misses.numel() > objects.numel())
    n_columns = objects.shape[-1]
    tile = min(triton.next_power_of_2(max(n_columns, 32)), LARGEST_TILE)
    place, have = torch.empty_like(objects), torch.empty_like(need)
    _take[(1,)](objects, need, *pool, device_value(clock, objects.device), place, have,
                place if misses is None else misses, n_columns, len(pool.object_of),
                ROWS=objects.numel() // n_columns, AHEAD=ahead, LISTED=misses is not None, TILE=tile,
                num_warps=tile // 32)
    return place, have
