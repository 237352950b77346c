"""The experts implementation that transformers calls, and the runtime behind it: policy, counting, the token's clock.

Decode (`phase == "decode"`) goes through the near cache: whole experts at levels `full` and `exact`, sketch, score,
select, fetch, apply at the sparse ones. Prefill takes the dense path: whole experts at their 4-bit values, those that
are near from near. A token ends, and near memory ages, when the first MoE layer is called for the next one. Results do
not depend on what is near, nor on prediction. Weights are float32 here; hidden states may have any dtype.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from engine.core import SPARSE_LEVELS, Counters, UserError
from engine.experts.cache import SparseCache, WholeCache, pinnable, whole_row_bytes
from engine.experts.store import Far, FarBlobs
from engine.machine.pinned_memory import HostMemory
from kernels.activation import Gate, quantize_activation
from kernels.apply import apply
from kernels.evict import age
from kernels.pool import Pool, pin
from kernels.score import score, score_up
from kernels.select import DOWN_ONLY, select, select_above

Tensor = torch.Tensor
Rows = tuple[Tensor, Tensor]  # gate_up [2I, H] in the module's own order, down [I, H]
FADE = 0.97  # of an expert's activity per token: about the last 30 tokens are seen


@dataclass(frozen=True)
class LevelPlan:
    """What calibration found for a sparse level: per layer (refined, down-only) neurons, or FloE's thresholds.

    budgets: L pairs; thresholds: L rows of E numbers, only for level `floe`.
    """

    budgets: tuple[tuple[int, int], ...] = ()
    thresholds: tuple[tuple[float, ...], ...] = ()


@dataclass
class LayerExperts:
    """What one experts module needs to compute: bound once, when the model is loaded.

    join: gate, up [.., I] -> gate_up in the module's own order; apply_gate: gate_up -> product [.., I].
    """

    index: int
    interleaved: bool
    apply_gate: Callable[[Tensor], Tensor]
    biases: dict[str, Tensor]
    post_norm: Callable[[Tensor], Tensor] | None = None
    router_weight: Tensor | None = None  # [E, H], for prediction
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.gate = Gate("other", function=lambda g, u: self.apply_gate(self.join(g, u)))
        if self.biases:
            self.gate_up_bias = self.join(self.biases["gate_bias"], self.biases["up_bias"])

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)

    def halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the rows of gate and of up in [2I, H]."""
        half = gate_up.shape[0] // 2
        return (gate_up[::2], gate_up[1::2]) if self.interleaved else (gate_up[:half], gate_up[half:])

    def whole(self, x: Tensor, gate_up: Tensor, down: Tensor, expert: int) -> Tensor:
        """One whole expert: x [n, H] -> [n, H], before the router's weight."""
        joined = F.linear(x, gate_up, self.gate_up_bias[expert] if self.biases else None)
        return self.finish(self.apply_gate(joined) @ down, expert)

    def finish(self, y: Tensor, expert: int | Tensor) -> Tensor:
        """Bias of down and the norm after each expert, where the model has them; y [.., H]."""
        if self.biases:
            y = y + self.biases["down_bias"][expert]
        return y if self.post_norm is None else self.post_norm(y)


