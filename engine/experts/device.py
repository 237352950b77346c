"""The runtime of a device: one decode step of the experts without a single decision of the host.

The same protocol, policies and counters as engine/experts/host.py, which stays the oracle; but the clock, the budgets,
the counters and every table are tensors changed in place, nothing is read back, and shapes depend on no value. A step
can therefore be recorded once and replayed. Experts stay packed: sketches and records at the sparse levels, whole blobs
at `exact`. Far memory must have been verified beforehand and be readable by the kernels (engine/experts/far_locked.py);
for layers where it is not, the host fetches, and such a step cannot be recorded.

Legend: T tokens of a step, k routed experts, I neurons, K the most neurons a layer keeps, L layers, E experts.
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F

from engine.core import SPARSE_LEVELS, Counters, UserError
from engine.experts.cache import BlobCache, SparseCache
from engine.experts.gates import recognised
from engine.experts.host import FADE, LayerExperts, Runtime
from engine.experts.prefill import PRODUCT_ROW, Staging, product
from engine.experts.side_stream import Beside
from engine.experts.store import FarBlobs
from kernels.activation import Gate, quantize_activation
from kernels.apply import apply
from kernels.dense import dense
from kernels.evict import age
from kernels.fill import fill, fill_through_host
from kernels.pool import Pool, new_pool, take
from kernels.resolve import Resolved, resolve_experts, resolve_neurons
from kernels.score import score, score_up
from kernels.select import BINS, select, select_above

Tensor = torch.Tensor
MOST_TOKENS = 4  # of one step: what the kernels are written for


class NoDevicePath(UserError):
    """These experts cannot be computed by the device kernels; they run through the host's path."""


