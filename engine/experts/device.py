"""The runtime on a card: one decode step of the experts without a decision of the host, but where `miss=beside`
lets it compute.

Far memory must be readable by the kernels (`FarLocked`). Layers where it is not stay near for good, where near memory
has room for them; else the host fetches, and such a step cannot be recorded. Prefill streams packed experts tile by
tile.

Legend: T tokens of a step, k routed experts, I neurons, H hidden, E experts, L layers.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property, partial
from itertools import accumulate

import torch
import torch.nn.functional as F

from engine.core import SPARSE_LEVELS, UserError
from engine.experts.cache import MappedCache, kept_objects
from engine.experts.layer import LayerExperts, LevelPlan
from engine.experts.prefill import PRODUCT_ROW, Staging, decodes
from engine.experts.runtime import Runtime
from engine.experts.store import Far, FarBlobs
from engine.policies.split import Rates, host_takes
from engine.units import size
from kernels.activation import FixedPoint, NeuronBias, quantize
from kernels.apply import chosen_sums
from kernels.dense import STRICT, from_sums, together, whole_sums
from kernels.layout import Layout
from kernels.pool import forget, pin
from kernels.resolve import Link, choose_neurons, look_ahead, resolve_experts, resolve_neurons
from kernels.score import score
from kernels.select import DOWN_ONLY, REFINED
from kernels.weigh import weighed

Tensor = torch.Tensor
MOST_TOKENS = 4  # of one step: what the kernels are written for


class NoDevicePath(UserError):
    """These experts cannot be computed by the device kernels; they run on the host."""


class DeviceRuntime(Runtime):
    """NoDevicePath for experts that the kernels do not compute."""

    is_recorded = True

    def __init__(self, far: Far, layers: list[LayerExperts], top_k: int, plans: dict[str, LevelPlan], level: str,
                 near_bytes: int | None = None, predict: bool = True, device: str = "cuda", tokens: int = 1,
                 dtype: torch.dtype = torch.float32) -> None:
        """dtype: of prefill's activations, that of the trunk."""
        assert 1 <= tokens <= MOST_TOKENS, tokens
        _check(far, layers, dtype if decodes(device) else None)
        for layer in range(far.layers):
            for expert in range(far.experts):
                far.verify(layer, expert)
        self.staging = Staging(far.layout, far.experts, device, dtype, decodes=decodes(device))
        self.turns = torch.zeros(2, 4, dtype=torch.int32, device=device)  # of the main stream's launches, the side's
        super().__init__(far, layers, top_k, plans, level, near_bytes, predict, device, tokens)

    # --- what a fused step has made already ---------------------------------------------------------------------
    _ready: tuple[Tensor, ...] = ()     # while its forward is under way

    @property
    def quantises(self) -> Layout | None:
        """How a step quantises its activation, for who can do so while making it (kernels/trunk/choose.py)."""
        return self.far.layout if self.is_sparse else None

    def forward(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None,
                quantised: tuple[Tensor, ...] = ()) -> Tensor:
        """quantised: of x, as `quantises` says."""
        self._ready = quantised
        out = super().forward(layer, x, ids, weights, residual)
        self._ready = ()
        return out

    def _quantized(self, x: Tensor) -> tuple[Tensor, ...]:
        is_ready = self._ready and len(self._ready[0]) == len(x)   # else tokens are taken apart
        return self._ready if is_ready else super()._quantized(x)

    # --- near memory --------------------------------------------------------------------------------------------
    @property
    def kind(self) -> str:
        """The levels of a kind are told apart by values on the device; a recorded step belongs to one kind and to one
        arena."""
        return "dense" if not self.is_sparse else "floe" if self.level == "floe" else "sparse"

    @property
    def _unread_layers(self) -> int:
        return self.far.layers - self.far.readable_layers

    def reset(self) -> None:
        self._side.join()       # a step that broke off may have left one, which takes slots
        super().reset()
        self.turns.zero_()
        if self.near.kept:
            self._keep()

    def forget(self) -> None:
        """As it was opened: nothing near but what stays there, nothing counted."""
        self.reset()
        self.counts.zero_()
        self.picks.zero_()
        self.prefill_far_bytes, self.counted, self.headroom, self.phase = 0, None, True, "auto"

    def _keep(self) -> None:
        """Bring the layers that the device cannot read by itself, for good."""
        experts, n = self.far.experts, self.far.neurons
        ids = torch.arange(experts, dtype=torch.int32, device=self.device)
        parts = torch.arange(n, dtype=torch.int32, device=self.device)
        for layer in range(self.far.layers - self.near.kept // experts, self.far.layers):
            self.bring(layer, ids)
            for expert in range(experts if self.is_sparse else 0):
                self.bring(layer, parts + expert * n, records=True)
        for (pool, _), kept in zip(self.near.pools(), kept_objects(self.far, self.near), strict=False):
            pin(pool, torch.tensor(kept, device=pool.stamp.device), self.clock)

    def most_records(self) -> list[int]:
        """Those of every level that shares the near memory of this one."""
        if self.kind != "sparse":
            return super().most_records()
        shared = [self.plans[level].budgets for level in SPARSE_LEVELS if level in self.plans and level != "floe"]
        return [max(sum(pair) for pair in pairs) for pairs in zip(*shared, strict=True)]

    @property
    def asks_the_host(self) -> bool:
        return super().asks_the_host or self.hook is not None and self.hook.asks_the_host

    # --- bytes on their way -------------------------------------------------------------------------------------
    def _begin_step(self) -> None:
        super()._begin_step()
        self._side.join()  # a hook may have fetched; tables change on one stream at a time

    def _bring_experts(self, layer: int, ids: Tensor, most_ahead: Tensor | None = None) -> Tensor | None:
        """As in runtime.py, in one launch where the card reads far memory by itself. What is fetched ahead has no
        place yet: all of it happens beside the main stream."""
        self._side.join()       # of a step of many tokens the one before may still be looking ahead
        if not self._links(layer):
            return super()._bring_experts(layer, ids, most_ahead)
        pool, _ = self.near.pools()[0]
        bring = partial(resolve_experts, pool, ids, layer * self.far.experts, self._object_bytes, self.clock,
                        self.counts, self.done, most_ahead, self._link(layer, False, most_ahead is not None))
        return bring()[1] if most_ahead is None else self._side.run(bring, ids)

    def _look_ahead(self, layer: LayerExperts, x: Tensor) -> None:
        """As in runtime.py, in one launch beside the main stream."""
        following = self.layers[(layer.index + 1) % len(self.layers)]
        if self.hook is not None or not following.index or not self._links(following.index):
            super()._look_ahead(layer, x)
        elif self.looks_ahead and following.router_weight is not None:
            pool, _ = self.near.pools()[0]
            self._side.run(partial(
                look_ahead, x, following.router_weight, self.top_k, pool, following.index * self.far.experts,
                self._object_bytes, self.clock, self.counts, self.done, self.ahead_bytes,
                self._link(following.index, False, ahead=True)), x)

    def _choose(self, layer: LayerExperts, x: tuple[Tensor, Tensor], place: Tensor, ids: Tensor, weights: Tensor,
                bias: NeuronBias | None) -> tuple[Tensor, Tensor, Tensor]:
        """As in runtime.py; the launch that selects for one token brings its records."""
        far, at = self.far, layer.index
        if self.hook is not None or self.level == "floe" or len(ids) > 1 or not self._links(at):
            return super()._choose(layer, x, place, ids, weights, bias)
        scores = score(*x, self._rows(at), place, weights, far.layout, layer.gate, bias, self.histogram[:1])
        pool, _ = self.near.pools()[1]
        return choose_neurons(scores, *self._budget(at), self.capacity[at], self.histogram, ids, pool,
                              at * far.experts * far.neurons, far.layout, self.clock, self.counts, self.done,
                              self._link(at, True))

    def _bring_neurons(self, layer: int, ids: Tensor, neurons: Tensor, fidelity: Tensor) -> Tensor:
        if not self._links(layer):
            return super()._bring_neurons(layer, ids, neurons, fidelity)
        pool, _ = self.near.pools()[1]
        first = layer * self.far.experts * self.far.neurons
        return resolve_neurons(pool, neurons, fidelity, ids, first, self.far.layout, self.clock, self.counts, self.done,
                               self._link(layer, True))[1]

    def _links(self, layer: int) -> bool:
        """Whether one launch looks up and copies; what a shortcut lacks is copied beside its block instead."""
        return layer < self.far.readable_layers and not self.has_gaps

    def _link(self, layer: int, records: bool, ahead: bool = False) -> Link:
        far = self.far.blobs if not self.is_sparse else self.far.records if records else self.far.sketches
        return Link(far(layer), self.near.rows(layer, records), self.turns[int(ahead)])

    # --- a step with the processor beside it --------------------------------------------------------------------
    def _whole(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None,
               ) -> Callable[[], Tensor]:
        """As in runtime.py; where a hook lets the processor compute part of what is missing, both sides use the one
        arithmetic that they share, so that nobody sees in the text which part that was."""
        if self.hook is None or not self.hook.asks_the_host:
            return super()._whole(layer, x, ids, weights, residual)
        fixed = FixedPoint(*self._quantized(x)[2:])
        far = self.hook.stays_far(layer.index, torch.where(weights == 0, -1, ids)) if len(x) == 1 else None
        left = [] if far is None else far[0].nonzero()[:, 0].tolist()
        rest = [pick for pick in range(ids.shape[1]) if pick not in left]
        sums = torch.empty(*ids.shape, self.far.layout.padded, dtype=torch.int64, device=self.device)
        if rest:  # first, so that the card is at work meanwhile
            there = ids[:, rest].contiguous()
            place = self._demand(layer.index, there, weights[:, rest])
            self._side.join()  # a shortcut's, on their way
            sums[:, rest] = whole_sums(fixed, self.near.rows(layer.index, False), place.contiguous(), self.far.layout,
                                       layer.gate, layer.neuron_bias(there))
        if left:
            self._count_wanted(self._object_bytes * len(left))
            sums[:, left] = self.hook.beside.experts(layer, fixed, ids[:, left]).to(self.device)
        return partial(self._mixed, layer, x, partial(weighed, from_sums(sums)), ids, weights, residual)

    def _sparse(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None,
                ) -> Callable[[], Tensor]:
        """The same of the neurons that the card has chosen: what they add is integers, whoever adds it."""
        if self.hook is None or not self.hook.asks_the_host:
            return super()._sparse(layer, x, ids, weights, residual)
        at, layout, bias = layer.index, self.far.layout, layer.neuron_bias(ids)
        place = self._demand(at, ids, weights)
        self._side.join()  # a shortcut's sketches
        codes, scales, *fixed = self._quantized(x)
        chosen = self._selected(layer, (codes, scales), place, ids, weights, bias)
        far = self.hook.neurons_stay_far(at, ids, chosen[0]) if len(x) == 1 else None
        left, own = (None, chosen) if far is None or not far.any() else _parted(chosen, far[0])
        where = self._bring_neurons(at, ids, *own)
        sums = chosen_sums(FixedPoint(*fixed), self._rows(at), place, self.near.rows(at, True), where, *own, layout,
                           layer.gate, bias)
        if left:
            whole = (left[1] != DOWN_ONLY).sum()
            self._count_wanted(whole * layout.record + (left[1].numel() - whole) * layout.prefix)
            sums = together(sums, self.hook.beside.neurons(layer, FixedPoint(*fixed), ids, *left).to(self.device))
        return partial(self._mixed, layer, x, partial(weighed, from_sums(sums)), ids, weights, residual)

    def _count_wanted(self, n_bytes: int | Tensor) -> None:
        """What the processor computes: it is neither near nor does it come."""
        self.counts[:1].add_(n_bytes * self.done.logical_not())

    # --- prefill ------------------------------------------------------------------------------------------------
    def _prefill(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every routed expert once, in order, over the tokens that chose it. Waits for the routing. x: any float; a
        fused step reads few tokens in float32."""
        x = x.to(self.staging.dtype).contiguous()
        picks, top_k = torch.where(ids < 0, self.far.experts, ids).flatten(), ids.shape[1]  # none: behind all others
        order = picks.argsort(stable=True)
        tokens = order // top_k
        counts = torch.bincount(picks, minlength=self.far.experts).tolist()[:self.far.experts]
        first, slots = list(accumulate(counts, initial=0)), self._near_slots(layer.index)
        out = x.new_zeros(len(picks), x.shape[1])  # a row for each pick of a token
        wanted = [expert for expert, n in enumerate(counts) if n]
        there = torch.tensor([wanted, [first[expert + 1] for expert in wanted]], dtype=torch.int32,
                             pin_memory=x.is_cuda).to(x.device, non_blocking=True)
        done = 0
        for group, tile in self.staging.stream(wanted, partial(self._into_tile, layer.index, slots)):
            start, end = first[group[0]], first[group[-1] + 1]
            rows, (experts, ends) = order[start:end], there[:, done:done + len(group)]
            done += len(group)
            y = self.staging.product(x, tokens[start:end], ends - start, tile, layer.gate, layer.neuron_bias(experts))
            out[rows] = layer.finish(y, picks[rows].long()).to(out.dtype)
        return _in_order(out.view(*ids.shape, -1), weights)

    def _near_slots(self, layer: int) -> list[int]:
        """Where whole experts of a layer, or their sketches, lie near; -1 for those that are far."""
        pool, _ = self.near.pools()[0]
        return pool.slot_of.view(self.far.layers, -1)[layer].tolist()

    def _into_tile(self, layer: int, slots: list[int], group: list[int], tile: Tensor) -> None:
        """Experts into the rows of a tile, what is far in as few copies as it takes."""
        far, at = self.far.blobs(layer)[:, 0], 0
        near = self.near.rows(layer, False)
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


def _parted(chosen: tuple[Tensor, ...], far: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Neurons and fidelity [1, K]: where `far`, bool [K] on the processor, [1, n], and the others in their order, then
    none, [1, K]."""
    left, own = (tuple(table[:, kept.nonzero()[:, 0].to(table.device)] for table in chosen) for kept in (far, ~far))
    n = left[0].shape[1]
    return left, (F.pad(own[0], (0, n), value=-1), F.pad(own[1], (0, n)))


def _in_order(y: Tensor, weights: Tensor) -> Tensor:
    """y [T, k, H], weights [T, k] -> float32 [T, H], summed in the order of the picks."""
    out = torch.zeros(len(y), y.shape[2], dtype=torch.float32, device=y.device)
    for pick in range(y.shape[1]):
        out += y[:, pick] * weights[:, pick, None].float()
    return out


def _check(far: Far, layers: list[LayerExperts], decoded: torch.dtype | None) -> None:
    """decoded: what torch's product multiplies, where it does."""
    if not isinstance(far, FarBlobs):
        raise NoDevicePath("An uncompressed checkpoint is computed expert by expert; compress it first.")
    if decoded and far.neurons * decoded.itemsize % PRODUCT_ROW:
        raise NoDevicePath(f"Experts of {far.neurons} neurons do not suit the card's matrix product; they run on the "
                           "host.")
    if any(layer.gate.kind == "other" for layer in layers):
        raise NoDevicePath("The device kernels do not know the activation of these experts; they run on the host.")


# --- the processor beside a card (`miss=beside`) ------------------------------------------------------------
REPEATS = 3  # of a measurement, of which the best counts


class Beside:
    """What it computes where far memory has it, in the arithmetic that both sides share; of one open model. UserError
    for experts that only one side can compute."""

    def __init__(self, runtime: Runtime) -> None:
        if kinds := {layer.gate.kind for layer in runtime.layers} - {*STRICT}:
            raise UserError(f"The experts of this model use {', '.join(sorted(kinds))}, which a processor and a card "
                            "do not round alike; choose another miss.")
        self.far = runtime.far

    @cached_property
    def _lying(self) -> MappedCache:
        """Far memory as places; nothing of it is copied."""
        return MappedCache(self.far)

    def experts(self, layer: LayerExperts, x: FixedPoint, ids: Tensor) -> Tensor:
        """Whole experts ids int [1, n] -> their sums int64 [1, n, padded H] on the processor. What is given may lie on
        a card, which is waited for."""
        x, ids, bias = self._here(layer, x, ids)
        return whole_sums(x, self._lying.rows(layer.index, False), ids, self.far.layout, layer.gate, bias)

    def neurons(self, layer: LayerExperts, x: FixedPoint, ids: Tensor, neurons: Tensor, fidelity: Tensor) -> Tensor:
        """Some neurons of experts ids int [1, k], int32 [1, n] ascending through the k, fidelity int8 [1, n] -> as
        `experts`."""
        x, ids, bias = self._here(layer, x, ids)
        neurons, fidelity = neurons.cpu(), fidelity.cpu()
        return chosen_sums(x, self._lying.rows(layer.index, False), ids, self._lying.rows(layer.index, True),
                           self._lying.record_places(ids, neurons), neurons, fidelity, self.far.layout, layer.gate,
                           bias)

    def _here(self, layer: LayerExperts, x: FixedPoint, ids: Tensor) -> tuple[FixedPoint, Tensor, NeuronBias | None]:
        own = ids.cpu().clamp(min=0)    # none is any expert, of which no neuron is asked for
        for expert in own[0].tolist():
            self.far.verify(layer.index, expert)
        bias = layer.neuron_bias(ids)
        if bias is not None:    # of these experts alone
            bias = NeuronBias(*(rows[0].cpu() for rows in bias.rows), torch.arange(ids.shape[1])[None])
        return FixedPoint(*(part.cpu() for part in x)), own.int(), bias


def measured(runtime: Runtime, beside: Beside) -> Rates:
    """Of this machine and what is near at this level, experts or neurons, by the first layer's; near memory is empty
    afterwards."""
    layer, device = runtime.layers[0], runtime.device
    ids = torch.arange(min(runtime.top_k, runtime.far.experts), dtype=torch.int32, device=device)[None]
    x = FixedPoint(*quantize(torch.ones(1, runtime.far.layout.padded, device=device), runtime.far.layout.group)[2:])
    n, each = what_is_missed(runtime)
    things = torch.arange(n, dtype=torch.int32, device=device)
    if runtime.is_sparse:
        chosen = things[None], torch.full((1, n), REFINED, dtype=torch.int8, device=device)
        computed = _best(lambda: beside.neurons(layer, x, ids, *chosen))
    else:
        computed = _best(lambda: beside.experts(layer, x, ids))
    asked = _best(lambda: [part.cpu() for part in x])

    def emptied() -> None:
        forget(runtime.near.pools()[-1][0])
        runtime.counts.tolist()  # waits for the card, before the clock starts

    def fetched() -> None:
        runtime.bring(0, things, records=runtime.is_sparse)
        runtime.counts.tolist()
    rates = Rates(n * each / _best(fetched, emptied), n * each / computed, asked)
    runtime.reset()
    return rates


def what_is_missed(runtime: Runtime) -> tuple[int, int]:
    """Of a layer, at most: how many records, or experts, and the bytes of each."""
    if runtime.is_sparse:
        return max(1, runtime.most_records()[0]), runtime.far.layout.record
    return min(runtime.top_k, runtime.far.experts), runtime.far.expert_bytes


def told(rates: Rates, runtime: Runtime) -> str:
    """The share in a sentence."""
    n, each = what_is_missed(runtime)
    return (f"Measured: {'neurons' if runtime.is_sparse else 'experts'} come over the link at {size(rates.link)} a "
            f"second, and the processor computes them where they lie at {size(rates.host)} a second; of {n} missing "
            f"ones it takes {host_takes(n, each, rates)}. Steps are launched one by one meanwhile.")


def _best(work: Callable, before: Callable = lambda: None) -> float:
    """Seconds of `work`; the first run, which may compile, does not count."""
    found = []
    for _ in range(REPEATS + 1):
        before()
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return max(min(found[1:]), 1e-9)
