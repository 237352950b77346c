"""Near memory: arenas of equal slots under one byte limit, with the bookkeeping of kernels/pool.py and
kernels/evict.py.

`WholeCache` holds whole experts, `SparseCache` sketches and records, both packed as they lie in the file; `MappedCache`
is the file itself, where a processor has room for all of it. None ever holds more than `near_bytes`, bounce rows
included. What moves, what is counted and when something is evicted is decided in engine/experts/runtime.py; here only
where things are.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.core import UserError
from engine.experts.store import FarBlobs
from engine.planning.arena import ArenaSizes
from kernels.layout import ALIGN, Layout
from kernels.pool import Pool, new_pool

Tensor = torch.Tensor
Arena = Callable[[int], Tensor]  # bytes wanted -> uint8 of that many; asked for once every check has passed
KEEP_FREE = 4  # at most one slot in four is kept free for the next token


class NearMemory:
    """What every kind tells. near_bytes: of its arenas."""

    layers: int
    near_bytes: int
    kept = 0

    def pools(self) -> list[tuple[Pool, int]]:
        """Each pool, with the slots that are kept free for the next token."""
        raise NotImplementedError

    def rows(self, layer: int, records: bool) -> Tensor:
        """What the kernels read, at the places that a layer's experts (or sketches), or records, were given."""
        raise NotImplementedError

    def in_order(self, layer: int) -> Tensor | None:
        """A layer's sketches at their experts' numbers, where all of them stay for good."""
        return None

    def is_complete(self) -> bool:
        """Whether there is nothing left to fetch ahead, as far as can be told without waiting for a device."""
        return False

    def used_bytes(self) -> int:
        raise NotImplementedError

    def residency(self) -> list[float]:
        """Share of each layer's experts, or records, that is near."""
        pool = self.pools()[-1][0]
        return (pool.slot_of.view(self.layers, -1) >= 0).float().mean(1).tolist()


class _Divided(NearMemory):
    """An arena divided as engine/planning/arena.py does."""

    def __init__(self, sizes: ArenaSizes, layers: int, near_bytes: int, arena: Arena) -> None:
        if near_bytes < sizes.least_bytes:
            raise UserError(f"{near_bytes:,} bytes of near memory do not hold what a step needs at this level; give at "
                            f"least {sizes.least_bytes:,}.")
        self.layers, self.split = layers, sizes.divided(near_bytes)
        self.near_bytes = sizes.bytes_of(self.split)
        cut = self.split.rows * sizes.row_bytes
        rows, records = arena(self.near_bytes).split((cut, self.near_bytes - cut))
        self._rows, self._record_rows = rows.view(self.split.rows, -1), records

    @property
    def kept(self) -> int:
        """How many experts, the last ones, have every part near for good."""
        return self.split.kept


class WholeCache(_Divided):
    """Whole experts, with bounce rows for one layer of one step. Object = layer * E + expert."""

    def __init__(self, sizes: ArenaSizes, layers: int, near_bytes: int, device: str,
                 arena: Arena | None = None) -> None:
        super().__init__(sizes, layers, near_bytes, arena or _on(device))
        self.row_bytes, self.blobs = sizes.row_bytes, self._rows
        self.pool = new_pool(sizes.n_experts, self.split.slots, device)
        self.reserve = reserve_of(self.split.slots - self.split.kept, layers * sizes.bounce)

    def pools(self) -> list[tuple[Pool, int]]:
        return [(self.pool, self.reserve)]

    def rows(self, layer: int, records: bool) -> Tensor:
        return self.blobs

    def used_bytes(self) -> int:
        return _resident(self.pool) * self.row_bytes