class DeviceRuntime(Runtime):
    """Takes the place of `before`, a runtime over packed experts; see `take_over`."""

    def __init__(self, before: Runtime, far: FarBlobs, device: str, tokens: int = 1, level: str | None = None,
                 near_bytes: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        """level: None keeps that of `before`, and its near memory. dtype: of prefill's matrices, that of the trunk."""
        assert 1 <= tokens <= MOST_TOKENS, tokens
        if not isinstance(far, FarBlobs):
            raise NoDevicePath("An uncompressed checkpoint is computed expert by expert; compress it first.")
        if far.neurons * dtype.itemsize % PRODUCT_ROW:
            raise NoDevicePath(f"Experts of {far.neurons} neurons do not suit the card's matrix product; they run on "
                               "the host.")
        for layer in range(far.layers):
            for expert in range(far.experts):
                far.verify(layer, expert)
        self.tokens, self.gates = tokens, [_gate_of(layer) for layer in before.layers]
        self.counts = torch.zeros(5, dtype=torch.int64, device=device)
        self.recent = torch.zeros(far.layers * far.experts + 1, device=device)  # fading picks, and tokens behind them
        self.clock_now = torch.zeros(1, dtype=torch.int32, device=device)
        self.done = torch.zeros((), dtype=torch.bool, device=device)  # counts nothing more; may be the cache's flag
        self.thresholds = torch.zeros(far.layers, far.experts, device=device)
        self.budgets = torch.zeros(far.layers, 2, dtype=torch.int32, device=device)
        self.histogram = torch.zeros(tokens, BINS, dtype=torch.int32, device=device)
        self.n_arenas, self.arena_bytes, self._arena, self._kinds = 0, -1, None, {}  # n_arenas: made so far
        self.staging = Staging(far.layout, far.experts, device, dtype)
        self.ahead_bytes = torch.full((1,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
        # See engine/policies/prefetch.py; bytes that may cross.
        self.headroom, self.link_bytes_per_second = True, float("inf")
        self._beside = Beside(device)
        self._first_of_layer = far.experts * torch.arange(far.layers, device=device)[:, None]
        self.counted: list[int] | None = None  # what came back with the last token; saves a wait for the device
        level, near_bytes = (level, near_bytes) if level else (before.level, before.near_wish)
        super().__init__(far, before.top_k, level, before.plans, near_bytes, device, before.predict)
        self.layers = [_moved(layer, device) for layer in before.layers]
        self._before = before.counters()

    # --- near memory --------------------------------------------------------------------------------------------
    @property
    def kind(self) -> str:
        """What near memory holds; a recorded step belongs to one kind and to one arena."""
        return "dense" if self.level not in SPARSE_LEVELS else "floe" if self.level == "floe" else "sparse"

    def _new_cache(self) -> SparseCache | BlobCache:
        """The level's own near memory in the one arena; levels of a kind share it, told apart by device values."""
        far = self.far
        wish = self.everything_bytes() if self.near_wish is None else self.near_wish
        if wish == self.arena_bytes and self.kind in self._kinds:
            return self._kinds[self.kind]
        sizes = (far.layout, far.layers, far.experts, self.top_k)
        rest = (wish, self.device, self.tokens, lambda n_bytes: self._arena_of(wish)[:n_bytes])
        cache = BlobCache(*sizes, *rest) if self.kind == "dense" else SparseCache(*sizes, self._most_records(), *rest)
        self._kinds[self.kind] = cache
        return cache

    def _arena_of(self, n_bytes: int) -> Tensor:
        if n_bytes != self.arena_bytes:
            self._kinds.clear()  # the old arena goes before the new one comes: there is no room for both
            self.near = self.sparse = self.whole = self._arena = None
            self.arena_bytes = -1  # until there is one: the card may be full
            self._arena, self.arena_bytes = torch.empty(n_bytes, dtype=torch.uint8, device=self.device), n_bytes
            self.n_arenas += 1
        return self._arena

    def _most_records(self) -> list[int]:
        """Of every level that shares the near memory of this one."""
        if self.kind == "floe":
            return super()._most_records()
        shared = [self.plans[level].budgets for level in SPARSE_LEVELS if level in self.plans and level != "floe"]
        return [max(sum(pair) for pair in pairs) for pairs in zip(*shared, strict=True)]

    def _start(self, cache: SparseCache | BlobCache) -> None:
        self.near = cache
        self.sparse = cache if isinstance(cache, SparseCache) else None
        self.whole = cache if isinstance(cache, BlobCache) else None
        if self.sparse is not None:
            self._set_budgets()
        self.reset()

    def _set_budgets(self) -> None:
        """The level as values on the device: budgets int32 [L, 2] refined and total, or thresholds [L, E]."""
        plan, self.capacity = self.plans[self.level], self._most_records()
        if self.level == "floe":
            self.thresholds.copy_(torch.tensor(plan.thresholds))
        else:
            self.budgets.copy_(torch.tensor([(refined, refined + rest) for refined, rest in plan.budgets]))

    def reset(self) -> None:
        """Forget what is near, in the same tensors, so that a recorded step goes on with them; counters go on."""
        for pool in self._pools():
            for table, fresh in zip(pool, new_pool(len(pool.slot_of), len(pool.object_of), self.device), strict=True):
                table.copy_(fresh)
        self.clock_now.zero_()
        self.histogram.zero_()  # a step that was broken off may have left its counts
        if self.sparse is not None and self.sparse.resident:
            self._bring_sketches()

    def _bring_sketches(self) -> None:
        """All of them: they fit."""
        ids = torch.arange(self.far.experts, dtype=torch.int32, device=self.device)
        for layer in range(self.far.layers):
            self._bring(layer, ids, False, 0, False)

    def _bring(self, layer: int, ids: Tensor, records: bool, clock: Tensor | int, ahead: bool) -> Tensor:
        """Between steps: whole objects of a layer near, by the device where it can read them -> bytes fetched."""
        pool, near, far = self._objects(layer, records)
        need = torch.full_like(ids, near.shape[1])
        place, have = take(pool, ids + layer * (len(pool.slot_of) // self.far.layers), need, clock, ahead)
        copy = fill if layer < self.far.readable_layers else fill_through_host
        copy(far, ids, near, place, have, need)
        return (need - have)[place >= 0].sum()

    def _pools(self) -> list[Pool]:
        return [pool for pool, _ in (self.sparse or self.whole).pools()]

    def everything_bytes(self) -> int:
        most = 0 if self.kind == "dense" else max(self._most_records()) * self.tokens
        return self.far.layers * self.far.experts * self.far.layout.blob_bytes + most * self.far.layout.record

    def smallest_bytes(self) -> int:
        return self.near.smallest_bytes

    # --- numbers ------------------------------------------------------------------------------------------------
    def counters(self) -> Counters:
        """As of the last token that came back, where `counted` has it; else waits for the device."""
        return self._before + Counters(*(self.counts.tolist() if self.counted is None else self.counted))

    def activity(self) -> list[list[float]]:
        picks = self.recent.cpu()
        return (picks[:-1] / picks[-1].clamp_min(1)).view(self.far.layers, -1).numpy().round(3).tolist()

    def close(self) -> None:
        """Give page-locked memory back; the driver waits for the card first."""
        super().close()
        self.far.close()

    # --- one step -----------------------------------------------------------------------------------------------
    def forward(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        layer = self.layers[layer.index]
        self._beside.join()
        if self.phase == "prefill" or (self.phase == "auto" and len(x) > 1):
            return self._dense(layer, x, ids, weights).to(x.dtype)
        assert len(x) <= self.tokens, f"a step of {len(x)} tokens, planned for {self.tokens}"
        hidden, weights, ids = x.float(), weights.float().contiguous(), ids.contiguous()
        if layer.index == 0:
            self._begin_step()
        self._picked.append(ids.flatten())
        padding = self.far.layout.padded - hidden.shape[1]
        padded = F.pad(hidden, (0, padding)) if padding else hidden
        step = self._whole_blobs if self.whole is not None else self._chosen_records
        out = layer.finish(step(layer, padded, ids, weights)[..., :hidden.shape[1]], ids.long())
        out = (out * weights[..., None]).sum(1)
        if layer.index + 1 == len(self.layers):
            self._end_step()
        return out.to(x.dtype)

    def _begin_step(self) -> None:
        """The token before has ended: make room for this one."""
        self._picked = []
        for (pool, reserve), each in zip((self.sparse or self.whole).pools(), self._each_bytes(), strict=True):
            if len(pool.object_of) < len(pool.slot_of):  # else nothing ever leaves
                self.counts[4:].add_(age(pool, self.clock_now, reserve)[1:] * each * self.done.logical_not())
        self.clock_now.add_(1)

    def _each_bytes(self) -> list[int]:
        """Bytes of an object of each pool."""
        layout = self.far.layout
        return [layout.blob_bytes] if self.whole is not None else [layout.sketch_bytes, layout.record]

    def _end_step(self) -> None:
        """Which experts were busy: a few operations a token instead of a few a layer."""
        picked = torch.stack(self._picked).long() + self._first_of_layer
        picked = torch.cat((picked.flatten(), self._first_of_layer[-1] + self.far.experts))  # and one token more
        self.recent.mul_(FADE).index_add_(0, picked, torch.ones_like(picked, dtype=torch.float32))

    def _fill(self, layer: int, records: bool, found: Resolved, ahead: bool = False) -> Tensor:
        """Bring what is missing -> place int32 [T, n].

        What is fetched ahead crosses the link beside the main stream, which must `join` before it is read.
        """
        source, place, have, need, misses = found
        _, near, far = self._objects(layer, records)
        if layer >= self.far.readable_layers:
            fill_through_host(far, source, near, place, have, need)
        elif ahead:
            self._beside.run(lambda: fill(far, source, near, place, have, need, misses), *found)
        else:
            fill(far, source, near, place, have, need, misses)
        return place

    def _bring_experts(self, layer: int, ids: Tensor, most_ahead: Tensor | None = None) -> Tensor:
        """Experts or their sketches near -> place int32 [T, k]; with most_ahead ahead of demand, so many bytes."""
        pool, near, _ = self._objects(layer, False)
        found = resolve_experts(pool, ids, layer * self.far.experts, near.shape[1], self.clock_now, self.counts,
                                self.done, most_ahead)
        return self._fill(layer, False, found, most_ahead is not None)

    def _objects(self, layer: int, records: bool) -> tuple[Pool, Tensor, Tensor]:
        """The pool of a layer's experts (or their sketches, or their records), near memory, far memory."""
        if self.whole is not None:
            return self.whole.pool, self.whole.blobs, self.far.blobs(layer)
        if records:
            return self.sparse.record_pool, self.sparse.records, self.far.records(layer)
        return self.sparse.sketch_pool, self.sparse.sketches, self.far.sketches(layer)

    def _whole_blobs(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Level `exact` -> per-expert sums [T, k, H]."""
        place = self._bring_experts(layer.index, ids)
        self._look_ahead_from(layer, x)
        return dense(x, self.whole.blobs, place, self.far.layout, self.gates[layer.index], *_biases(layer, ids))

    def _chosen_records(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The sparse levels -> per-expert sums [T, k, H]."""
        near, layout, biases = self.sparse, self.far.layout, _biases(layer, ids)
        place = self._bring_experts(layer.index, ids)
        neurons, fidelity = self._choose(layer, x, place, ids, weights, biases)
        first = layer.index * self.far.experts * layout.neurons
        found = resolve_neurons(near.record_pool, neurons, fidelity, ids, first, layout, self.clock_now, self.counts,
                                self.done)
        where = self._fill(layer.index, True, found)
        self._look_ahead_from(layer, x)
        return apply(x, near.sketches, place, near.records, where, neurons, fidelity, layout, self.gates[layer.index],
                     *biases)

    def _choose(self, layer: LayerExperts, x: Tensor, place: Tensor, ids: Tensor, weights: Tensor, biases: tuple):
        """-> neurons int32 [T, K] ascending, then -1; fidelity int8 [T, K]."""
        layout, capacity = self.far.layout, self.capacity[layer.index]
        codes, scales = quantize_activation(x, layout.group)
        if self.level == "floe":
            scores = score_up(codes, scales, self.sparse.sketches, place, layout, biases[1])
            limits = self.thresholds[layer.index][ids.long()]
            return select_above(scores, limits.repeat_interleave(layout.neurons, 1), capacity)
        histogram = self.histogram[:len(x)]
        scores = score(codes, scales, self.sparse.sketches, place, weights, layout, self.gates[layer.index], *biases,
                       histogram)
        refined, total = self.budgets[layer.index].split(1)
        return select(scores, refined, total, capacity, histogram)

    @property
    def looks_ahead(self) -> bool:
        """Whether a step fetches for the next layer; a recorded step does so for ever, or never."""
        return self.predict and self.headroom

    def _look_ahead_from(self, layer: LayerExperts, x: Tensor) -> None:
        """Fetch what the next layer's router picks on this layer's input, into free slots, up to `ahead_bytes`.

        Behind this layer's demand, beside its product and all that comes before the next layer's experts.
        """
        following = self.layers[layer.index + 1] if layer.index + 1 < len(self.layers) else None
        if not self.looks_ahead or following is None or following.router_weight is None:
            return
        if self.sparse is not None and self.sparse.resident:
            return
        guess = (x[-1:, :self.far.hidden] @ following.router_weight.T).topk(self.top_k).indices
        self._bring_experts(following.index, guess, self.ahead_bytes)

    def _fetch_ahead(self, layer: int, ids: Tensor, records: bool) -> None:
        """Between tokens, for `pin`."""
        self.counts[3] += self._bring(layer, ids, records, self.clock_now, True)
        self.counted = None

    def _now(self) -> Tensor:
        return self.clock_now

    def _count_wasted(self, n: Tensor, records: bool) -> None:
        self.counts[4] += n * self._each_bytes()[int(records)]

    # --- prefill ------------------------------------------------------------------------------------------------
    def _dense(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Many tokens: every routed expert once, in order, over the tokens that chose it. Waits for the routing."""
        picks, top_k = ids.flatten(), ids.shape[1]
        order = picks.argsort(stable=True)
        counts = torch.bincount(picks, minlength=self.far.experts).tolist()
        first, slots = list(accumulate(counts, initial=0)), self._near_slots(layer.index)
        out = torch.empty(len(picks), x.shape[1], dtype=x.dtype, device=x.device)  # a row for each pick of a token
        wanted = [expert for expert, n in enumerate(counts) if n]
        ends = torch.tensor([first[expert + 1] for expert in wanted], dtype=torch.int32, pin_memory=x.is_cuda)
        ends, done = ends.to(x.device, non_blocking=True), 0
        for group, tile in self.staging.stream(wanted, partial(self._copy, layer.index, slots)):
            start, end = first[group[0]], first[group[-1] + 1]
            rows, of_group = order[start:end], ends[done:done + len(group)] - start
            done += len(group)
            chosen = picks[rows].long()
            biases = [layer.biases[name][chosen] if layer.biases else None for name in ("gate_bias", "up_bias")]
            y = product(x[rows // top_k], of_group, *self.staging.decoded(tile), self.gates[layer.index], biases)
            out[rows] = layer.finish(y, chosen).to(out.dtype)
        return _weighted(out.view(*ids.shape, -1), weights)

    def _near_slots(self, layer: int) -> list[int]:
        """Where whole experts of a layer, or their sketches, lie near; -1 for those that are far."""
        pool = self._objects(layer, False)[0]
        return pool.slot_of.view(self.far.layers, -1)[layer].tolist()

    def _copy(self, layer: int, slots: list[int], group: list[int], tile: Tensor) -> None:
        """Experts into the rows of a tile, what is far in as few copies as it takes."""
        far, at = self.far.blobs(layer)[:, 0], 0
        near = self._objects(layer, False)[1]
        while at < len(group):
            end, kept = at + 1, 0
            if slots[group[at]] >= 0:
                kept = near.shape[1]
                tile[at, :kept].copy_(near[slots[group[at]]])
            else:
                while end < len(group) and group[end] == group[end - 1] + 1 and slots[group[end]] < 0:
                    end += 1
            tile[at:end, kept:].copy_(far[group[at]:group[end - 1] + 1, kept:], non_blocking=True)
            self.prefill_far_bytes += (end - at) * (self.far.expert_bytes - kept)
            at = end


def take_over(model: torch.nn.Module, far: FarBlobs, device: str, tokens: int = 1, level: str | None = None,
              near_bytes: int | None = None) -> DeviceRuntime:
    """Put a DeviceRuntime behind all experts modules of an open model. NoDevicePath: nothing has changed."""
    before = model.floe
    runtime = DeviceRuntime(before, far, device, tokens, level, near_bytes, model.dtype)
    for module in model.modules():
        if getattr(module, "runtime", None) is before:
            module.runtime = runtime
    model.floe = runtime
    return runtime


def _weighted(y: Tensor, weights: Tensor) -> Tensor:
    """y [T, k, H], weights [T, k] -> float32 [T, H], summed in the order of the picks."""
    out = torch.zeros(len(y), y.shape[2], device=y.device)
    for pick in range(y.shape[1]):
        out += y[:, pick] * weights[:, pick, None].float()
    return out


def _gate_of(layer: LayerExperts) -> Gate:
    gate = recognised(layer.apply_gate, layer.join)
    if gate is None:
        raise NoDevicePath("The device kernels do not know the activation of these experts; they run on the host.")
    return gate


def _moved(layer: LayerExperts, device: str) -> LayerExperts:
    router = None if layer.router_weight is None else layer.router_weight.float().to(device)
    return replace(layer, biases={name: bias.to(device) for name, bias in layer.biases.items()}, router_weight=router)


def _biases(layer: LayerExperts, ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of gate and up of the routed experts, float32 [T, k, I]."""
    if not layer.biases:
        return None, None
    return layer.biases["gate_bias"][ids.long()], layer.biases["up_bias"][ids.long()]