class Runtime:
    """Everything that the experts modules of one open model share. Not thread-safe: one thread owns it."""

    def __init__(self, far: Far, top_k: int, level: str, plans: dict[str, LevelPlan], near_bytes: int | None = None,
                 device: str = "cpu", predict: bool = True) -> None:
        self.far, self.top_k, self.plans, self.device, self.predict = far, top_k, plans, device, predict
        self.layers: list[LayerExperts] = []
        self.phase = "auto"  # prefill | decode | auto: one token is decode, more are prefill
        self.prefill_far_bytes = 0
        self.note = ""  # why the processor computes what a card was asked for
        self.memories: list[HostMemory] = []  # of the trunk, locked for a card
        self._totals = [0, 0, 0, 0, 0]  # the fields of Counters but the last
        self._activity = np.zeros((far.layers, far.experts), np.float32)  # picks, fading; _tokens: tokens, fading too
        self._tokens = 0.0
        self.level, self.near_wish = level, near_bytes
        self.set_level(level, near_bytes)

    # --- settings, between answers ------------------------------------------------------------------------------
    @property
    def levels(self) -> tuple[str, ...]:
        """Levels that this folder can run at, best first."""
        if not isinstance(self.far, FarBlobs):
            return ("full",)
        return ("exact", *(level for level in SPARSE_LEVELS if level in self.plans))

    def set_level(self, level: str, near_bytes: int | None = None) -> None:
        """Change level and near memory (None: everything). Drops what is near. After a UserError nothing changed."""
        if level not in self.levels:
            raise UserError(f"This model cannot run at level {level}: it offers {', '.join(self.levels)}"
                            + ("." if level == "full" else "; calibrate it to get the others."))
        before = self.level, self.near_wish
        self.level, self.near_wish = level, near_bytes
        try:
            cache = self._new_cache()
        except UserError:
            self.level, self.near_wish = before
            raise
        self._start(cache)

    def reset(self) -> None:
        """Forget what is near; counters go on."""
        self._start(self._new_cache())

    def _new_cache(self) -> SparseCache | WholeCache:
        far = self.far
        wish = self.everything_bytes() if self.near_wish is None else self.near_wish
        if self.level in SPARSE_LEVELS:
            assert isinstance(far, FarBlobs)
            return SparseCache(far.layout, far.layers, far.experts, self.top_k, self._most_records(), wish, self.device)
        return WholeCache(far.layers, far.experts, self.top_k, far.neurons, far.hidden, wish, self.device)

    def _start(self, cache: SparseCache | WholeCache) -> None:
        self.sparse = cache if isinstance(cache, SparseCache) else None
        self.whole = cache if isinstance(cache, WholeCache) else None
        self.clock, self._in_token = 0, False
        if self.sparse is not None:
            self.sparse.preload(self._checked_sketches)

    def pin(self, experts: Iterable[tuple[int, int]] = (), neurons: Iterable[tuple[int, int, int]] = ()) -> None:
        """The working set, between tokens: what stays near until the next call, in place of what stayed so far.

        experts: (layer, expert), their sketches or, where near memory holds whole experts, all of them; neurons:
        (layer, expert, neuron), their records. What is far is fetched now and counted as fetched ahead. UserError,
        nothing changed, when a token would find too little room beside it. `reset` and `set_level` forget it.
        """
        per_expert = self.far.neurons
        wanted = [[layer * self.far.experts + expert for layer, expert in experts],
                  [(layer * self.far.experts + expert) * per_expert + neuron for layer, expert, neuron in neurons]]
        pools = (self.sparse or self.whole).pools()
        assert len(pools) == 2 or not wanted[1], "records are near at the sparse levels only"
        for (pool, reserve), objects in zip(pools, wanted, strict=False):
            if (n := len(set(objects))) > (most := pinnable(pool, reserve)):
                raise UserError(f"Near memory has room for {most:,} pinned parts of experts, not for {n:,}; pin less, "
                                "or give it more memory.")
        for (pool, _), objects, records in zip(pools, wanted, (False, True), strict=False):
            self._pin_in(pool, torch.tensor(sorted(set(objects)), dtype=torch.int64, device=pool.stamp.device), records)

    def _pin_in(self, pool: Pool, objects: Tensor, records: bool) -> None:
        clock, per_layer = self._now(), len(pool.slot_of) // self.far.layers
        pin(pool, objects, clock)  # what is there need not make room for the rest
        missing = objects[pool.slot_of[objects] < 0]
        self._count_wasted(age(pool, clock + 1, len(missing))[1], records)
        for layer in (missing // per_layer).unique().tolist():
            ids = (missing[missing // per_layer == layer] % per_layer).int()
            self._fetch_ahead(layer, ids, records)
        pin(pool, objects, clock)

    def everything_bytes(self) -> int:
        """Near memory at which nothing is ever fetched twice, at this level."""
        far = self.far
        if self.level in SPARSE_LEVELS:
            return far.layers * far.experts * far.layout.blob_bytes + max(self._most_records()) * far.layout.record
        return far.layers * far.experts * whole_row_bytes(far.neurons, far.hidden)

    def smallest_bytes(self) -> int:
        """The least near memory that this level can run in."""
        return self.sparse.smallest_bytes if self.sparse else self.whole.row_bytes

    def sketches_bytes(self) -> int:
        """Near memory for all sketches and the bounce rows, and not a single record slot."""
        far = self.far
        return far.layers * far.experts * far.layout.sketch_bytes + max(self._most_records()) * far.layout.record

    def _most_records(self) -> list[int]:
        if self.level == "floe":
            return [self.top_k * self.far.neurons] * self.far.layers
        return [sum(pair) for pair in self.plans[self.level].budgets]

    def _checked_sketches(self, layer: int) -> Tensor:
        for expert in range(self.far.experts):
            self.far.verify(layer, expert)
        return self.far.sketches(layer)

    # --- numbers ------------------------------------------------------------------------------------------------
    def counters(self) -> Counters:
        """Totals since the model was opened, decode only."""
        return Counters(*self._totals)

    @property
    def near_bytes(self) -> int:
        return (self.sparse or self.whole).near_bytes

    def near_used_bytes(self) -> int:
        return (self.sparse or self.whole).used_bytes()

    def residency(self) -> list[float]:
        """Share of each layer's records (or experts) that is near."""
        return (self.sparse or self.whole).residency()

    def activity(self) -> list[list[float]]:
        """Per layer and expert the share of the last tokens that were routed to it, newer ones counting more; decode
        only. Rows of E numbers, 0 to 1."""
        return (self._activity / max(self._tokens, 1.0)).round(3).tolist()

    def _count(self, needed: int, fetched: int) -> None:
        self._totals[0] += needed
        self._totals[1] += needed - fetched
        self._totals[2] += fetched

    # --- the experts function -----------------------------------------------------------------------------------
    def forward(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, k], weights [T, k] -> [T, H] in x's dtype."""
        # A trunk on a card may have its experts computed here.
        hidden, weights, ids = x.to(self.device, torch.float32), weights.to(self.device).float(), ids.to(self.device)
        if self.phase == "prefill" or (self.phase == "auto" and len(x) > 1):
            out = self._dense(layer, hidden, ids, weights)
        else:
            self._begin_token(layer.index)
            step = self._whole if self.whole is not None else self._sparse
            rows = [step(layer, hidden[t:t + 1], ids[t], weights[t]) for t in range(len(x))]
            out = rows[0] if len(rows) == 1 else torch.cat(rows)
            if self.predict and layer.index + 1 < len(self.layers):
                self._look_ahead(self.layers[layer.index + 1], hidden)
        return out.to(x.device, x.dtype)

    def close(self) -> None:
        """Give page-locked memory back; its driver waits for the card first."""
        for memory in self.memories:
            memory.close()

    def _begin_token(self, index: int) -> None:
        if index == 0:
            if self._in_token:
                wasted = (self.sparse or self.whole).end_token(self.clock)
                self._totals[4] += wasted * (self.far.expert_bytes if self.whole else 1)
            self.clock += 1
            self._in_token = True
            self._activity *= FADE
            self._tokens = FADE * self._tokens + 1

    def _bring(self, layer: LayerExperts, expert: int, ahead: bool = False) -> int:
        """Read an expert that is far into a row of near memory; -1 when ahead finds no free one."""
        item = layer.index * self.far.experts + expert
        row = self.whole.place(item, self.clock, ahead)
        if row >= 0:
            gate, up = layer.halves(self.whole.gate_up[row])
            try:
                self.far.decode(layer.index, expert, gate, up, self.whole.down[row])
            except BaseException:
                self.whole.forget(item)  # its row holds no expert
                raise
        return row

    def _whole(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One token through whole experts, one after the other, so that a single bounce row is enough."""
        sums, chosen = [], ids.tolist()
        self._activity[layer.index, chosen] += 1
        for expert in chosen:
            row, fetched = self.whole.near(layer.index * self.far.experts + expert), 0
            if row < 0:
                row, fetched = self._bring(layer, expert), self.far.expert_bytes
            self._count(self.far.expert_bytes, fetched)
            sums.append(layer.whole(x, self.whole.gate_up[row], self.whole.down[row], expert))
        return weights[None] @ torch.cat(sums)

    def _sparse(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One token: sketches, scores, the layer's budget, the records behind it, the sparse product."""
        far, cache, layout = self.far, self.sparse, self.far.layout
        ids, chosen = ids.int(), ids.tolist()
        self._activity[layer.index, chosen] += 1
        for expert in chosen:
            far.verify(layer.index, expert)
        place, fetched, needed = cache.take_sketches(layer.index, ids, far.sketches(layer.index), self.clock)
        padded = F.pad(x, (0, layout.padded - x.shape[1]))
        bias = self._neuron_biases(layer, ids)
        neurons, fidelity = self._choose(layer, padded, place[None], ids, weights[None], bias)
        items = ids[neurons[0].long() // layout.neurons] * layout.neurons + neurons[0] % layout.neurons
        need = torch.where(fidelity[0] == DOWN_ONLY, layout.prefix, layout.record).int()
        where, missed, wanted = cache.take_records(layer.index, items, need, far.records(layer.index), self.clock)
        self._count(needed + wanted, fetched + missed)
        sums = apply(padded, cache.sketches, place[None], cache.records, where[None], neurons, fidelity, layout,
                     layer.gate, *bias)
        y = layer.finish(sums[0, :, :x.shape[1]], ids.long())
        return (y * weights[:, None]).sum(0, keepdim=True)

    def _choose(self, layer: LayerExperts, x: Tensor, place: Tensor, ids: Tensor, weights: Tensor, bias: tuple):
        layout, plan = self.far.layout, self.plans[self.level]
        codes, scales = quantize_activation(x, layout.group)
        if self.level == "floe":
            scores = score_up(codes, scales, self.sparse.sketches, place, layout, bias[1])
            limits = torch.tensor(plan.thresholds[layer.index])[ids.long()].repeat_interleave(layout.neurons)
            return select_above(scores, limits[None])
        scores = score(codes, scales, self.sparse.sketches, place, weights, layout, layer.gate, *bias)
        refined, down_only = plan.budgets[layer.index]
        return select(scores, refined, refined + down_only)

    def _neuron_biases(self, layer: LayerExperts, ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not layer.biases:
            return None, None
        return layer.biases["gate_bias"][ids.long()][None], layer.biases["up_bias"][ids.long()][None]

    def _dense(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Many tokens: every routed expert once, in order, over the tokens that chose it."""
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=self.far.experts).tolist()
        tokens, share = order // ids.shape[1], weights.flatten()[order, None]
        out, at, scratch = torch.zeros_like(x), 0, self._scratch()
        for expert, count in enumerate(counts[:self.far.experts]):
            if count:
                rows = tokens[at:at + count]
                gate_up, down = self._for_prefill(layer, expert, scratch)
                out.index_add_(0, rows, layer.whole(x[rows], gate_up, down, expert) * share[at:at + count])
                at += count
        return out

    def _for_prefill(self, layer: LayerExperts, expert: int, scratch: Rows | None) -> Rows:
        """gate_up [2I, H] and down [I, H] of one expert until the next call: from near, or read."""
        if self.whole is not None:
            row = self.whole.near(layer.index * self.far.experts + expert)
            if row < 0:
                row = self._bring(layer, expert)
                self.prefill_far_bytes += self.far.expert_bytes
            return self.whole.gate_up[row], self.whole.down[row]
        gate_up, down = scratch
        self.far.decode(layer.index, expert, *layer.halves(gate_up), down)
        self.prefill_far_bytes += self.far.expert_bytes
        return gate_up, down

    def _scratch(self) -> Rows | None:
        """Room for one decoded expert during a prefill call, where near memory holds packed ones."""
        if self.whole is not None:
            return None
        n, h = self.far.neurons, self.far.hidden
        return torch.empty(2 * n, h, device=self.device), torch.empty(n, h, device=self.device)

    def _look_ahead(self, following: LayerExperts, x: Tensor) -> None:
        """Guess the next layer's experts by its router on this layer's input, and fetch them into free slots."""
        if following.router_weight is None or (self.sparse or self.whole).is_complete():
            return
        guess = (x[-1:] @ following.router_weight.float().T).topk(self.top_k).indices[0].int()
        self._fetch_ahead(following.index, guess, records=False)

    def _fetch_ahead(self, layer: int, ids: Tensor, records: bool) -> None:
        """Experts, or their sketches, or records `ids` int32 [n] of a layer into free slots, and count their bytes."""
        if self.whole is not None:
            for expert in ids.tolist():
                if not self.whole.is_near(layer * self.far.experts + expert):
                    if self._bring(self.layers[layer], expert, ahead=True) < 0:
                        return
                    self._totals[3] += self.far.expert_bytes
            return
        for expert in (ids // self.far.neurons if records else ids).unique().tolist():
            self.far.verify(layer, expert)
        if records:
            need = torch.full_like(ids, self.far.layout.record)
            found = self.sparse.take_records(layer, ids, need, self.far.records(layer), self.clock, ahead=True)
        else:
            found = self.sparse.take_sketches(layer, ids, self.far.sketches(layer), self.clock, ahead=True)
        self._totals[3] += found[1]

    def _now(self) -> int:
        """The token that is under way, or ended last."""
        return self.clock

    def _count_wasted(self, n: Tensor, records: bool) -> None:
        """n int64: objects that were fetched ahead, never asked for, and evicted."""
        layout = getattr(self.far, "layout", None)
        each = self.far.expert_bytes if self.whole is not None else layout.record if records else layout.sketch_bytes
        self._totals[4] += int(n) * each
