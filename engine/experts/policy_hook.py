"""Policies in a running model: the hook that asks engine/policies/ what to fetch ahead, what may stay, which experts
count and how exactly. With an exact choice the output is the model's own to the bit (with `miss=beside` up to
rounding); the others are for who asked.

One object for one open model. What a policy learns it learns from decode steps of one token, whose end it meets behind
the last layer. Of a step it remembers only tensors that are changed in place, and looks at no value, so that a recorded
step holds it; what looks at values (how a router weighs, where an answer begins, whether fetching ahead pays) does so
while a prompt is read or between tokens.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from engine.core import UserError
from engine.experts.base_experts import BaseExperts
from engine.experts.cache import pinnable
from engine.experts.device import Beside, measured, told
from engine.experts.hook import Hook
from engine.experts.layer import LayerExperts
from engine.experts.runtime import Runtime
from engine.experts.store import NO_EXPERTS, FarTable
from engine.experts.working_set import pin
from engine.policies import fidelity as exactness
from engine.policies import route
from engine.policies.build import guesses_of, rules_of
from engine.policies.choice import Choice, parse, refusal
from engine.policies.predict import Payoff, Predictor
from engine.policies.residency import Admitted, stamps, stays_far
from engine.policies.split import Rates, host_takes
from kernels.evict import age

Tensor = torch.Tensor
SAMPLE = 64  # tokens of a prompt from which it is told how a router weighs
MOST = torch.iinfo(torch.int32).max


class PolicyHook(Hook):
    """`with runtime.hooked(PolicyHook(...))`. dropped: sum over tokens and layers of the share of the router's weight
    that was left out or given to others; changed: picks that are not the router's."""

    def __init__(self, runtime: Runtime, model: nn.Module, choice: Choice,
                 learned: Mapping[str, Predictor] | None = None, **taught) -> None:
        """taught: what the residency rule takes besides, see engine/policies/build.py. UserError for a level or a model
        that a policy does not suit."""
        if why := refusal(choice, runtime.level, device_of(runtime)):
            raise UserError(why)
        self.runtime, self.choice, self._taught, self._made = runtime, choice, taught, {}
        far, k = runtime.far, runtime.top_k
        self._bases = BaseExperts(runtime) if choice.fidelity.name == "base" else None
        self._on_base: Tensor | None = None  # weights [T] of the base expert, from `routed` to `added`
        learned = {name: network.to(runtime.device) for name, network in (learned or {}).items()}
        with torch.device(runtime.device):
            self.guesses = guesses_of(choice, far.layers, far.experts, k, far.hidden, learned)
            self.dropped, self.changed = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
            self._embedding, self._logits = (torch.zeros(shape, dtype=torch.float32)
                                             for shape in (far.hidden, (far.layers, far.experts)))
            self._experts = torch.zeros(far.layers, k, dtype=torch.int64)
            self._shares = torch.zeros(far.layers, k, dtype=torch.float32)
            self._read = torch.zeros(far.layers * far.experts, dtype=torch.float32)
        self.beside = Beside(runtime) if self.asks_the_host else None
        self._rates: dict[bool, Rates] = {}  # by whether records are near, or whole experts
        if self.beside is not None:
            self._measure()
        self.payoff, self._began_at = Payoff(), int(runtime.clock)
        prefix, record, weights = far.layout.prefix, far.layout.record, 3 * far.layout.padded
        self._bits = (8 * prefix / weights, 8 * record / weights)
        self._weigh: list[route.Weights | None] = [None] * far.layers
        self._reads = self.guesses.predictor.reads if self.guesses else frozenset()
        self._make_rules()
        self._answer_begins()
        self._watch = (model.get_input_embeddings().register_forward_hook(self._embedded)
                       if "embedding" in self._reads else None)

    @property
    def lossy(self) -> str:
        return "" if self.choice.is_exact or not self.runtime.near.pools() else self.choice.text

    @property
    def leaves_out(self) -> bool:
        return self.choice.route.name != "exact" or self._bases is not None

    @property
    def sees_near(self) -> bool:
        return bool(self.lossy) and (self.choice.route.name in ("near", "skip") or self.choice.fidelity.name != "exact")

    @property
    def asks_the_host(self) -> bool:
        return self.choice.miss.name == "beside"

    def state(self) -> list[Tensor]:
        self._make_rules()
        parts = [part for part in (self.guesses and self.guesses.predictor, *self.rules) if part is not None]
        parts += [rule.behind for rule in self.rules if isinstance(rule, Admitted)]
        guessed = [self.guesses.named, self.guesses.asked] if self.guesses else []
        return [*(value for part in parts for value in vars(part).values() if isinstance(value, Tensor)), *guessed,
                self.dropped, self.changed, self._logits, self._experts, self._shares, self._read, *self._used]

    def close(self) -> None:
        """The model's embedding is no longer watched, and fetching ahead no longer rests."""
        self.runtime.ahead_bytes.fill_(MOST)
        if self._watch is not None:
            self._watch.remove()

    def _make_rules(self) -> None:
        """For the pools as they are: another level or size has others. Those of one arena are kept: a step that was
        recorded with them may be replayed again."""
        runtime, pools = self.runtime, [pool for pool, _ in self.runtime.near.pools()]
        key = runtime.n_arenas, *((id(pool.slot_of), len(pool.object_of)) for pool in pools)
        if key not in self._made:
            layers, self._made = runtime.far.layers, {old: m for old, m in self._made.items() if old[0] == key[0]}
            rules = rules_of(self.choice, [(len(pool.slot_of), pool.slot_of.device) for pool in pools], layers,
                             self.guesses, **self._taught)
            widths = [runtime.top_k, max(runtime.capacity) if runtime.is_sparse else 0]
            used = [torch.full((layers, width), -1, dtype=torch.int64, device=runtime.device) for width in widths]
            self._made[key] = rules, used
        self.rules, self._used = self._made[key]

    def _embedded(self, module: nn.Module, given: tuple, embedded: Tensor) -> None:
        self._embedding.copy_(embedded.reshape(-1, embedded.shape[-1])[-1].half())  # as a trace keeps it

    def prompt_read(self) -> None:
        """Where nothing may be fetched later, what the conversation's prompts took most is fetched now (eMoE)."""
        pools = self.runtime.near.pools()
        if self.choice.route.name == "near-only" and pools:
            likeliest = self._read.argsort(descending=True, stable=True)[:pinnable(*pools[0])]
            pin(self.runtime, [divmod(thing, self.runtime.far.experts) for thing in likeliest.tolist()])
            self._read.mul_(0.5)

    # --- between tokens -----------------------------------------------------------------------------------------
    def _answer_begins(self) -> None:
        for part in (self.guesses and self.guesses.predictor, *self.rules):
            if part is not None:
                part.start()

    def _learn(self) -> None:
        """A token has been through all layers."""
        for rule, used, shares in zip(self.rules, self._used, (self._shares.flatten(), None), strict=False):
            if rule is not None:
                rule.used(used.flatten(), shares)
            used.fill_(-1)
        if self.guesses is not None:
            self.guesses.end(self._experts, self._logits)

    def token_ended(self) -> None:
        if self.beside is not None:
            self._measure()
        runtime, pools = self.runtime, [pool for pool, _ in self.runtime.near.pools()]
        self._make_rules()
        if self.guesses is not None:
            self._guessed = self.guesses.begin(self._embedding)
        for pool, rule in zip(pools, self.rules, strict=True):
            if rule is not None and len(pool.object_of) < len(pool.slot_of):
                pool.stamp.copy_(stamps(rule, pool.object_of, pool.stamp, runtime.clock))
        if not runtime.is_recorded:
            self.counted(tuple(runtime.counts.tolist()))

    def counted(self, counts: tuple[int, ...]) -> None:
        self.runtime.ahead_bytes.fill_(MOST if self.payoff.pays(*counts[3:5]) else 0)

    def keep_free(self, reserve: int) -> int:
        return 0 if self.choice.free.name == "layer" else reserve

    def demanded(self, layer: int, ids: Tensor) -> None:
        self._make_room(0, layer, torch.where(ids < 0, -1, ids + layer * self.runtime.far.experts))

    def _make_room(self, which: int, layer: int, things: Tensor) -> None:
        """Of a pool as many slots as are missing of a layer's `things`, -1 for none, where a layer frees what it
        lacks."""
        runtime, pools = self.runtime, self.runtime.near.pools()
        if self.choice.free.name != "layer" or not pools:
            return
        pool, rule = pools[which][0], self.rules[which]
        if len(pool.object_of) < len(pool.slot_of):
            n = len(pool.slot_of) // runtime.far.layers
            wanted = things.new_zeros(n + 1, dtype=torch.bool)  # tokens of a step want the same: it counts once
            wanted.index_fill_(0, torch.where(things < 0, n, things - layer * n).flatten().long(), True)
            missing = wanted[:n] & (pool.slot_of[layer * n:(layer + 1) * n] < 0)
            if rule is not None:
                pool.stamp.copy_(stamps(rule, pool.object_of, pool.stamp, runtime.clock, ended=False))
            runtime.count_wasted(age(pool, runtime.clock, missing.sum(dtype=torch.int32)), bool(which))

    def stays_far(self, layer: int, ids: Tensor) -> Tensor | None:
        runtime, pools = self.runtime, self.runtime.near.pools()
        if self.choice.miss.name == "copy" or not pools:
            return None
        pool, things = pools[0][0], (ids[0].clamp(min=0) + layer * runtime.far.experts).long()
        missing = (ids[0] >= 0) & (pool.slot_of[things] < 0)
        if self.asks_the_host:  # those that the router likes least
            return self._for_the_host(missing, runtime.far.expert_bytes)
        return stays_far(self.rules[0], things, missing, int(pool.n_free))[None]

    def neurons_stay_far(self, layer: int, ids: Tensor, neurons: Tensor) -> Tensor | None:
        things = self._things(layer, ids, neurons)[0]
        missing = (things >= 0) & (self.runtime.near.pools()[1][0].slot_of[things.clamp(min=0)] < 0)
        far = self._for_the_host(missing, self.runtime.far.layout.record)
        self._make_room(1, layer, torch.where(far[0].to(things.device), -1, things)[None])
        return far

    def _for_the_host(self, missing: Tensor, each_bytes: int) -> Tensor:
        """bool [1, n], on the processor: of what is missing, bool [n], the last ones, as many as it takes."""
        at = missing.cpu().nonzero()[:, 0]
        n = host_takes(len(at), each_bytes, self.rates)
        return torch.zeros(1, len(missing), dtype=torch.bool).index_fill_(1, at[len(at) - n:], True)

    @property
    def rates(self) -> Rates:
        """Of this level's kind."""
        return self._rates[self.runtime.is_sparse]

    def _measure(self) -> None:
        """Where a level of another kind was chosen since: before its first step, when nothing is near."""
        if self.runtime.is_sparse not in self._rates:
            self._rates[self.runtime.is_sparse] = measured(self.runtime, self.beside)

    @property
    def note(self) -> str:
        is_known = self.runtime.is_sparse in self._rates
        return told(self.rates, self.runtime) if is_known else ""

    def token_begins(self) -> None:
        if self.guesses is not None and self.runtime.looks_ahead:
            self.runtime.fetch_ahead([(layer, ids[None]) for layer, ids in self._guessed])

    # --- inside a token -----------------------------------------------------------------------------------------
    def routed(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        at, given = layer.index, x.float()
        if self.runtime.phase == "prefill" or len(x) > 1:
            if at == 0 and self._began_at != (now := int(self.runtime.clock)):
                self._began_at = now
                self._make_rules()
                self._answer_begins()
            if self.choice.route.name == "near-only":
                taken = ids.flatten().long() + at * self.runtime.far.experts
                self._read.index_add_(0, taken, torch.ones_like(taken, dtype=torch.float32))
            if self.choice.route.name != "exact":
                logits = given[-SAMPLE:] @ layer.router_weight.T
                self._weigh[at] = self._weigh[at] or route.Weights(logits, ids[-SAMPLE:], weights[-SAMPLE:])
            return ids, weights
        if "logits" in self._reads or self.choice.route.name != "exact":
            self._logits[at] = (given @ layer.router_weight.T)[0]
        chosen, shares = self._routed(at, ids.long(), weights.float())
        if self._bases is not None:
            shares, self._on_base = exactness.stand_in(shares, self._near(at).gather(1, chosen))
        if self.rules and self.rules[0] is not None:
            self._used[0][at] = torch.where(shares[0] == 0, -1, chosen[0] + at * self.runtime.far.experts)
            self._shares[at] = shares[0] / shares[0].sum().clamp_min(1e-12)
        if self.guesses is not None:
            self._experts[at] = torch.where(shares[0] == 0, -1, chosen[0])
        if self.choice.route.name == "exact" and self._bases is None:
            return ids, weights
        lost, different = route.left_out(ids.long(), weights.float(), chosen, shares)
        counts = self.runtime.done.logical_not()
        self.dropped += lost * counts
        self.changed += different * counts
        return chosen.to(ids.dtype), shares.to(weights.dtype)

    def added(self, layer: LayerExperts, x: Tensor, out: Tensor) -> Tensor:
        if self._on_base is not None:
            weights, self._on_base = self._on_base, None
            if self.runtime.is_recorded or bool(weights.any()):  # a recorded step computes it, whatever the weights
                out = out + weights[:, None] * self._bases.of(layer, x)
        if layer.index == self.runtime.far.layers - 1 and len(x) == 1 and self.runtime.phase != "prefill":
            self._learn()
        return out

    def _routed(self, at: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.choice.route.name == "exact":
            return ids, weights
        logits = self._logits[at][None]
        self._weigh[at] = self._weigh[at] or route.Weights(logits, ids, weights)
        return route.routed(*self.choice.route.parts, logits, ids, weights, self._near(at), self._weigh[at])

    def _near(self, layer: int) -> Tensor:
        """bool [1, E]: what of a layer is near."""
        pools, n = self.runtime.near.pools(), self.runtime.far.experts
        if not pools:
            return torch.ones(1, n, dtype=torch.bool)
        return pools[0][0].slot_of[layer * n:(layer + 1) * n][None] >= 0

    def selected(self, layer: LayerExperts, ids: Tensor, weights: Tensor, neurons: Tensor, fidelity: Tensor,
                 ) -> tuple[Tensor, Tensor]:
        far, pools = self.runtime.far, self.runtime.near.pools()
        if self.choice.route.name != "exact":
            neurons, fidelity = exactness.heard(neurons, fidelity, weights, far.neurons)
        if self.choice.fidelity.name not in ("exact", "base"):
            things = self._things(layer.index, ids, neurons)
            near = pools[1][0].slot_of[things.clamp(min=0)] >= 0 if pools else torch.ones_like(things, dtype=torch.bool)
            neurons, fidelity = exactness.coarser(*self.choice.fidelity.parts, neurons, fidelity, weights, near,
                                                  far.neurons, self._bits)
        if pools and (self.rules[1] is not None or self.choice.free.name == "layer"):
            things = self._things(layer.index, ids, neurons)
            self._used[1][layer.index, :neurons.shape[1]] = things[0]
            if not self.asks_the_host or len(neurons) > 1:  # else behind the choice of what comes at all
                self._make_room(1, layer.index, things)
        return neurons, fidelity

    def _things(self, layer: int, ids: Tensor, neurons: Tensor) -> Tensor:
        """Records int64 [T, K] as the pool numbers them, -1 for none."""
        far, there = self.runtime.far, neurons >= 0
        experts = ids.long().gather(1, (neurons.clamp(min=0) // far.neurons).long())
        return torch.where(there, (layer * far.experts + experts) * far.neurons + neurons % far.neurons, -1)

    def guess(self, layer: LayerExperts, x: Tensor) -> list[tuple[int, Tensor]]:
        if self.guesses is None:
            return []
        horizon = self.guesses.predictor.horizon
        ahead = torch.zeros(horizon, self._logits.shape[1], dtype=torch.float32, device=x.device)
        for step, later in enumerate(self.runtime.layers[layer.index + 1:layer.index + 1 + horizon]):
            ahead[step] = (x @ later.router_weight.T)[0]
        found = self.guesses.at(layer.index, ahead, self._logits[layer.index], x[0].half().float())
        return [(target, ids[None]) for target, ids in found]


def device_of(runtime: Runtime) -> str:
    """As a refusal names it: the side that computes the experts, wherever its tensors are."""
    return "cuda" if runtime.is_recorded else "cpu"


def choose_policies(runtime: Runtime, model: nn.Module, policies: str) -> None:
    """Put policies (as engine/policies/choice.py reads them) in place of those before; "" for the engine's own.
    UserError, nothing changed, where they do not suit."""
    choice, before = parse(policies), runtime.hook
    if policies and isinstance(runtime.far, FarTable):
        raise UserError(NO_EXPERTS)
    if choice.route.name != "exact" and runtime.has_gaps:
        raise UserError(f"route={choice.route.name} weighs every pick, and this model's router also picks what has no "
                        "weights; leave the route out.")
    if why := refusal(choice, runtime.level, device_of(runtime)):
        raise UserError(why)
    hook = PolicyHook(runtime, model, choice) if policies else None
    if isinstance(before, PolicyHook):
        before.close()
    runtime.hook = hook
