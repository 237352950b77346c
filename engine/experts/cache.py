"""Near memory: arenas of equal slots under one byte limit, with the bookkeeping of kernels/pool.py and
kernels/evict.py.

`WholeCache` holds whole experts (levels `full` and `exact`), decoded to float32 and counted so. `SparseCache` holds
sketches and records packed, as they lie in the file; `BlobCache` whole experts packed, for the step that a device takes
alone. None ever holds more than `near_bytes`, bounce rows included. What moves, what is counted and when something is
evicted is decided in engine/experts/runtime.py; here only where things are.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from engine.core import UserError
from kernels.layout import Layout
from kernels.pool import Pool, new_pool, take

Tensor = torch.Tensor
Arena = Callable[[int], Tensor]  # bytes wanted -> uint8 of that many; asked for once every check has passed
KEEP_FREE = 4  # at most one slot in four is kept free for the next token


def whole_row_bytes(neurons: int, hidden: int) -> int:
    """Bytes of one decoded expert: gate, up and down in float32."""
    return 3 * neurons * hidden * 4


class NearMemory:
    """What every kind tells. near_bytes: of its arenas; smallest_bytes: the least that its levels run in."""

    layers: int
    near_bytes: int
    smallest_bytes: int

    def pools(self) -> list[tuple[Pool, int]]:
        """Each pool, with the slots that are kept free for the next token."""
        raise NotImplementedError

    def is_complete(self) -> bool:
        """Whether there is nothing left to fetch ahead, as far as can be told without waiting for a device."""
        return False

    def used_bytes(self) -> int:
        raise NotImplementedError

    def residency(self) -> list[float]:
        """Share of each layer's experts, or records, that is near."""
        pool = self.pools()[-1][0]
        return (pool.slot_of.view(self.layers, -1) >= 0).float().mean(1).tolist()


class _WholeExperts(NearMemory):
    """Object = layer * E + expert, row_bytes each; `bounce` rows serve experts that find no slot."""

    def __init__(self, layers: int, experts: int, top_k: int, row_bytes: int, bounce: int, near_bytes: int,
                 device: str) -> None:
        n_objects, n_rows = layers * experts, near_bytes // row_bytes
        self.row_bytes, self.smallest_bytes = row_bytes, bounce * row_bytes
        if n_rows < bounce:
            short = "hold no expert" if bounce == 1 else f"do not hold the {bounce} experts of a step"
            raise UserError(f"{near_bytes:,} bytes of near memory {short}; give at least {self.smallest_bytes:,}.")
        n_slots = n_objects if n_rows >= n_objects else n_rows - bounce
        self.keeps_all = n_slots == n_objects  # nothing is ever evicted
        self.pool = new_pool(n_objects, n_slots, device)
        self.n_rows = min(n_rows, n_objects)
        self.layers, self.near_bytes = layers, self.n_rows * row_bytes
        self.reserve = min(layers * top_k, max(1, n_slots // KEEP_FREE))

    def pools(self) -> list[tuple[Pool, int]]:
        return [(self.pool, self.reserve)]

    def used_bytes(self) -> int:
        return _resident(self.pool) * self.row_bytes


class WholeCache(_WholeExperts):
    """Decoded experts, brought and used one after the other, so that a single bounce row is enough."""

    def __init__(self, layers: int, experts: int, top_k: int, neurons: int, hidden: int, near_bytes: int,
                 device: str) -> None:
        super().__init__(layers, experts, top_k, whole_row_bytes(neurons, hidden), 1, near_bytes, "cpu")
        # Views: looking up one number in a tensor takes ten times longer.
        self._slot_of, self._stamp, self._ahead = (table.numpy() for table in (
            self.pool.slot_of, self.pool.stamp, self.pool.ahead))
        self.gate_up = torch.empty(self.n_rows, 2 * neurons, hidden, device=device)
        self.down = torch.empty(self.n_rows, neurons, hidden, device=device)

    def near(self, item: int, clock: int) -> int:
        """Row of an object that is near, used by token `clock`; else -1."""
        slot = int(self._slot_of[item])
        if slot >= 0:
            self._stamp[slot] = max(self._stamp[slot], clock)  # a pinned one's is later
            self._ahead[slot] = 0
        return slot

    def is_near(self, item: int) -> bool:
        return self._slot_of[item] >= 0

    def is_complete(self) -> bool:
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


class BlobCache(_WholeExperts):
    """Whole experts as they lie in the file, with bounce rows for one layer of one step."""

    def __init__(self, layout: Layout, layers: int, experts: int, top_k: int, near_bytes: int, device: str,
                 tokens: int = 1, arena: Arena | None = None) -> None:
        """tokens: of one step, at most."""
        n_routed = top_k * tokens
        super().__init__(layers, experts, n_routed, layout.blob_bytes, n_routed, near_bytes, device)
        self.blobs = (arena or _on(device))(self.near_bytes).view(self.n_rows, -1)


class SparseCache(NearMemory):
    """Packed sketches and records. When all sketches fit beside one layer's records they simply stay (`resident`)."""

    def __init__(self, layout: Layout, layers: int, experts: int, top_k: int, budgets: list[int], near_bytes: int,
                 device: str, tokens: int = 1, arena: Arena | None = None) -> None:
        """budgets: the most records a layer may need for one token, per layer; tokens: of one step, at most."""
        self.layout, self.layers = layout, layers
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

    def pools(self) -> list[tuple[Pool, int]]:
        """The sketches', then the records'."""
        return [(self.sketch_pool, self.sketch_reserve), (self.record_pool, self.record_reserve)]

    def is_complete(self) -> bool:
        return self.resident  # only sketches are fetched ahead

    def used_bytes(self) -> int:
        records = self.record_pool.held[self.record_pool.object_of >= 0].sum()
        return int(records) + _resident(self.sketch_pool) * self.layout.sketch_bytes


def pinnable(pool: Pool, reserve: int) -> int:
    """Slots that may be pinned: where not everything fits, a token needs some that come and go."""
    n_slots = len(pool.object_of)
    return n_slots if n_slots == len(pool.slot_of) else max(0, n_slots - reserve)


def _on(device: str) -> Arena:
    return lambda n_bytes: torch.empty(n_bytes, dtype=torch.uint8, device=device)


def _resident(pool: Pool) -> int:
    return len(pool.object_of) - int(pool.n_free)
