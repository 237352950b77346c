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
from kernels.layout import ALIGN, Layout
from kernels.pool import Pool, new_pool

Tensor = torch.Tensor
Arena = Callable[[int], Tensor]  # bytes wanted -> uint8 of that many; asked for once every check has passed
KEEP_FREE = 4  # at most one slot in four is kept free for the next token


class NearMemory:
    """What every kind tells. near_bytes: of its arenas."""

    layers: int
    near_bytes: int

    def pools(self) -> list[tuple[Pool, int]]:
        """Each pool, with the slots that are kept free for the next token."""
        raise NotImplementedError

    def rows(self, layer: int, records: bool) -> Tensor:
        """What the kernels read, at the places that a layer's experts (or sketches), or records, were given."""
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


class WholeCache(NearMemory):
    """Whole experts, with bounce rows for one layer of one step. Object = layer * E + expert."""

    def __init__(self, row_bytes: int, layers: int, experts: int, top_k: int, near_bytes: int, device: str,
                 tokens: int = 1, arena: Arena | None = None) -> None:
        """row_bytes: of one expert. tokens: of one step, at most."""
        bounce = top_k * tokens
        n_objects, n_rows = layers * experts, near_bytes // row_bytes
        if n_rows < bounce:
            raise UserError(f"{near_bytes:,} bytes of near memory do not hold the {bounce} experts of a step; give at "
                            f"least {bounce * row_bytes:,}.")
        self.row_bytes, self.n_rows = row_bytes, min(n_rows, n_objects)
        n_slots = n_objects if n_rows >= n_objects else n_rows - bounce
        self.pool = new_pool(n_objects, n_slots, device)
        self.layers, self.near_bytes = layers, self.n_rows * row_bytes
        self.reserve = min(layers * bounce, max(1, n_slots // KEEP_FREE))
        self.blobs = (arena or _on(device))(self.near_bytes).view(self.n_rows, -1)

    def pools(self) -> list[tuple[Pool, int]]:
        return [(self.pool, self.reserve)]

    def rows(self, layer: int, records: bool) -> Tensor:
        return self.blobs

    def used_bytes(self) -> int:
        return _resident(self.pool) * self.row_bytes


class SparseCache(NearMemory):
    """Packed sketches and records. When all sketches fit beside one layer's records they simply stay (`resident`)."""

    def __init__(self, layout: Layout, layers: int, experts: int, top_k: int, budgets: list[int], near_bytes: int,
                 device: str, tokens: int = 1, arena: Arena | None = None) -> None:
        """budgets: the most records a layer may need for one token, per layer; tokens: of one step, at most."""
        self.layout, self.layers = layout, layers
        top_k, budgets = top_k * tokens, [n * tokens for n in budgets]
        n_sketches, n_records = layers * experts, layers * experts * layout.neurons
        least = least_sparse(layout, top_k, max(budgets))
        if near_bytes < least:
            raise UserError(f"{near_bytes:,} bytes of near memory are too few at this level; give at least {least:,}.")
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

    def rows(self, layer: int, records: bool) -> Tensor:
        return self.records if records else self.sketches

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
        """ids [1, k], neurons [1, K] through the k experts one after the other -> int32 [1, K]; -1 gets any place."""
        places = self._expert_at[ids[0].numpy()][:, None] + self._neuron_at
        return torch.from_numpy(places.ravel()[neurons.numpy()])

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


def least_sparse(layout: Layout, experts: int, records: int) -> int:
    """The least near memory for a step that routes to so many experts and keeps so many neurons of a layer."""
    return experts * layout.sketch_bytes + records * layout.record


def pinnable(pool: Pool, reserve: int) -> int:
    """Slots that may be pinned: where not everything fits, a token needs some that come and go."""
    n_slots = len(pool.object_of)
    return n_slots if n_slots == len(pool.slot_of) else max(0, n_slots - reserve)


def _on(device: str) -> Arena:
    return lambda n_bytes: torch.empty(n_bytes, dtype=torch.uint8, device=device)


def _resident(pool: Pool) -> int:
    return len(pool.object_of) - int(pool.n_free)
