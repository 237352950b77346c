"""The runtime on a processor: packed experts computed where the file's map has them, or in an arena of their own.

With near memory for everything nothing is copied: the map is near memory, which the system is asked to read ahead, and
an expert becomes near at its first use, when its checksum is looked at. With less there is an arena as on a card; what
is missing is copied from the map, what the next layer is likely to want beside the computing. Prefill takes a few
experts at a time, each code once for all tokens that it meets.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

import numpy as np
import torch

from engine.experts.cache import MappedCache, NearMemory
from engine.experts.layer import LayerExperts
from engine.experts.prefill import by_experts
from engine.experts.runtime import Runtime
from engine.experts.side_stream import SideThread
from kernels.activation import quantize_activation
from kernels.dense import dense, grouped
from kernels.select import DOWN_ONLY
from kernels.trunk.token import Mapped
from kernels.weigh import weighed

Tensor = torch.Tensor
PICKS = 512  # of prefill, at least, that are computed in one call: work for 16 threads; each takes 20 bytes of H


class HostRuntime(Runtime):
    """Steps of one token; hidden states may have any dtype, and may lie on a card."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self._mapped: MappedCache | None = None
        super().__init__(*given, **named)
        self._side, self.histogram = SideThread(), None  # a processor's choice counts for itself

    def __deepcopy__(self, memo: dict) -> HostRuntime:
        """One with near memory of its own over the same far memory and the same layers, neither of which changes."""
        memo[id(self)] = own = HostRuntime(self.far, self.layers, self.top_k, dict(self.plans), self.level,
                                           self.near_wish, self.predict, tokens=self.tokens)
        own.phase = self.phase
        return own

    def everything_bytes(self) -> int:
        return self.far.layers * self.far.experts * self.whole_bytes  # nothing bounces

    def _new_cache(self) -> NearMemory:
        if self.near_wish is not None and self.near_wish < self.everything_bytes():
            return super()._new_cache()
        self._drop_arena()
        if self._mapped is None:
            self._mapped = MappedCache(self.far)
            Thread(target=self.far.read_ahead, name="read ahead", daemon=True).start()
        return self._mapped

    @property
    def is_mapped(self) -> bool:
        """Whether near memory is the file's map, of which the process holds nothing for itself."""
        return self.near is self._mapped

    def _quantized(self, x: Tensor) -> tuple[Tensor, ...]:
        layout = self.far.layout
        return quantize_activation(x, layout.group, layout.padded)  # values are quantised by the product itself

    def _budget(self, layer: int) -> tuple[int, int]:
        return self.kept_neurons[layer]  # a step here is never recorded

    def _whole(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None,
               ) -> Callable[[], Tensor]:
        """As in runtime.py; what a hook leaves far is computed where the file's map has it. An expert's sums do not
        depend on where it lies, nor on what is computed beside it."""
        far = None
        if self.hook is not None and not self.is_mapped:
            far = self.hook.stays_far(layer.index, torch.where(weights == 0, -1, ids))
        if far is None or not bool(far.any()):
            return super()._whole(layer, x, ids, weights, residual)
        far = far[0]
        here, layout = ids[:, far], self.far.layout
        self._verify(layer.index, here[0].tolist())
        self.counts[0] += self._object_bytes * here.shape[1]  # wanted; it is neither near nor does it come
        sums = torch.zeros(1, ids.shape[1], layout.padded)
        sums[:, far] = dense(x, self.far.blobs(layer.index)[:, 0], here.int(), layout, layer.gate,
                             layer.neuron_bias(here))
        if not bool(far.all()):
            rest = ids[:, ~far]
            place = self._demand(layer.index, rest, weights[:, ~far])
            self._side.join()  # a shortcut's, on their way
            sums[:, ~far] = dense(x, self.near.rows(layer.index, False), place, layout, layer.gate,
                                  layer.neuron_bias(rest))
        product = partial(weighed, sums)
        return partial(self._mixed, layer, x, product, ids, weights, residual)

    # --- bytes on their way -------------------------------------------------------------------------------------
    def _bring_experts(self, layer: int, ids: Tensor, most_ahead: Tensor | None = None) -> Tensor:
        chosen = [expert for expert in ids.flatten().tolist() if expert >= 0]
        if not self.is_mapped:
            self._verify(layer, chosen)
            return super()._bring_experts(layer, ids, most_ahead)
        self._count(self._object_bytes * len(chosen))
        if self.predict and self.has_gaps and self.near.new(layer, chosen):
            self._side.run(partial(self.fetch, layer, chosen))
        else:
            self.fetch(layer, chosen)
        return ids.int()

    def _bring_neurons(self, layer: int, ids: Tensor, neurons: Tensor, fidelity: Tensor) -> Tensor:
        if not self.is_mapped:
            return super()._bring_neurons(layer, ids, neurons, fidelity)
        layout, there = self.far.layout, neurons.numpy() >= 0
        n_prefixes = np.count_nonzero(there & (fidelity.numpy() == DOWN_ONLY))
        self._count(np.count_nonzero(there) * layout.record - n_prefixes * (layout.record - layout.prefix))
        return self.near.record_places(ids, neurons)

    def bring(self, layer: int, ids: Tensor, records: bool = False, ahead: bool = False) -> Tensor | int:
        self._verify(layer, (ids // self.far.neurons if records else ids).tolist())
        return super().bring(layer, ids, records, ahead)

    def fetch(self, layer: int, ids: list[int]) -> None:
        """Experts of the map that a step was counted for: those that were not near yet are read and are far bytes."""
        n_new, each = self._read(layer, ids), self._object_bytes
        if not n_new:
            return
        # What a sparse level does not want of an expert yet has come with the rest of it.
        self._count(0, each * n_new, (self.far.expert_bytes - each) * n_new)

    def _read(self, layer: int, ids: list[int]) -> int:
        """Experts of the map that were not near yet -> how many."""
        new = self.near.new(layer, ids)
        if new:
            self.far.will_need(layer, new)
            self._verify(layer, new)
            self.near.there[layer, new] = True
        return len(new)

    def _verify(self, layer: int, ids: list[int]) -> None:
        for expert in ids:
            self.far.verify(layer, expert)

    def _count(self, needed: int, far: int = 0, ahead: int = 0) -> None:
        counts = self.counts.numpy()  # a tensor's own addition takes ten times longer
        for which, n_bytes in enumerate((needed, needed - far, far, ahead)):
            counts[which] += n_bytes

    # --- a token that is computed in one call (engine/model/host_token.py) ---------------------------------------
    def in_place(self) -> bool:
        """Whether nothing has to be done between a token's layers but to fetch what is not near yet."""
        return self.is_mapped and self.hook is None and self.phase != "prefill" and self.level != "floe"

    def mapped(self, layer: LayerExperts) -> Mapped | None:
        """None where something has to be done behind the kernels."""
        if layer.biases or layer.post_norm is not None:
            return None
        near, budget = self._mapped, self.kept_neurons[layer.index] if self.is_sparse else None
        return Mapped(near.rows(layer.index, False), near.there[layer.index], self.far.layout, layer.gate, budget)

    def token_began(self) -> None:
        """Before its first layer; counts what all of its layers want."""
        self._begin_step()
        n, layout = self.far.layers * self.top_k, self.far.layout
        kept = self.kept_neurons if self.is_sparse else []
        self._count(self._object_bytes * n + sum(refined * layout.record + (total - refined) * layout.prefix
                                                 for refined, total in kept))

    def token_ended(self, ids: Tensor) -> None:
        """ids int32 [L, k], the experts that it was routed to."""
        self.busy.count_here(ids)

    # --- prefill ------------------------------------------------------------------------------------------------
    def _prefill(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return by_experts(x, ids, weights, partial(self._products, layer), PICKS)

    def _products(self, layer: LayerExperts, experts: list[int], counts: list[int], x: Tensor) -> Tensor:
        """Whole experts at their 4-bit values, each over its own of x [n, H], which follow one another -> [n, H]."""
        blobs, ids = [self._blob(layer.index, expert) for expert in experts], torch.tensor(experts)
        y = grouped(x, blobs, counts, self.far.layout, layer.gate, layer.neuron_bias(ids))
        return layer.finish(y[:, :self.far.hidden], ids.repeat_interleave(torch.tensor(counts)))

    def _blob(self, layer: int, expert: int) -> Tensor:
        """uint8 [blob_bytes]: from near, or read."""
        if self.is_mapped:
            self.prefill_far_bytes += self._read(layer, [expert]) * self.far.expert_bytes
            return self.near.rows(layer, False)[expert]
        if not self.is_sparse:
            slot = int(self.near.pool.slot_of[layer * self.far.experts + expert])
            if slot >= 0:
                return self.near.blobs[slot]
        self.far.verify(layer, expert)
        self.prefill_far_bytes += self.far.expert_bytes
        return self.far.blobs(layer)[expert, 0]
