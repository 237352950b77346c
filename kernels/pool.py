"""Near memory's bookkeeping on the device: look objects up, give the missing ones a place. Nothing is evicted here.

A pool is an array of equal slots followed by a bounce area. A missing object takes a slot from the free stack, or,
when the stack is empty, a row of the bounce area that holds it for this layer only. Places count through both:
0 .. n_slots-1 are slots, n_slots .. are bounce rows. Slots return to the stack only in kernels/evict.py, between
tokens or (`free=layer`) before a layer asks, so nothing that a layer has looked up can disappear in it. A slot whose
stamp is PINNED never returns.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import twin

Tensor = torch.Tensor

PINNED = 2**31 - 1      # a stamp later than any token, which using the slot does not change


class Pool(NamedTuple):
    """The tables of one pool, all int32 on the device. N objects exist, S of them fit."""

    slot_of: Tensor    # [N] slot of an object, -1 when it is far
    object_of: Tensor  # [S] object in a slot, -1 when it is free
    stamp: Tensor      # [S] token that used the slot last, or PINNED
    held: Tensor       # [S] bytes of the object that are in the slot (a prefix or all)
    ahead: Tensor      # [S] 1 while an object fetched ahead has not been asked for
    free: Tensor       # [S] stack of free slots
    n_free: Tensor     # [1]


def new_pool(n_objects: int, n_slots: int, device: torch.device | str = "cpu") -> Pool:
    """An empty pool; slot 0 is handed out first."""
    def table(n: int, value: int) -> Tensor:
        return torch.full((n,), value, dtype=torch.int32, device=device)
    stack = torch.arange(n_slots - 1, -1, -1, dtype=torch.int32, device=device)
    return Pool(table(n_objects, -1), table(n_slots, -1), table(n_slots, -1), table(n_slots, 0), table(n_slots, 0),
                stack, table(1, n_slots))


def forget(pool: Pool) -> None:
    """Nothing is near any more, in the same tensors."""
    for table, empty in zip(pool, new_pool(len(pool.slot_of), len(pool.object_of), pool.stamp.device), strict=True):
        table.copy_(empty)


def pin(pool: Pool, objects: Tensor, clock: int | Tensor) -> None:
    """Those of `objects` (int [n]) that are near stay so until the next call; what was pinned before counts as used
    at `clock`. Between tokens only."""
    pool.stamp.copy_(torch.where(pool.stamp == PINNED, clock, pool.stamp))
    slots = pool.slot_of[objects.long()]
    pool.stamp[slots[slots >= 0].long()] = PINNED


@twin("kernels.gpu.pool", "kernels.cpu.pool")
def take(pool: Pool, objects: Tensor, need: Tensor, clock: int | Tensor, ahead: bool = False,
         misses: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Give every wanted object a place -> place int32, have int32: bytes of it that are there already.

    objects int32 [N], or [T, N] for the tokens of one step, taken row after row; none repeats within a row, -1 wants
    nothing and gets place -1. need int32, bytes wanted of each; place and have have the same shape. Where have < need
    the caller must `fill` bytes have..need before the place is read. clock: the token. ahead: a fetch ahead of demand;
    it takes free slots only, gives place -1 where there is none, and touches no stamp of what is already near.
    misses int32 [1 + T*N], if given, receives how many entries must be filled, then their positions, ascending.
    """
    place, have = torch.full_like(objects, -1), torch.zeros_like(need)
    bounced, rows = 0, objects.numel() // max(1, objects.shape[-1])  # a layer may keep no neuron at all
    for i, row in enumerate(objects.view(rows, -1) if rows else []):
        wanted = row >= 0
        row_need = need.view(rows, -1)[i][wanted]
        found = _take_row(pool, row[wanted], row_need, int(clock), ahead, len(pool.object_of) + bounced)
        place.view(-1, len(row))[i, wanted], have.view(-1, len(row))[i, wanted] = found
        bounced += int((found[0] >= len(pool.object_of)).sum())
    if misses is not None:
        missing = ((have < need) & (place >= 0)).flatten().nonzero()[:, 0]
        misses[0] = len(missing)
        misses[1:1 + len(missing)] = missing.int()
    return place, have


def _take_row(pool: Pool, objects: Tensor, need: Tensor, clock: int, ahead: bool, bounce_at: int,
              ) -> tuple[Tensor, Tensor]:
    slot = pool.slot_of[objects.long()]
    hit = slot >= 0
    missing = (~hit).nonzero()[:, 0]
    n_free = int(pool.n_free)
    n_new = min(n_free, len(missing))
    new = pool.free[n_free - n_new:n_free].flip(0)
    place = slot.clone()
    place[missing[:n_new]] = new
    bounce = torch.arange(bounce_at, bounce_at + len(missing) - n_new, dtype=torch.int32, device=slot.device)
    place[missing[n_new:]] = -1 if ahead else bounce
    have = torch.zeros_like(need)
    near = slot[hit].long()
    have[hit] = torch.minimum(pool.held[near], need[hit])
    _assign(pool, objects[missing[:n_new]], new.long(), need[missing[:n_new]], clock, ahead)
    _touch(pool, near, need[hit], clock, ahead)
    return place, have


def _assign(pool: Pool, objects: Tensor, slots: Tensor, need: Tensor, clock: int, ahead: bool) -> None:
    pool.slot_of[objects.long()] = slots.int()
    pool.object_of[slots] = objects
    pool.held[slots] = need
    pool.stamp[slots] = clock
    pool.ahead[slots] = int(ahead)
    pool.n_free.sub_(len(slots))


def _touch(pool: Pool, slots: Tensor, need: Tensor, clock: int, ahead: bool) -> None:
    pool.held[slots] = torch.maximum(pool.held[slots], need)
    if not ahead:
        pool.stamp[slots] = pool.stamp[slots].clamp(min=clock)
        pool.ahead[slots] = 0
