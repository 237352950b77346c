"""Device version of kernels/pool.py and kernels/resolve.py: one block goes through the list, so slots are handed out in
list order.

The same list and tables therefore give the same slots as the reference, and the rows of one step (T tokens) see each
other: an object wanted twice gets one slot, and only what the first row did not ask for is fetched for the second. One
block is also why the counters need no atomics. With a link the other blocks of the launch wait for that one and all of
them copy what is missing.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.fill import COPYING_WARPS, copied, copying
from kernels.gpu.planes import device_value
from kernels.gpu.turns import draw, publish
from kernels.layout import Layout
from kernels.pool import Pool
from kernels.resolve import Link, Resolved, new_resolved
from kernels.select import DOWN_ONLY

Tensor = torch.Tensor

LARGEST_TILE = 512      # entries looked up at a time, one a thread; with 1024 the registers of a block do not suffice


# What a list holds: objects with their bytes, expert ids, or chosen neurons with their fidelity.
OBJECTS, EXPERTS, NEURONS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_DOWN_ONLY = tl.constexpr(DOWN_ONLY)


@triton.jit
def _wish(wishes, bytes_of, fidelity, ids, row, entry, valid, first, n_bytes, OF: tl.constexpr, ROUTED: tl.constexpr,
          EACH: tl.constexpr, PREFIX: tl.constexpr, WHOLE: tl.constexpr):
    """Entries of a list -> object or -1, object within its layer or -1, bytes wanted."""
    wish = tl.load(wishes + entry, mask=valid, other=-1).to(tl.int32)
    there = wish >= 0
    source = wish
    item = wish
    if OF == OBJECTS:
        wanted = tl.load(bytes_of + entry, mask=valid, other=0)
    else:
        wanted = tl.where(there, n_bytes, 0)
        if OF == NEURONS:
            expert = tl.load(ids + row * ROUTED + wish // EACH, mask=there, other=0).to(tl.int32)
            source = tl.where(there, expert * EACH + wish % EACH, -1)
            down_only = tl.load(fidelity + entry, mask=there, other=0) == _DOWN_ONLY
            wanted = tl.where(there, tl.where(down_only, PREFIX, WHOLE), 0)
        item = tl.where(there, source + first, -1)
    return item, source, wanted


@triton.jit
def taken(wishes, bytes_of, fidelity, ids, slot_of, object_of, stamp, held, ahead_of, free, n_free, clock, place, have,
          misses, source, need, counts, done, most, first, n_bytes, n_columns, n_slots, OF: tl.constexpr,
          ROUTED: tl.constexpr, EACH: tl.constexpr, PREFIX: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
          AHEAD: tl.constexpr, LISTED: tl.constexpr, TILE: tl.constexpr):
    """Of one block: `take`, or `resolve`, of a whole list."""
    left = tl.load(n_free)
    now = tl.load(clock)
    n_bounced = 0
    n_listed = 0
    needed = 0  # bytes of one layer's step: they fit 32 bits
    had = 0
    for row in range(ROWS):
        for start in range(0, n_columns, TILE):
            column = start + tl.arange(0, TILE)
            entry = row * n_columns + column
            item, local, wanted = _wish(wishes, bytes_of, fidelity, ids, row, entry, column < n_columns, first, n_bytes,
                                        OF, ROUTED, EACH, PREFIX, WHOLE)
            # Volatile: an earlier row may have written the entry, and this one must not see a cached older value.
            slot = tl.load(slot_of + item, mask=item >= 0, other=-1, volatile=True)
            missing = ((item >= 0) & (slot < 0)).to(tl.int32)
            if AHEAD and OF == EXPERTS:  # a list of one tile
                over = (missing > 0) & (tl.cumsum(missing, 0) > tl.load(most) // n_bytes)
                item = tl.where(over, -1, item)
                local = tl.where(over, -1, local)
                wanted = tl.where(over, 0, wanted)
                missing = tl.where(over, 0, missing)
            hit = slot >= 0
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
            if OF != OBJECTS:
                tl.store(source + entry, local, mask=column < n_columns)
                tl.store(need + entry, wanted, mask=column < n_columns)
                needed += tl.sum(tl.where(to >= 0, wanted, 0), 0)
                had += tl.sum(there, 0)
            n_bounced += n_missing - n_new
            left -= n_new
        tl.debug_barrier()
    tl.store(n_free, left)
    if LISTED:
        tl.store(misses, n_listed)
    if OF != OBJECTS:
        live = tl.load(done).to(tl.int64) == 0
        if AHEAD:
            tl.store(counts + 3, tl.load(counts + 3) + needed - had, mask=live)
        else:
            tl.store(counts, tl.load(counts) + needed, mask=live)
            tl.store(counts + 1, tl.load(counts + 1) + had, mask=live)
            tl.store(counts + 2, tl.load(counts + 2) + needed - had, mask=live)


@triton.jit(do_not_specialize=["first", "n_bytes"])
def _take(wishes, bytes_of, fidelity, ids, slot_of, object_of, stamp, held, ahead_of, free, n_free, clock, place, have,
          misses, source, need, counts, done, most, far, near, turn, first, n_bytes, n_columns, n_slots, far_expert16,
          far_object16, near16, OF: tl.constexpr, ROUTED: tl.constexpr, EACH: tl.constexpr, PREFIX: tl.constexpr,
          WHOLE: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, LISTED: tl.constexpr, TILE: tl.constexpr,
          OBJECTS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
          COPIES: tl.constexpr):
    """Grid: one block, or with COPIES any number, of which the first decides and all copy."""
    block = 0
    if COPIES:
        block = draw(turn)
    if block == 0:
        taken(wishes, bytes_of, fidelity, ids, slot_of, object_of, stamp, held, ahead_of, free, n_free, clock, place,
              have, misses, source, need, counts, done, most, first, n_bytes, n_columns, n_slots, OF, ROUTED, EACH,
              PREFIX, WHOLE, ROWS, AHEAD, LISTED, TILE)
        if COPIES:
            publish(turn)
    if COPIES:
        copied(turn, far, source, near, place, have, need, misses, block, far_expert16, far_object16, near16, OBJECTS,
               CHUNKS, CHUNK, ENTRIES)


def take(pool: Pool, objects: Tensor, need: Tensor, clock: int | Tensor, ahead: bool = False,
         misses: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.pool.take."""
    assert objects.dtype == need.dtype == torch.int32 and objects.is_contiguous() and need.is_contiguous()
    assert objects.shape == need.shape and (misses is None or misses.numel() > objects.numel())
    place, have = torch.empty_like(objects), torch.empty_like(need)
    none = place  # stands for a table that this list does not have
    _launch(pool, (objects, need, none, none), device_value(clock, objects.device), place, have,
            place if misses is None else misses, (none, none, none, none, none), 0, 0, None,
            OF=OBJECTS, ROUTED=1, EACH=1, PREFIX=0, WHOLE=0, AHEAD=ahead, LISTED=misses is not None)
    return place, have


