"""A trace replayed without its model: what a choice of policies would have fetched, hit, wasted and left out.

Near memory is divided and its slots change hands exactly as in the engine (engine/policies/slots.py), so that on the
same run bytes and hits are the engine's own counters. A lossy route is replayed on the recorded logits: what it would
have changed in later layers is not known here. Belady's optimum is the bound that no rule passes: it knows the future.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import torch

from engine.core import Counters, Machine, ModelSpec, UserError
from engine.experts.cache import reserve_of
from engine.planning.arena import ArenaSizes
from engine.planning.plan import PlanRequest
from engine.planning.planner import plan
from engine.policies import fidelity as exactness
from engine.policies import route
from engine.policies.build import guesses_of, rules_of
from engine.policies.choice import Choice, parse
from engine.policies.predict import Payoff, Predictor
from engine.policies.residency import stamps, stays_far
from engine.policies.slots import Slots
from engine.policies.split import divide, recency_curve
from engine.policies.trace import RoutingTrace, RunNumbers
from kernels.select import DOWN_ONLY, REFINED

MOST = 2**31 - 1


@dataclass(frozen=True)
class Replay:
    """What one choice did. counters: in all; passed_bytes: of the far ones, what found no slot and was used once.
    recall: [3][L], of k, 2k and 3k guesses; rests: how often fetching ahead switched itself off. changed: picks that
    are not the router's. covered: share of picks whose expert was near, counted before anything was fetched."""

    name: str
    tokens: int
    slots: int
    counters: Counters
    passed_bytes: int = 0
    recall: tuple[tuple[float, ...], ...] = ()
    rests: int = 0
    changed: int = 0
    picks: int = 0

    @property
    def far_per_token(self) -> float:
        return self.counters.far_bytes / max(1, self.tokens)

    @property
    def crossed_per_token(self) -> float:
        """What crosses the link: on demand and ahead of it."""
        return (self.counters.far_bytes + self.counters.speculative_bytes) / max(1, self.tokens)

    @property
    def useful_share(self) -> float:
        """Of what was fetched ahead; what has not left yet counts as useful."""
        ahead = self.counters.speculative_bytes
        return 1 - self.counters.wasted_bytes / ahead if ahead else 0.0

    @property
    def mean_recall(self) -> list[float]:
        """Of k, 2k, 3k guesses, over the layers from the third on, as far as they were guessed."""
        return [float(np.mean([share for share in row[2:] if share] or [0.0])) for row in self.recall]

    def document(self) -> dict:
        counters, per = self.counters, max(1, self.tokens)
        a_token = {"needed": counters.needed_bytes, "demand": counters.far_bytes, "passed": self.passed_bytes,
                   "speculative": counters.speculative_bytes, "wasted": counters.wasted_bytes}
        return {"policies": self.name, "tokens": self.tokens, "slots": self.slots, "hit_rate": counters.hit_rate,
                **{f"{what}_bytes_per_token": n_bytes / per for what, n_bytes in a_token.items()},
                "dropped_weight_per_token": counters.dropped_weight / per,
                "changed_picks": self.changed / max(1, self.picks), "useful_share": self.useful_share,
                "rests": self.rests, "recall": [list(row) for row in self.recall]}


class Simulator:
    """One trace at one size of near memory. predict False: nothing is fetched ahead, whatever a choice says."""

    def __init__(self, trace: RoutingTrace, near_bytes: int, predict: bool = True,
                 learned: Mapping[str, Predictor] | None = None) -> None:
        run = trace.run
        self.trace, self.run, self.predict, self.learned = trace, run, predict, learned
        sizes = sizes_of(run)
        if near_bytes < sizes.least_bytes:
            raise UserError(f"{near_bytes:,} bytes of near memory do not hold what a step needs; give at least "
                            f"{sizes.least_bytes:,}.")
        self.near_bytes, self.split = near_bytes, sizes.divided(near_bytes)
        self.reserves = (reserve_of(self.split.slots, run.layers * run.top_k),
                         reserve_of(self.split.record_slots, sum(run.most_records)))
        self._steps = trace.steps
        self._experts = (trace.experts.astype(np.int64) + run.experts * np.arange(run.layers)[:, None])
        self._weigh = _weights(trace)

    def run_choice(self, choice: Choice, name: str = "", **taught) -> Replay:
        """taught: as PolicyHook takes it. UserError for a predictor that the trace has nothing for."""
        with torch.inference_mode():
            return _Run(self, choice, taught).replay(name or choice.text or "the engine's own")


