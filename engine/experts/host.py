"""The runtime of the processor: whole experts decoded to float32, one after the other; the reference of the device's.

At the sparse levels a step is the base's own, one token at a time, over the kernels' references. Prefill takes the
dense path: whole experts at their 4-bit values. Far memory is verified as it is first used.
"""
from __future__ import annotations

import torch

from engine.core import SPARSE_LEVELS
from engine.experts.cache import NearMemory, SparseCache, WholeCache, whole_row_bytes
from engine.experts.layer import LayerExperts, Rows
from engine.experts.runtime import Runtime

Tensor = torch.Tensor


class HostRuntime(Runtime):
    """Steps of one token; hidden states may have any dtype, and may lie on a card."""

    fixed_shapes = False  # FloE's rule lists what it keeps, and no more

    @property
    def whole_bytes(self) -> int:
        return whole_row_bytes(self.far.neurons, self.far.hidden)

    def _new_cache(self) -> NearMemory:
        far, wish = self.far, self.everything_bytes() if self.near_wish is None else self.near_wish
        if self.level in SPARSE_LEVELS:
            return SparseCache(far.layout, far.layers, far.experts, self.top_k, self._most_records(), wish, self.device)
        return WholeCache(far.layers, far.experts, self.top_k, far.neurons, far.hidden, wish, self.device)

    # --- bytes on their way -------------------------------------------------------------------------------------
    def _bring_experts(self, layer: int, ids: Tensor, most_ahead: Tensor | None = None) -> Tensor:
        self._verify(layer, ids)
        return super()._bring_experts(layer, ids, most_ahead)

    def _fetch_ahead(self, layer: int, ids: Tensor) -> None:
        self.counts[3] += self._bring(layer, ids[0].int(), ahead=True)

    def _bring(self, layer: int, ids: Tensor, records: bool = False, ahead: bool = False) -> Tensor | int:
        if self.sparse:
            self._verify(layer, ids // self.far.neurons if records else ids)
            return super()._bring(layer, ids, records, ahead)
        missing = [e for e in ids.tolist() if not self.whole.is_near(layer * self.far.experts + e)]
        rows = [self._read(self.layers[layer], expert, ahead) for expert in missing]
        return sum(row >= 0 for row in rows) * self.far.expert_bytes

    def _verify(self, layer: int, ids: Tensor) -> None:
        for expert in ids.unique().tolist():
            self.far.verify(layer, expert)

    def _read(self, layer: LayerExperts, expert: int, ahead: bool = False) -> int:
        """An expert that is far into a row of near memory -> the row; -1 when ahead finds no free one."""
        item = layer.index * self.far.experts + expert
        row = self.whole.place(item, int(self.clock), ahead)
        if row >= 0:
            try:
                self.far.decode(layer.index, expert, *layer.halves(self.whole.gate_up[row]), self.whole.down[row])
            except BaseException:
                self.whole.forget(item)  # its row holds no expert
                raise
        return row

    # --- a step -------------------------------------------------------------------------------------------------
    def _whole(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One token through whole experts, one after the other, so that a single bounce row is enough."""
        chosen, clock, n_far, sums = ids[0].tolist(), int(self.clock), 0, []
        for expert in chosen:
            row = self.whole.near(layer.index * self.far.experts + expert, clock)
            if row < 0:
                row, n_far = self._read(layer, expert), n_far + 1
            sums.append(layer.whole(x, self.whole.gate_up[row], self.whole.down[row], expert))
        counted = torch.tensor((len(chosen), len(chosen) - n_far, n_far, 0, 0))
        self.counts.add_(counted * self.far.expert_bytes)
        self._look_ahead(layer, x)
        return weights @ torch.cat(sums)

    # --- prefill ------------------------------------------------------------------------------------------------
    def _prefill(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every routed expert once, in order, over the tokens that chose it."""
        x, weights = x.float(), weights.float()
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=self.far.experts).tolist()
        tokens, share = order // ids.shape[1], weights.flatten()[order, None]
        out, at, scratch = torch.zeros_like(x), 0, None if self.whole else self._scratch()
        for expert, count in enumerate(counts[:self.far.experts]):
            if count:
                rows = tokens[at:at + count]
                gate_up, down = self._for_prefill(layer, expert, scratch)
                out.index_add_(0, rows, layer.whole(x[rows], gate_up, down, expert) * share[at:at + count])
                at += count
        return out

    def _for_prefill(self, layer: LayerExperts, expert: int, scratch: Rows | None) -> Rows:
        """gate_up [2I, H] and down [I, H] of one expert until the next call: from near, or read."""
        if self.whole:
            row = self.whole.near(layer.index * self.far.experts + expert, int(self.clock))
            if row < 0:
                row = self._read(layer, expert)
                self.prefill_far_bytes += self.far.expert_bytes
            return self.whole.gate_up[row], self.whole.down[row]
        gate_up, down = scratch
        self.far.decode(layer.index, expert, *layer.halves(gate_up), down)
        self.prefill_far_bytes += self.far.expert_bytes
        return gate_up, down

    def _scratch(self) -> Rows:
        """Room for one decoded expert during a prefill call, where near memory holds packed ones."""
        n, h = self.far.neurons, self.far.hidden
        return torch.empty(2 * n, h, device=self.device), torch.empty(n, h, device=self.device)