def resolve_experts(pool: Pool, ids: Tensor, first: int, n_bytes: int, clock: Tensor, counts: Tensor, done: Tensor,
                    most_ahead: Tensor | None = None, link: Link | None = None) -> Resolved:
    """As kernels.resolve.resolve_experts."""
    ahead = most_ahead is not None
    assert ids.is_contiguous() and (not ahead or (len(ids) == 1 and ids.shape[1] <= LARGEST_TILE)), ids.shape
    return _resolve(pool, (ids, ids, ids, ids), clock, counts, done, most_ahead if ahead else clock, first, n_bytes,
                    link, OF=EXPERTS, ROUTED=1, EACH=1, PREFIX=0, WHOLE=0, AHEAD=ahead)


def resolve_neurons(pool: Pool, neurons: Tensor, fidelity: Tensor, ids: Tensor, first: int, layout: Layout,
                    clock: Tensor, counts: Tensor, done: Tensor, link: Link | None = None) -> Resolved:
    """As kernels.resolve.resolve_neurons."""
    assert neurons.dtype == torch.int32 and fidelity.dtype == torch.int8 and neurons.shape == fidelity.shape
    assert neurons.is_contiguous() and fidelity.is_contiguous() and ids.is_contiguous() and len(ids) == len(neurons)
    return _resolve(pool, (neurons, neurons, fidelity, ids), clock, counts, done, clock, first, 0, link,
                    OF=NEURONS, ROUTED=ids.shape[1], EACH=layout.neurons, PREFIX=layout.prefix, WHOLE=layout.record,
                    AHEAD=False)


def _resolve(pool: Pool, lists: tuple[Tensor, ...], clock: Tensor, counts: Tensor, done: Tensor, most: Tensor,
             first: int, n_bytes: int, link: Link | None, **constants) -> Resolved:
    assert counts.dtype == torch.int64 and counts.is_contiguous() and done.dtype == torch.bool, (counts, done)
    shape, device = lists[0].shape, lists[0].device
    assert lists[0].numel() * max(n_bytes, constants["WHOLE"]) < 2**31, "a layer's bytes are summed in 32 bits"
    found = new_resolved(shape, device)
    source, place, have, need, misses = found
    _launch(pool, lists, device_value(clock, device), place, have, misses,
            (source, need, counts, done.view(torch.uint8), most), first, n_bytes, link, LISTED=True, **constants)
    return found


def _launch(pool: Pool, lists: tuple[Tensor, ...], clock: Tensor, place: Tensor, have: Tensor, misses: Tensor,
            rest: tuple[Tensor, ...], first: int, n_bytes: int, link: Link | None, **constants) -> None:
    n_columns = place.shape[-1]
    tile = min(triton.next_power_of_2(max(n_columns, 32)), LARGEST_TILE)
    warps = tile // 32 if link is None else max(4, tile // 64)
    (*tables, expert16, object16, near16), copies = copying(link, place, warps)
    _take[(1 if link is None else COPYING_WARPS // warps,)](
        *lists, *pool, clock, place, have, misses, *rest, *tables, first, n_bytes, n_columns, len(pool.object_of),
        expert16, object16, near16, ROWS=place.numel() // max(1, n_columns), TILE=tile, num_warps=warps, **copies,
        **constants)