class SparseCache(_Divided):
    """Packed sketches and records. When all sketches fit beside one layer's records they simply stay (`resident`)."""

    def __init__(self, layout: Layout, sizes: ArenaSizes, layers: int, token_records: int, near_bytes: int, device: str,
                 arena: Arena | None = None) -> None:
        """token_records: the most that a step may need of all layers together."""
        super().__init__(sizes, layers, near_bytes, arena or _on(device))
        self.layout, split = layout, self.split
        self.resident = split.slots == sizes.n_experts
        self.sketches, self.records = self._rows, self._record_rows.view(-1, layout.record)
        self.sketch_pool = new_pool(sizes.n_experts, split.slots, device)
        self.record_pool = new_pool(sizes.n_experts * sizes.neurons, split.record_slots, device)
        self.sketch_reserve = reserve_of(split.slots - split.kept, layers * sizes.bounce)
        self.record_reserve = reserve_of(split.record_slots - split.kept * sizes.neurons, token_records)

    def pools(self) -> list[tuple[Pool, int]]:
        """The sketches', then the records'."""
        return [(self.sketch_pool, self.sketch_reserve), (self.record_pool, self.record_reserve)]

    def rows(self, layer: int, records: bool) -> Tensor:
        return self.records if records else self.sketches

    def in_order(self, layer: int) -> Tensor | None:
        n = len(self.sketch_pool.slot_of) // self.layers  # a runtime brings them in order into an empty pool
        return self.sketches[layer * n:(layer + 1) * n] if self.resident else None

    def is_complete(self) -> bool:
        return self.resident  # only sketches are fetched ahead

    def used_bytes(self) -> int:
        records = self.record_pool.held[self.record_pool.object_of >= 0].sum()
        return int(records) + _resident(self.sketch_pool) * self.layout.sketch_bytes


class MappedCache(NearMemory):
    """All experts where the file's map has them: nothing is copied, nothing leaves, and every level finds its parts.

    An expert is near once it has been read for the first time. Places: of an expert its number in the layer; of a
    record the distance from the layer's first byte, in units of ALIGN bytes.
    """

    def __init__(self, far: FarBlobs) -> None:
        layout = far.layout
        self.layers, self.expert_bytes = far.layers, far.expert_bytes
        self.near_bytes = far.layers * far.experts * far.expert_bytes
        self.there = np.zeros((far.layers, far.experts), bool)
        self._blobs = [far.blobs(layer)[:, 0] for layer in range(far.layers)]
        # A record starts at any multiple of ALIGN: rows that overlap, of which only some are records.
        n_places = 1 + (far.experts * layout.blob_bytes - layout.record) // ALIGN
        self._records = [blobs.as_strided((n_places, layout.record), (ALIGN, 1)) for blobs in self._blobs]
        self._expert_at = np.arange(far.experts, dtype=np.int32) * (layout.blob_bytes // ALIGN)
        self._neuron_at = np.arange(layout.sketch_bytes, layout.blob_bytes, layout.record, dtype=np.int32) // ALIGN

    def pools(self) -> list[tuple[Pool, int]]:
        return []

    def rows(self, layer: int, records: bool) -> Tensor:
        return (self._records if records else self._blobs)[layer]

    def record_places(self, ids: Tensor, neurons: Tensor) -> Tensor:
        """ids [T, k], neurons [T, K] through a token's k experts one after the other -> int32 [T, K]; -1 gets any
        place."""
        places = self._expert_at[ids.numpy()][..., None] + self._neuron_at      # [T, k, I]
        first = np.arange(len(places))[:, None] * places[0].size
        return torch.from_numpy(places.ravel()[neurons.numpy() + first])

    def new(self, layer: int, ids: list[int]) -> list[int]:
        """Those of the experts that are not near yet."""
        there = self.there[layer]
        return [expert for expert in dict.fromkeys(ids) if not there[expert]]

    def is_complete(self) -> bool:
        return True  # the file is read ahead as a whole

    def used_bytes(self) -> int:
        return int(self.there.sum()) * self.expert_bytes

    def residency(self) -> list[float]:
        return self.there.mean(1).tolist()


def kept_objects(far: FarBlobs, near: NearMemory) -> list[range]:
    """Of every pool, what stays near for good: the last layers'."""
    n = far.layers * far.experts
    return [range((n - near.kept) * each, n * each) for each in (1, far.neurons)]


def pinnable(pool: Pool, reserve: int) -> int:
    """Slots that may be pinned: where not everything fits, a token needs some that come and go."""
    n_slots = len(pool.object_of)
    return n_slots if n_slots == len(pool.slot_of) else max(0, n_slots - reserve)


def reserve_of(n_slots: int, most: int) -> int:
    """Slots that are kept free for the next token, of those that come and go."""
    return min(most, max(1, n_slots // KEEP_FREE))


def _on(device: str) -> Arena:
    return lambda n_bytes: torch.empty(n_bytes, dtype=torch.uint8, device=device)


def _resident(pool: Pool) -> int:
    return len(pool.object_of) - int(pool.n_free)