class _Run:
    """The state of one replay."""

    def __init__(self, of: Simulator, choice: Choice, taught: dict) -> None:
        run, trace = of.run, of.trace
        if choice.miss.name == "beside":
            raise UserError("miss=beside goes by what a card and a processor were measured at, which no trace has; "
                            "replay another miss.")
        self.of, self.choice, self.run, self.trace = of, choice, run, trace
        self.guesses = guesses_of(choice, run.layers, run.experts, run.top_k, trace.embedding.shape[1],
                                  of.learned)
        if self.guesses is not None and self.guesses.predictor.horizon > trace.horizon:
            raise UserError(f"The trace looks {trace.horizon} layers ahead; record it with --horizon "
                            f"{self.guesses.predictor.horizon}.")
        n = run.layers * run.experts
        self.pools = [Slots(n, of.split.slots)]
        if run.is_sparse:
            self.pools.append(Slots(n * run.neurons, of.split.record_slots))
            if of.split.slots == n:
                self.pools[0].fill(range(n), run.sketch_bytes)
        self.rules = rules_of(choice, [(len(pool.slot_of), "cpu") for pool in self.pools], run.layers, self.guesses,
                              **taught)
        self._told = self._what_is_told()
        self.looks_ahead = of.predict and not (run.is_sparse and of.split.slots == n)
        self.payoff, self.clock, self.most_ahead = Payoff(), 0, MOST
        self.frees_late, self.in_place = choice.free.name == "layer", choice.miss.name == "place"
        self.left_far = 0  # bytes that were computed where they lie
        self.needed = self.hit = self.passed = self.ahead = self.wasted = self.changed = 0
        self.dropped = 0.0

    def replay(self, name: str) -> Replay:
        run, steps, decode = self.run, self.of._steps, self.trace.decode
        for row in steps.tolist():
            if not row or not decode[row - 1]:
                for part in (self.guesses and self.guesses.predictor, *self.rules):
                    if part is not None:
                        part.start()
            if self.guesses is not None:
                self._guessed = self.guesses.begin(self._told["embedding"][row])
            self._between()
            self._token(row)
        far = self.needed - self.hit - self.left_far
        counters = Counters(self.needed, self.hit, far, self.ahead, self.wasted, self.dropped)
        recall = tuple(tuple(self.guesses.recall(times)) for times in (1, 2, 3)) if self.guesses else ()
        return Replay(name, len(steps), self.of.split.slots, counters, self.passed, recall, self.payoff.rests,
                      self.changed, len(steps) * run.layers * run.top_k)

    def _what_is_told(self) -> dict[str, torch.Tensor]:
        """float32 [N, L, ..] of what the predictor reads, else nothing of the same length."""
        trace = self.trace
        if self.guesses is None:
            return {}
        predictor = self.guesses.predictor
        tables = {"embedding": trace.embedding, "logits": trace.logits, "input": trace.inputs, "ahead": trace.ahead}
        reads = predictor.reads | ({"ahead"} if predictor.horizon else set())
        nothing = torch.zeros(1, 1).expand(len(trace), self.run.layers)
        return {what: torch.from_numpy(table).float() if what in reads else nothing for what, table in tables.items()}

    def _between(self) -> None:
        """A token has ended: what the runtime and its hook do then."""
        self.most_ahead = MOST if self.payoff.pays(self.ahead, self.wasted) else 0
        experts, records = self.of.reserves
        self._free(0, 0 if self.frees_late else experts, ended=True)
        if len(self.pools) > 1:
            self._free(1, 0 if self.frees_late else records, ended=True)
        self.clock += 1

    def _free(self, which: int, reserve: int, ended: bool) -> None:
        pool, rule = self.pools[which], self.rules[which]
        if pool.fits_all:
            return

        def ranked() -> np.ndarray:
            tables = torch.from_numpy(pool.object_of), torch.from_numpy(pool.stamp)
            return stamps(rule, *tables, self.clock, ended).numpy()
        in_vain = pool.age(self.clock, reserve, None if rule is None else ranked)
        self.wasted += (self.run.object_bytes, self.run.record_bytes)[which] * in_vain

    def _token(self, row: int) -> None:
        run, taken, used = self.run, self._picks(row), []
        if self.guesses is not None:
            self._fetch(self._guessed)
        for layer in range(run.layers):
            things, weights = taken(layer)
            if self.in_place:
                things = self._brought(things)
            if self.frees_late:
                self._free(0, sum(self.pools[0].slot_of[thing] < 0 for thing in things), ended=False)
            self._demand(0, things, run.object_bytes)
            if run.is_sparse:
                records, needs = self._records(row, layer, weights)
                if self.frees_late:
                    self._free(1, sum(self.pools[1].slot_of[thing] < 0 for thing in records), ended=False)
                self._demand(1, records, needs)
                used += records
            if self.guesses is not None:
                told = (self._told[what][row, layer] for what in ("ahead", "logits", "input"))
                guessed = self.guesses.at(layer, *told)
                self._fetch(guessed)
        self._ended(row, used)

    def _picks(self, row: int):
        """-> a function of the layer: objects that count and their weights; keeps them for the token's end."""
        experts, weights = self.of._experts[row], self.trace.weights[row]
        by_router, first = self.choice.route.name == "exact", self.run.experts
        stands_in = self.choice.fidelity.name == "base"
        self._experts = torch.from_numpy(self.trace.experts[row].astype(np.int64))
        self._shares = torch.from_numpy(weights / weights.sum(1, keepdims=True).clip(1e-12))
        self._left = torch.from_numpy(weights == 0)
        if by_router and not stands_in:
            return lambda layer: (experts[layer][weights[layer] != 0].tolist(), weights[layer])

        def chosen(layer: int) -> tuple[list[int], np.ndarray]:
            ids, given = self._experts[layer][None], torch.from_numpy(weights[layer])[None]
            near = torch.from_numpy(self.pools[0].places[layer * first:(layer + 1) * first] >= 0)[None]
            logits, others, shares = torch.from_numpy(self.trace.logits[row, layer])[None], ids, given
            if not by_router:
                others, shares = route.routed(*self.choice.route.parts, logits, ids, given, near, self.of._weigh[layer])
            if stands_in:
                shares, _ = exactness.stand_in(shares, near.gather(1, others))
            lost, changed = route.left_out(ids, given, others, shares)
            self.dropped, self.changed = self.dropped + float(lost), self.changed + int(changed)
            self._left[layer] = shares[0] == 0
            self._experts[layer], self._shares[layer] = others[0], shares[0] / shares[0].sum().clamp_min(1e-12)
            kept = others[0][shares[0] != 0] + layer * first
            return kept.tolist(), shares[0].numpy()
        return chosen

    def _brought(self, things: list[int]) -> list[int]:
        """Of what a layer wants what is near or comes; the rest is computed where it lies."""
        pool, wanted = self.pools[0], torch.tensor(things)
        missing = torch.tensor([pool.slot_of[thing] < 0 for thing in things])
        stays = stays_far(self.rules[0], wanted, missing, pool.n_free)
        self.needed += self.run.object_bytes * int(stays.sum())
        self.left_far += self.run.object_bytes * int(stays.sum())
        return wanted[~stays].tolist()

    def _demand(self, pool: int, things: list[int], needs: int | list[int]) -> None:
        needs = [needs] * len(things) if isinstance(needs, int) else needs
        hit, passed = self.pools[pool].take(things, needs, self.clock)
        self.needed, self.hit, self.passed = self.needed + sum(needs), self.hit + hit, self.passed + passed

    def _records(self, row: int, layer: int, weights: np.ndarray) -> tuple[list[int], list[int]]:
        """Records that a sparse level chose, and the bytes wanted of each."""
        run, trace = self.run, self.trace
        neurons, whole = _kept(trace, row, layer, weights)
        experts = self._experts[layer].numpy() + layer * run.experts
        things = experts[neurons // run.neurons] * run.neurons + neurons % run.neurons
        if self.choice.fidelity.name != "exact":
            near = torch.from_numpy(self.pools[1].places[things] >= 0)[None]
            left, fidelity = exactness.coarser(
                *self.choice.fidelity.parts, torch.from_numpy(neurons.astype(np.int32))[None],
                torch.from_numpy(np.where(whole, REFINED, DOWN_ONLY).astype(np.int8))[None],
                torch.from_numpy(weights)[None], near, run.neurons, run.record_bits)
            there = left[0] >= 0
            neurons, whole = left[0][there].numpy(), fidelity[0][there].numpy() != DOWN_ONLY
            things = experts[neurons // run.neurons] * run.neurons + neurons % run.neurons
        return things.tolist(), np.where(whole, run.record_bytes, run.prefix_bytes).tolist()

    def _fetch(self, guessed: list[tuple[int, torch.Tensor]]) -> None:
        if self.looks_ahead:
            for layer, ids in guessed:
                things = (ids + layer * self.run.experts).tolist()
                self.ahead += self.pools[0].take_ahead(things, self.run.object_bytes, self.clock, self.most_ahead)

    def _ended(self, row: int, records: list[int]) -> None:
        if self.rules[0] is not None:
            first = self.run.experts * torch.arange(self.run.layers)[:, None]
            self.rules[0].used(torch.where(self._left, -1, self._experts + first).flatten(), self._shares.flatten())
        if len(self.rules) > 1 and self.rules[1] is not None:
            self.rules[1].used(torch.tensor(records, dtype=torch.int64), None)
        if self.guesses is not None:
            self.guesses.end(torch.where(self._left, -1, self._experts), self._told["logits"][row])


def sizes_of(run: RunNumbers) -> ArenaSizes:
    """What near memory is divided into: as a runtime on the processor does."""
    n = run.layers * run.experts
    if not run.is_sparse:
        return ArenaSizes(n, run.blob_bytes, run.top_k)
    return ArenaSizes(n, run.sketch_bytes, run.top_k, run.neurons, run.record_bytes, max(run.most_records))


def optimum(trace: RoutingTrace, near_bytes: int) -> Replay:
    """Belady's: of whole experts, or of sketches and of records, the one that is wanted last makes room, or nothing
    does. It is told the whole future, keeps every slot in use, and fetches on demand. Of records, of which a part may
    be near, it is the fewest misses and not quite the fewest bytes. Near memory is divided as ever."""
    run, split = trace.run, sizes_of(trace.run).divided(near_bytes)
    uses = (trace.experts[trace.steps].astype(np.int64) + run.experts * np.arange(run.layers)[:, None])
    uses = uses[trace.weights[trace.steps] != 0]
    needed = len(uses) * run.object_bytes
    stay = run.is_sparse and split.slots == run.layers * run.experts    # before the first step, uncounted
    hit, passed = (needed, 0) if stay else _last_wanted(uses, np.full(len(uses), run.object_bytes), split.slots)
    if run.is_sparse:
        things, needs = (np.concatenate(part) for part in zip(*(
            _record_uses(trace, row, layer) for row in trace.steps for layer in range(run.layers)), strict=True))
        more = _last_wanted(things, needs, split.record_slots)
        needed, hit, passed = needed + int(needs.sum()), hit + more[0], passed + more[1]
    return Replay("Belady's optimum", len(trace.steps), split.slots, Counters(needed, hit, needed - hit), passed)


def _last_wanted(uses: np.ndarray, needs: np.ndarray, slots: int) -> tuple[int, int]:
    """-> bytes that were hit, bytes that passed through."""
    following, last = np.full(len(uses), MOST, np.int64), {}
    for at in range(len(uses) - 1, -1, -1):
        following[at] = last.get(uses[at], MOST)
        last[uses[at]] = at
    near: dict[int, tuple[int, int]] = {}           # when it is wanted again, and bytes of it
    queue: list[tuple[int, int]] = []               # last wanted first; of each only the newest counts
    hit = passed = 0
    for thing, need, again in zip(uses.tolist(), needs.tolist(), following.tolist(), strict=True):
        held = near[thing][1] if thing in near else 0
        hit += min(held, need)
        if thing not in near and len(near) >= slots:
            while queue and near.get(queue[0][1], (0, 0))[0] != -queue[0][0]:
                heappop(queue)
            if not queue or -queue[0][0] <= again:
                passed += need
                continue
            del near[heappop(queue)[1]]
        near[thing] = again, max(held, need)
        heappush(queue, (-again, thing))
    return hit, passed


def _record_uses(trace: RoutingTrace, row: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """What a step's layer kept: records as a pool numbers them, and the bytes wanted of each."""
    run = trace.run
    neurons, whole = _kept(trace, row, layer, trace.weights[row, layer])
    experts = trace.experts[row, layer].astype(np.int64) + layer * run.experts
    return (experts[neurons // run.neurons] * run.neurons + neurons % run.neurons,
            np.where(whole, run.record_bytes, run.prefix_bytes))


def _kept(trace: RoutingTrace, row: int, layer: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neurons of a step's layer, numbered through its experts, of those that have weight, and which are refined."""
    neurons = np.flatnonzero(np.unpackbits(trace.kept[row, layer]))
    whole = np.unpackbits(trace.refined[row, layer])[neurons]
    heard = weights[neurons // trace.run.neurons] != 0
    return neurons[heard], whole[heard]


def _weights(trace: RoutingTrace) -> list[route.Weights | None]:
    """How each layer's router weighs; None where no known function fits, which only a route asks for."""
    found: list[route.Weights | None] = []
    for layer in range(trace.run.layers):
        parts = (torch.from_numpy(values[:64, layer].astype(np.int64 if values is trace.experts else np.float32))
                 for values in (trace.logits, trace.experts, trace.weights))
        try:
            found.append(route.Weights(*parts))
        except UserError:
            found.append(None)
    return found


def baselines(simulator: Simulator, train: RoutingTrace | None) -> list[Replay]:
    """What every table begins with: on demand by recency, by frequency, and with the most popular pinned; the bound.
    train: where popularity comes from; None: from the trace that is judged, which the row then says."""
    name = "popularity (pinned)" if train else "popularity (pinned, in hindsight)"
    popular = taught("pinned", train or simulator.trace, simulator)
    return [simulator.run_choice(parse("predict=none"), "LRU"),
            simulator.run_choice(parse("predict=none,evict=lfu"), "LFU"),
            simulator.run_choice(parse("predict=none,evict=pinned"), name, **popular),
            optimum(simulator.trace, simulator.near_bytes)]


def taught(rule: str, train: RoutingTrace | None, simulator: Simulator) -> dict[str, torch.Tensor]:
    """What a rule of residency learns from another trace of the same model, as `run_choice` takes it."""
    slots, run = simulator.split.slots, simulator.run
    if train is None or rule not in ("pinned", "divided"):
        return {}
    if rule == "pinned":
        chosen = torch.zeros(run.layers * run.experts, dtype=torch.bool)
        chosen[torch.from_numpy(by_popularity(train)[:max(0, slots - simulator.reserves[0])].copy())] = True
        return {"chosen": chosen}
    curves = [recency_curve(train.experts[train.steps][:, layer].tolist(), run.experts) for layer in range(run.layers)]
    return {"shares": torch.tensor(divide(curves, slots, min(1, slots // run.layers))[0])}


def by_popularity(trace: RoutingTrace) -> np.ndarray:
    """int64 [L * E]: experts (layer * E + expert), what a trace's steps took most often first."""
    run, steps = trace.run, trace.steps
    taken = trace.experts[steps].astype(np.int64) + run.experts * np.arange(run.layers)[:, None]
    taken = taken[trace.weights[steps] != 0]
    return np.argsort(-np.bincount(taken, minlength=run.layers * run.experts), kind="stable")


def tokens_per_second(run: RunNumbers, replay: Replay, machine: Machine, near_bytes: int) -> float:
    """What the plan's own arithmetic gives for a machine with the bytes that were counted here in place of those of
    the plan's miss curves. What is fetched ahead crosses the same link."""
    spec, level = ModelSpec(**run.plan["spec"]), run.level
    wishes = PlanRequest(level, near_bytes=near_bytes, trunk_bits=run.plan["trunk_bits"],
                         group_size=run.plan["group_size"], on_disk=True)
    planned = plan(spec, machine, wishes, run.plan["calibration"] or None)
    parts = dict(planned.token)
    fetching = parts.pop("link", 0.0) + parts.pop("misses", 0.0)
    share = replay.crossed_per_token / planned.far_bytes_per_token if planned.far_bytes_per_token else 0.0
    return 1 / (sum(parts.values()) + fetching * share)


def recalls(trace: RoutingTrace, names: Iterable[str], learned: Mapping[str, Predictor] | None = None,
            ) -> dict[str, list[float]]:
    """Of each predictor the share of what came that was among its k, 2k and 3k guesses, over the layers from the third
    on. Near memory plays no part."""
    simulator = Simulator(trace, sizes_of(trace.run).least_bytes, predict=False, learned=learned)
    return {name: simulator.run_choice(parse(f"predict={name}")).mean_recall for name in names}
