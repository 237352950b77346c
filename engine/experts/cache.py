"""Near memory: arenas of equal slots under one byte limit, with the bookkeeping of kernels/pool.py and
kernels/evict.py.

`WholeCache` holds whole experts (levels `full` and `exact`), decoded to float32 and counted so. `SparseCache` holds
sketches and records packed, as they lie in the file; `BlobCache` whole experts packed, for the step that a device takes
alone. None ever holds more than `near_bytes`, bounce rows included.
Policy and counting live in engine/experts/host.py; here it is only decided where things are.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from engine.core import UserError
from kernels.evict import age
from kernels.fill import fill
from kernels.layout import Layout
from kernels.pool import Pool, new_pool, take

Tensor = torch.Tensor
Arena = Callable[[int], Tensor]  # bytes wanted -> uint8 of that many; asked for once every check has passed
KEEP_FREE = 4  # at most one slot in four is kept free for the next token


def whole_row_bytes(neurons: int, hidden: int) -> int:
    """Bytes of one decoded expert: gate, up and down in float32."""
    return 3 * neurons * hidden * 4


class WholeCache:
    """Decoded experts. Object = layer * E + expert; one bounce row serves an expert that finds no slot."""

    def __init__(self, layers: int, experts: int, top_k: int, neurons: int, hidden: int, near_bytes: int,
                 device: str) -> None:
        self.row_bytes = whole_row_bytes(neurons, hidden)
        n_objects, n_rows = layers * experts, near_bytes // self.row_bytes
        if n_rows < 1:
            raise UserError(f"{near_bytes:,} bytes of near memory hold no expert; give at least {self.row_bytes:,}.")
        n_slots = n_objects if n_rows >= n_objects else n_rows - 1
        self.pool = new_pool(n_objects, n_slots)
        self.keeps_all = n_slots == n_objects  # nothing is ever evicted
        self._slot_of = self.pool.slot_of.numpy()  # a view: looking up one number in a tensor takes ten times longer
        n_rows = min(n_rows, n_objects)
        self.gate_up = torch.empty(n_rows, 2 * neurons, hidden, device=device)
        self.down = torch.empty(n_rows, neurons, hidden, device=device)
        self.layers, self.near_bytes = layers, n_rows * self.row_bytes
        self.reserve = min(layers * top_k, max(1, n_slots // KEEP_FREE))
        self._used: list[int] = []

    def near(self, item: int) -> int:
        """Row of an object that is near, else -1. Remembered as used in this token."""
        slot = int(self._slot_of[item])
        if slot >= 0 and not self.keeps_all:
            self._used.append(slot)
        return slot

    def is_near(self, item: int) -> bool:
        return self._slot_of[item] >= 0

    def is_complete(self) -> bool:
        """Whether there is nothing left to fetch ahead."""
        return self.keeps_all and int(self.pool.n_free) == 0

    def place(self, item: int, clock: int, ahead: bool = False) -> int:
        """Row for an object that is far; the caller fills it at once. -1 when ahead finds no free slot."""
        place, _ = take(self.pool, torch.tensor([item], dtype=torch.int32), torch.ones(1, dtype=torch.int32), clock,
                        ahead)
        return int(place)

    def forget(self, item: int) -> None:
        """Free the slot of an object that could not be read."""
        slot = int(self.pool.slot_of[item])
        if slot >= 0:
            self.pool.slot_of[item] = self.pool.object_of[slot] = -1
            self.pool.ahead[slot] = 0
            self.pool.free[int(self.pool.n_free)] = slot
            self.pool.n_free.add_(1)

    def end_token(self, clock: int) -> int:
        """Stamp what was used, evict the oldest; returns the bytes fetched ahead in vain."""
        if self.keeps_all:
            return 0
        if self._used:
            used = torch.tensor(self._used)
            self.pool.stamp[used] = self.pool.stamp[used].clamp(min=clock)
            self.pool.ahead[used] = 0
            self._used.clear()
        return int(age(self.pool, clock, self.reserve)[1])

    def pools(self) -> list[tuple[Pool, int]]:
        """The one pool, with the slots that a token is kept free."""
        return [(self.pool, self.reserve)]

    def used_bytes(self) -> int:
        return _resident(self.pool) * self.row_bytes

    def residency(self) -> list[float]:
        return (self.pool.slot_of.view(self.layers, -1) >= 0).float().mean(1).tolist()


class SparseCache:
    """Packed sketches and records. When all sketches fit beside one layer's records they simply stay."""

    def __init__(self, layout: Layout, layers: int, experts: int, top_k: int, budgets: list[int], near_bytes: int,
                 device: str, tokens: int = 1, arena: Arena | None = None) -> None:
        """budgets: the most records a layer may need for one token, per layer; tokens: of one step, at most."""
        self.layout, self.layers, self.experts = layout, layers, experts
        top_k, budgets = top_k * tokens, [n * tokens for n in budgets]
        n_sketches, n_records = layers * experts, layers * experts * layout.neurons
        self.smallest_bytes = top_k * layout.sketch_bytes + max(budgets) * layout.record
        if near_bytes < self.smallest_bytes:
            raise UserError(f"{near_bytes:,} bytes of near memory are too few at this level; "
                            f"give at least {self.smallest_bytes:,}.")
        spare = near_bytes - max(budgets) * layout.record
        self.resident = spare >= n_sketches * layout.sketch_bytes
        rows = n_sketches if self.resident else max(top_k, 3 * spare // 4 // layout.sketch_bytes)
        bounce = 0 if self.resident else top_k
        self.sketch_pool = new_pool(n_sketches, rows - bounce, device)
        spare -= rows * layout.sketch_bytes
        slots = min(n_records, spare // layout.record)
        self.record_pool = new_pool(n_records, slots, device)
        sizes = rows * layout.sketch_bytes, (slots + max(budgets)) * layout.record
        sketches, records = (arena or _on(device))(sum(sizes)).split(sizes)
        self.sketches, self.records = sketches.view(rows, -1), records.view(-1, layout.record)
        self.near_bytes = self.sketches.numel() + self.records.numel()
        self.record_reserve = min(sum(budgets), max(1, slots // KEEP_FREE))
        self.sketch_reserve = min(layers * top_k, max(1, (rows - bounce) // KEEP_FREE))

    def preload(self, sketches_of: Callable[[int], Tensor]) -> None:
        """Fill all sketches when they fit; sketches_of(layer) is uint8 [E, 1, sketch_bytes]."""
        if not self.resident:
            return
        for layer in range(self.layers):
            ids = torch.arange(self.experts, dtype=torch.int32, device=self.sketches.device)
            self.take_sketches(layer, ids, sketches_of(layer), 0)

    def is_complete(self) -> bool:
        """Whether there is nothing left to fetch ahead: sketches are all that is."""
        return self.resident

    def take_sketches(self, layer: int, ids: Tensor, far: Tensor, clock: int, ahead: bool = False) -> tuple:
        """Sketches of experts `ids` [n] near, fetched where missing -> place int32 [n], fetched bytes, needed bytes."""
        need = torch.full_like(ids, self.layout.sketch_bytes)
        place, have = take(self.sketch_pool, ids + layer * self.experts, need, clock, ahead)
        fill(far, ids, self.sketches, place, have, need)
        return place, int((need - have)[place >= 0].sum()), int(need.sum())

    def take_records(self, layer: int, items: Tensor, need: Tensor, far: Tensor, clock: int,
                     ahead: bool = False) -> tuple:
        """Records `items` [n] = expert * I + neuron near -> place int32 [n], fetched bytes, needed bytes."""
        if not len(items):  # FloE's rule may keep nothing
            return items, 0, 0
        per_layer = self.experts * self.layout.neurons
        place, have = take(self.record_pool, items + layer * per_layer, need, clock, ahead)
        fill(far, items, self.records, place, have, need)
        return place, int((need - have)[place >= 0].sum()), int(need.sum())

    def end_token(self, clock: int) -> int:
        """Evict the oldest; returns the bytes fetched ahead in vain."""
        wasted = int(age(self.record_pool, clock, self.record_reserve)[1]) * self.layout.record
        if not self.resident:
            wasted += int(age(self.sketch_pool, clock, self.sketch_reserve)[1]) * self.layout.sketch_bytes
        return wasted

    def pools(self) -> list[tuple[Pool, int]]:
        """Of sketches and of records, each with the slots that a token is kept free."""
        return [(self.sketch_pool, self.sketch_reserve), (self.record_pool, self.record_reserve)]

    def used_bytes(self) -> int:
        records = self.record_pool.held[self.record_pool.object_of >= 0].sum()
        return int(records) + _resident(self.sketch_pool) * self.layout.sketch_bytes

    def residency(self) -> list[float]:
        return (self.record_pool.slot_of.view(self.layers, -1) >= 0).float().mean(1).tolist()


class BlobCache:
    """Whole experts as they lie in the file. Object = layer * E + expert; bounce rows for one layer of one step."""

    def __init__(self, layout: Layout, layers: int, experts: int, top_k: int, near_bytes: int, device: str,
                 tokens: int = 1, arena: Arena | None = None) -> None:
        self.row_bytes = layout.blob_bytes
        bounce = top_k * tokens
        n_objects, n_rows = layers * experts, near_bytes // layout.blob_bytes
        self.smallest_bytes = bounce * layout.blob_bytes
        if n_rows < bounce:
            raise UserError(f"{near_bytes:,} bytes of near memory do not hold the {bounce} experts of a step; "
                            f"give at least {self.smallest_bytes:,}.")
        n_slots = n_objects if n_rows >= n_objects else n_rows - bounce
        self.keeps_all = n_slots == n_objects
        self.pool = new_pool(n_objects, n_slots, device)
        n_rows = min(n_rows, n_objects)
        self.blobs = (arena or _on(device))(n_rows * layout.blob_bytes).view(n_rows, -1)
        self.layers, self.near_bytes = layers, self.blobs.numel()
        self.reserve = min(layers * bounce, max(1, n_slots // KEEP_FREE))

    def pools(self) -> list[tuple[Pool, int]]:
        """The one pool, with the slots that a token is kept free."""
        return [(self.pool, self.reserve)]

    def used_bytes(self) -> int:
        return _resident(self.pool) * self.row_bytes

    def residency(self) -> list[float]:
        return (self.pool.slot_of.view(self.layers, -1) >= 0).float().mean(1).tolist()


def pinnable(pool: Pool, reserve: int) -> int:
    """Slots that may be pinned: where not everything fits, a token needs some that come and go."""
    n_slots = len(pool.object_of)
    return n_slots if n_slots == len(pool.slot_of) else max(0, n_slots - reserve)


def _on(device: str) -> Arena:
    return lambda n_bytes: torch.empty(n_bytes, dtype=torch.uint8, device=device)


def _resident(pool: Pool) -> int:
    return len(pool.object_of) - int(pool.n_free)
