"""The runtime: near memory's life, the token's clock, the counters, and the decode step over packed experts.

Decode (`phase == "decode"`) goes through near memory: whole experts at level `exact`; sketch, score, select, fetch,
apply at the sparse ones. A token ends, and near memory ages, when the first MoE layer is called for the next one.
Results do not depend on what is near, nor on prediction. What a step changes are tensors changed in place, and nothing
here reads them back, so that a step can be recorded once and replayed. Near memory of every kind lies in one arena.
Three sides add how prefill computes and what is special about their far memory: host.py on the processor, device.py on
a card, full.py for uncompressed checkpoints.

Legend: T tokens of a step, k routed experts, I neurons, K neurons that a layer keeps, H hidden, L layers, E experts.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch

from engine.core import SPARSE_LEVELS, Counters, UserError
from engine.experts.cache import NearMemory, SparseCache, WholeCache
from engine.experts.hook import Hooked
from engine.experts.layer import Activity, LayerExperts, LevelPlan
from engine.experts.side_stream import SideStream
from engine.experts.store import Far, offered
from engine.experts.window import Window, chosen
from engine.machine.pinned_memory import HostMemory
from engine.planning.arena import ArenaSizes
from engine.policies.fidelity import heard
from engine.policies.prefetch import next_experts
from kernels.activation import FixedPoint, NeuronBias, quantize
from kernels.apply import apply
from kernels.dense import dense
from kernels.evict import age
from kernels.fill import fill, fill_through_host
from kernels.pool import forget, take
from kernels.resolve import Resolved, resolve_experts, resolve_neurons
from kernels.score import score, score_up
from kernels.select import BINS, select_above

Tensor = torch.Tensor
Rest = Callable[[], Tensor]


class Runtime(Hooked, ABC):
    """What the experts modules of one open model share. Not thread-safe: one thread owns it."""

    def __init__(self, far: Far, layers: list[LayerExperts], top_k: int, plans: dict[str, LevelPlan], level: str,
                 near_bytes: int | None = None, predict: bool = True, device: str = "cpu", tokens: int = 1) -> None:
        """near_bytes None: room for everything. tokens: of one step, at most."""
        self.far, self.layers, self.top_k, self.plans = far, layers, top_k, plans
        self.predict, self.device, self.tokens = predict, device, tokens
        self.has_gaps = any(layer.is_shortcut for layer in layers)
        self.phase = "auto"  # prefill | decode | auto: one token is decode, more are prefill
        self.window: Window | None = None  # of the forward under way, where somebody tells: engine/model/windows.py
        self.reason = ""  # why the processor computes what a card was asked for
        self.memories: list[HostMemory] = []  # of the trunk, locked for a card
        self.prefill_far_bytes = 0
        self.headroom, self.link_bytes_per_second = True, float("inf")  # see engine/policies/prefetch.py
        self.counts = torch.zeros(5, dtype=torch.int64, device=device)  # the fields of Counters but the last
        self.counted: list[int] | None = None  # `counts` as of the last token, where they came back with it
        self.busy = Activity(far.layers, far.experts, device, self.has_gaps)
        self.picks = self.busy.picks
        self.clock = torch.zeros(1, dtype=torch.int32, device=device)  # the token under way, or the last one
        self.done = torch.zeros((), dtype=torch.bool, device=device)  # counts nothing more; may be the cache's flag
        self.ahead_bytes = torch.full((1,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
        self.thresholds = torch.zeros(far.layers, far.experts, dtype=torch.float32, device=device)
        self.budgets = torch.zeros(far.layers, 2, dtype=torch.int32, device=device)  # refined, and all that are kept
        self.histogram: Tensor | None = torch.zeros(3, BINS, dtype=torch.int32, device=device)
        self.n_arenas, self.arena_bytes, self._arena, self._kinds = 0, -1, None, {}  # n_arenas: made so far
        self._side = SideStream(device)
        self.level, self.near_wish = level, near_bytes
        self.set_level(level, near_bytes)

    @abstractmethod
    def _prefill(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Many tokens, at the whole experts' 4-bit values, those that are near from near."""

    # --- settings, between answers ------------------------------------------------------------------------------
    @property
    def levels(self) -> tuple[str, ...]:
        """Levels that this folder can run at, best first."""
        return offered(self.far, self.plans)

    def set_level(self, level: str, near_bytes: int | None = None) -> None:
        """Change level and near memory (None: everything). Drops what is near. After a UserError nothing changed."""
        if level not in self.levels:
            raise UserError(f"This model cannot run at level {level}: it offers {', '.join(self.levels)}"
                            + ("." if level == "full" else "; calibrate it to get the others."))
        before = self.level, self.near_wish
        self.level, self.near_wish = level, near_bytes
        try:
            self.near = self._new_cache()
        except UserError:
            self.level, self.near_wish = before
            raise
        if self.is_sparse:
            self._set_budgets()
        self.reset()

    def _set_budgets(self) -> None:
        """The level as values, in the same tensors."""
        plan = self.plans[self.level]
        self.capacity = self.most_records()
        if self.level == "floe":
            self.thresholds.copy_(torch.tensor(plan.thresholds, dtype=torch.float32))
        else:
            self.kept_neurons = [(refined, refined + rest) for refined, rest in plan.budgets]
            self.budgets.copy_(torch.tensor(self.kept_neurons, dtype=torch.int32))

    def reset(self) -> None:
        """Forget what is near, in the same tensors, so that a recorded step goes on with them; counters go on."""
        for pool, _ in self.near.pools():
            forget(pool)
        self.clock.zero_()
        if self.histogram is not None:
            self.histogram.zero_()  # a step that was broken off may have left its counts
        if isinstance(self.near, SparseCache) and self.near.resident:
            ids = torch.arange(self.far.experts, dtype=torch.int32, device=self.device)
            for layer in range(self.far.layers):
                self.bring(layer, ids)

    # --- near memory --------------------------------------------------------------------------------------------
    @property
    def is_sparse(self) -> bool:
        return self.level in SPARSE_LEVELS

    @property
    def kind(self) -> str:
        """What near memory holds: levels of one kind share its tables."""
        return self.level

    @property
    def whole_bytes(self) -> int:
        """What a whole expert takes of near memory."""
        return self.far.layout.blob_bytes

    def everything_bytes(self) -> int:
        """Near memory at which nothing is ever fetched twice, at this level."""
        return self.far.layers * self.far.experts * self.whole_bytes + (self._bounce_bytes() if self.is_sparse else 0)

    def smallest_bytes(self) -> int:
        """The least near memory that this level can run in."""
        return self._sizes().least_bytes

    def sketches_bytes(self) -> int:
        """Near memory for all sketches and the bounce rows, and not a single record slot."""
        return self.far.layers * self.far.experts * self.far.layout.sketch_bytes + self._bounce_bytes()

    def _bounce_bytes(self) -> int:
        return max(self.most_records()) * self.tokens * self.far.layout.record

    def most_records(self) -> list[int]:
        """Records that a token may need of each layer."""
        if self.level == "floe":
            return [self.top_k * self.far.neurons] * self.far.layers
        return [sum(pair) for pair in self.plans[self.level].budgets]

    def _new_cache(self) -> NearMemory:
        """Near memory for `level` and `near_wish`."""
        wish = self.everything_bytes() if self.near_wish is None else self.near_wish
        if wish == self.arena_bytes and self.kind in self._kinds:
            return self._kinds[self.kind]
        sizes, rest = self._sizes(), (wish, self.device, lambda n_bytes: self._arena_of(wish)[:n_bytes])
        if self.is_sparse:
            token_records = sum(self.most_records()) * self.tokens
            cache = SparseCache(self.far.layout, sizes, self.far.layers, token_records, *rest)
        else:
            cache = WholeCache(sizes, self.far.layers, *rest)
        self._kinds[self.kind] = cache
        return cache

    def _sizes(self) -> ArenaSizes:
        """What near memory is divided into at this level."""
        far, step, kept = self.far, self.top_k * self.tokens, self.far.experts * self._unread_layers
        if not self.is_sparse:
            return ArenaSizes(far.layers * far.experts, self.whole_bytes, step, kept=kept)
        return ArenaSizes(far.layers * far.experts, far.layout.sketch_bytes, step, far.neurons, far.layout.record,
                          max(self.most_records()) * self.tokens, kept)

    @property
    def _unread_layers(self) -> int:
        """The last ones, which the side that computes cannot read by itself."""
        return 0

    def _arena_of(self, n_bytes: int) -> Tensor:
        if n_bytes != self.arena_bytes:
            self._drop_arena()  # the old one goes before the new one comes: there is no room for both
            self._arena, self.arena_bytes = torch.empty(n_bytes, dtype=torch.uint8, device=self.device), n_bytes
            self.n_arenas += 1
        return self._arena

    def _drop_arena(self) -> None:
        self._kinds.clear()
        self.near = self._arena = None
        self.arena_bytes = -1  # until there is one: the card may be full

    def close(self) -> None:
        """Give page-locked memory back; its driver waits for the card first."""
        for memory in self.memories:
            memory.close()
        self.far.close()

    # --- numbers ------------------------------------------------------------------------------------------------
    def counters(self) -> Counters:
        """Totals since the model was opened, decode only; waits for the device where no token has come back."""
        return Counters(*(self.counts.tolist() if self.counted is None else self.counted))

    @property
    def near_bytes(self) -> int:
        return self.near.near_bytes

    def near_used_bytes(self) -> int:
        return self.near.used_bytes()

    def residency(self) -> list[float]:
        """Share of each layer's records (or experts) that is near."""
        return self.near.residency()

    def activity(self) -> list[list[float]]:
        """[L][E] numbers, 0 to 1: shares of the last decoded tokens that took an expert, newer ones counting more."""
        return self.busy.shares()

    def count_wasted(self, aged: Tensor, records: bool) -> None:
        """aged: what `age` returned; its second number are objects that were fetched ahead in vain."""
        each = self.far.layout.record if records else self._object_bytes
        self.counts[4:].add_(aged[1:] * each * self.done.logical_not())

    @property
    def _object_bytes(self) -> int:
        """Of what a step wants of a routed expert before anything else."""
        return self.far.layout.sketch_bytes if self.is_sparse else self.far.expert_bytes

    # --- the experts function -----------------------------------------------------------------------------------
    def forward(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None,
                ) -> Tensor:
        """x [T, H], ids and weights [T, k] -> [T, H] like x, on top of residual [T, H], like x, where there is one."""
        return self.begin(layer, x, ids, weights, residual)()

    def begin(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None,
              ) -> Rest:
        """The first part of `forward` -> the rest, to be called before any other layer begins. What a step lacks is on
        its way in between, where the layer is a shortcut's beside what the caller computes."""
        hidden, ids, weights = x.to(self.device), ids.to(self.device), weights.to(self.device)
        residual = None if residual is None else residual.to(self.device)  # a trunk may lie on a card, and not they
        self._side.join()
        out, window = None, Window.of(self.phase, self.window, len(x))
        if layer.index == 0 and window.whole < window.length:
            self._begin_step()
        if self.hook is not None:
            ids, weights = self.hook.routed(layer, hidden, ids.clamp(min=0) if self.has_gaps else ids, weights)
            out = self.hook.instead(layer, hidden, ids, weights)
        in_step = self.hook is None and window.whole == 0 and residual is not None  # the last kernel adds it
        if layer.is_shortcut:
            ids = torch.where(weights == 0, -1, ids)
        given = (hidden, ids, weights, residual) if in_step else (hidden, ids, weights)
        rest = self._decode(layer, *given) if out is None and window.whole == 0 else None
        if out is None and rest is None:
            out = window.computed(partial(self._prefill, layer), lambda *some: self._decode(layer, *some)(), *given)

        def ended() -> Tensor:
            done = out if rest is None else rest()
            done = done if self.hook is None else self.hook.added(layer, hidden, done)
            return (done if residual is None or in_step else residual + done).to(x.device, x.dtype)
        return ended

    def _decode(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, *residual: Tensor) -> Rest:
        """A step; of more tokens than were planned for, one after the other -> its rest, which gives float32 [T, H]."""
        self.busy.picked(layer.index, ids)
        step, n = self._sparse if self.is_sparse else self._whole, self.tokens
        given = x.float(), ids.contiguous(), weights.float().contiguous(), *(rows.float() for rows in residual)
        if len(x) <= n:
            return step(layer, *given)
        return lambda: torch.cat([step(layer, *some)() for some in zip(*(t.split(n) for t in given), strict=True)])

    def _begin_step(self) -> None:
        """The token before has ended: make room for this one."""
        self.busy.step_begins()
        if self.hook is not None:
            self.hook.token_ended()
        for (pool, reserve), records in zip(self.near.pools(), (False, True), strict=False):
            if self.hook is not None:
                reserve = self.hook.keep_free(reserve)
            if len(pool.object_of) < len(pool.slot_of):  # else nothing ever leaves
                self.count_wasted(age(pool, self.clock, reserve), records)
        self.clock.add_(1)
        if self.hook is not None:
            self.hook.token_begins()

    # --- a step -------------------------------------------------------------------------------------------------
    def _whole(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None,
               ) -> Rest:
        """At a level of whole experts; all float32 but ids: [T, H], [T, k], [T, k], [T, H] -> the rest -> [T, H]."""
        place = self._demand(layer.index, ids, weights)
        blobs, bias = self.near.rows(layer.index, False), layer.neuron_bias(ids)
        product = partial(dense, x, blobs, place, self.far.layout, layer.gate, bias)
        return partial(self._mixed, layer, x, product, ids, weights, residual)

    def _sparse(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None,
                ) -> Rest:
        """Sketches, scores, the layer's budget, the records behind it; the rest is the product. As `_whole`."""
        bias = layer.neuron_bias(ids)
        place = self._demand(layer.index, ids, weights)
        self._side.join()  # a shortcut's sketches
        codes, scales, *fixed = self._quantized(x)
        neurons, fidelity, where = self._choose(layer, (codes, scales), place, ids, weights, bias)
        sketches, records = self._rows(layer.index), self.near.rows(layer.index, True)
        product = partial(apply, x, sketches, place, records, where, neurons, fidelity, self.far.layout, layer.gate,
                          bias, fixed=FixedPoint(*fixed) if fixed else None)
        return partial(self._mixed, layer, x, product, ids, weights, residual)

    def _mixed(self, layer: LayerExperts, x: Tensor, product: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
        """The rest of a step; given: ids, weights, residual."""
        self._side.join()
        self._look_ahead(layer, x)
        return layer.mixed(product, *given, self.far.hidden, self.may_leave_out)

    def _choose(self, layer: LayerExperts, x: tuple[Tensor, Tensor], place: Tensor, ids: Tensor, weights: Tensor,
                bias: NeuronBias | None) -> tuple[Tensor, Tensor, Tensor]:
        """`_selected`, and where their records are near, int32 [T, K]."""
        found = self._selected(layer, x, place, ids, weights, bias)
        return *found, self._bring_neurons(layer.index, ids, *found)

    def _selected(self, layer: LayerExperts, x: tuple[Tensor, Tensor], place: Tensor, ids: Tensor, weights: Tensor,
                  bias: NeuronBias | None) -> tuple[Tensor, Tensor]:
        """x: codes and scales -> neurons int32 [T, K] ascending, then -1; fidelity int8 [T, K]."""
        layout, capacity, given = self.far.layout, self.capacity[layer.index], (*x, self._rows(layer.index), place)
        if self.level == "floe":
            limits = self.thresholds[layer.index][ids.long()].repeat_interleave(layout.neurons, 1)
            found = select_above(score_up(*given, layout, bias), limits, capacity)
        else:
            histogram = self.histogram[:1] if self.histogram is not None and len(place) == 1 else None
            scores = score(*given, weights, layout, layer.gate, bias, histogram)
            found = chosen(scores, ids, self._budget(layer.index), capacity, histogram)
        if layer.is_shortcut:
            found = heard(*found, weights, layout.neurons)
        return found if self.hook is None else self.hook.selected(layer, ids, weights, *found)

    def _quantized(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, H] -> codes and scales for scores, then what there is of a FixedPoint, all padded."""
        return quantize(x, self.far.layout.group, self.far.layout.padded)

    def _budget(self, layer: int) -> tuple[int | Tensor, ...]:
        """Neurons refined, and all that are kept: tensors, so that a recorded step can be told another level."""
        return self.budgets[layer].split(1)

    # --- bytes on their way -------------------------------------------------------------------------------------
    def _demand(self, layer: int, ids: Tensor, weights: Tensor) -> Tensor:
        """Routed experts, or their sketches, near -> place int32 [T, k]. What is left out has weight 0: nothing of it
        is fetched, and the place of another stands there."""
        if self._in_order(layer) is not None:
            if layer == 0:  # counted for all layers at once
                self.counts[:2].add_(self.far.layers * ids.numel() * self._object_bytes * self.done.logical_not())
            return ids
        left_out = weights == 0 if self.may_leave_out else None
        wanted = ids if left_out is None else torch.where(left_out, -1, ids)
        if self.hook is not None:
            self.hook.demanded(layer, wanted)
        place = self._bring_experts(layer, wanted)
        if left_out is None:
            return place
        return torch.where(left_out, place.gather(1, weights.argmax(1, keepdim=True)), place).clamp(min=0)

    def _in_order(self, layer: int) -> Tensor | None:
        """Sketches at their experts' numbers, so that nothing has to be looked up; a hook decides by what is near."""
        return None if self.may_leave_out else self.near.in_order(layer)

    def _rows(self, layer: int) -> Tensor:
        """What the places of `_demand` are places in."""
        rows = self._in_order(layer)
        return self.near.rows(layer, False) if rows is None else rows

    def _bring_experts(self, layer: int, ids: Tensor, most_ahead: Tensor | None = None) -> Tensor:
        """Experts or their sketches near -> place int32 [T, k]; with most_ahead ahead of demand, so many bytes."""
        pool, _ = self.near.pools()[0]
        found = resolve_experts(pool, ids, layer * self.far.experts, self._object_bytes, self.clock, self.counts,
                                self.done, most_ahead)
        return self._fill(layer, False, found, most_ahead is not None)

    def _bring_neurons(self, layer: int, ids: Tensor, neurons: Tensor, fidelity: Tensor) -> Tensor:
        """Records near -> place int32 [T, K]."""
        pool, _ = self.near.pools()[1]
        first = layer * self.far.experts * self.far.neurons
        found = resolve_neurons(pool, neurons, fidelity, ids, first, self.far.layout, self.clock, self.counts,
                                self.done)
        return self._fill(layer, True, found)

    def _fill(self, layer: int, records: bool, found: Resolved, ahead: bool = False) -> Tensor:
        """Bring what is missing -> place int32 [T, n]. What is fetched ahead, or early, crosses the link beside the
        main stream, which must `join` before it is read."""
        source, place, have, need, misses = found
        if self._is_kept(layer):  # nothing is ever missing
            return place
        if (ahead or self.predict and self.has_gaps) and layer < self.far.readable_layers:
            self._side.run(lambda: self._copy(layer, records, source, place, have, need, misses), *found)
        else:
            self._copy(layer, records, source, place, have, need, misses)
        return place

    def _copy(self, layer: int, records: bool, *found: Tensor) -> None:
        """found: source, place, have and need of `fill`, and its misses where they are known."""
        source, *rest = found
        far = (self.far.blobs if not self.is_sparse else self.far.records if records else self.far.sketches)(layer)
        near = self.near.rows(layer, records)
        if layer < self.far.readable_layers:
            fill(far, source, near, *rest)
        else:
            fill_through_host(far, source, near, *rest[:3])

    def bring(self, layer: int, ids: Tensor, records: bool = False, ahead: bool = False) -> Tensor | int:
        """Between steps: objects `ids` int32 [n] of a layer near, whole -> bytes fetched. ahead: into free slots only,
        as far as they reach."""
        pool, _ = self.near.pools()[records]
        need = torch.full_like(ids, self.far.layout.record if records else self._object_bytes)
        place, have = take(pool, ids + layer * (len(pool.slot_of) // self.far.layers), need, self.clock, ahead)
        self._copy(layer, records, ids, place, have, need)
        return torch.where(place >= 0, need - have, 0).sum()

    def _is_kept(self, layer: int) -> bool:
        return layer >= self.far.layers - self.near.kept // self.far.experts

    @property
    def asks_the_host(self) -> bool:
        """Whether the host fetches for some layers, so that a step cannot be recorded."""
        return self._unread_layers * self.far.experts > self.near.kept

    @property
    def looks_ahead(self) -> bool:
        """Whether a step fetches for the next layer; a recorded step does so for ever, or never."""
        return self.predict and self.headroom and not self.near.is_complete()

    def _look_ahead(self, layer: LayerExperts, x: Tensor) -> None:
        """Fetch what a later layer is likely to want, behind this layer's demand and beside its product."""
        if not self.looks_ahead:
            return
        guesses = None if self.hook is None else self.hook.guess(layer, x)
        if guesses is None:
            guesses = [(following.index, next_experts(x, following.router_weight, self.top_k)) for following in
                       self.layers[layer.index + 1:layer.index + 2] if following.can_be_guessed]
        self.fetch_ahead(guesses)

    def fetch_ahead(self, guesses: list[tuple[int, Tensor]]) -> None:
        """(layer, ids [1, n]) into free slots."""
        for layer, ids in guesses:
            self._bring_experts(layer, ids, self.ahead_bytes)
