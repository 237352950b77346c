"""The runtime of an uncompressed checkpoint (level `full`): whole experts in float32, read one by one, computed by
torch on the processor. The naive baseline; near memory holds rows of one expert each.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from engine.experts.layer import LayerExperts, Rows
from engine.experts.prefill import expert_by_expert
from engine.experts.runtime import Runtime

Tensor = torch.Tensor


class FullRuntime(Runtime):
    """Steps of one token; hidden states may have any dtype, and may lie on a card."""

    @property
    def whole_bytes(self) -> int:
        return 3 * self.far.neurons * self.far.hidden * 4

    def _matrices(self, row: Tensor) -> Rows:
        """Of an expert whose bytes are `row`: gate_up [2I, H] in the module's own order, down [I, H]."""
        n = self.far.neurons
        return row.view(torch.float32).view(3 * n, self.far.hidden).split((2 * n, n))

    def _copy(self, layer: int, records: bool, *found: Tensor) -> None:
        source, place, have, need, *_ = (table.flatten() for table in found)
        wanted = (have < need) & (place >= 0)
        try:
            for expert, slot in zip(source[wanted].tolist(), place[wanted].tolist(), strict=True):
                self._read(self.layers[layer], expert, self.near.blobs[slot])
        except BaseException:
            self.reset()  # a slot that was given holds no expert
            raise

    def _read(self, layer: LayerExperts, expert: int, row: Tensor) -> None:
        gate_up, down = self._matrices(row)
        self.far.decode(layer.index, expert, *layer.halves(gate_up), down)

    def _whole(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None,
               ) -> Callable[[], Tensor]:
        """One token, one expert after the other."""
        place = self._bring_experts(layer.index, ids)

        def rest() -> Tensor:
            self._look_ahead(layer, x)
            done = [layer.whole(x, *self._matrices(self.near.blobs[slot]), expert) if expert >= 0 else zeros
                    for expert, slot in zip(ids[0].tolist(), place[0].tolist(), strict=True)]
            out = weights @ torch.cat(done)
            return out if residual is None else residual + out
        zeros = torch.zeros_like(x)
        return rest

    def _prefill(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return expert_by_expert(x, ids, weights, lambda expert, rows: layer.whole(
            rows, *self._matrices(self._row(layer.index, expert)), expert))

    def _row(self, layer: int, expert: int) -> Tensor:
        """The near row of an expert until the next call: its slot, or the first bounce row."""
        pool, _ = self.near.pools()[0]
        self.prefill_far_bytes += int(self.bring(layer, torch.tensor([expert], dtype=torch.int32)))
        slot = int(pool.slot_of[layer * self.far.experts + expert])
        return self.near.blobs[slot if slot >= 0 else len(pool.object_of)]
