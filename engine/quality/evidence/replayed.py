"""Rows of the evidence that need no model: traces replayed under every lossless policy, and what else they tell.

Train and test are different answers: what is learned, pinned or divided comes from the first trace, every figure from
the second.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.core import Counters
from engine.policies.choice import parse
from engine.policies.predict import Predictor
from engine.policies.residency import USES, WINDOW
from engine.policies.trace import RoutingTrace
from engine.quality.simulate import Replay, Simulator, baselines, by_popularity, optimum, sizes_of, taught

LOSSLESS = ("predict=none,evict=popularity", "predict=none,evict=hobbit", "predict=none,evict=divided",
            "predict=maps,evict=finemoe", "predict=none,admit=third", "predict=none,evict=popularity,admit=third",
            "predict=none,free=layer", "predict=none,free=layer,evict=lfu", "predict=none,free=layer,evict=popularity",
            "predict=none,free=layer,evict=popularity,admit=third", "predict=none,free=layer,admit=third,miss=place",
            "predict=none,free=layer,evict=popularity,admit=third,miss=place",
            "predict=next:1", "predict=next:2", "predict=next:3", "predict=repeat", "predict=popularity",
            "predict=profile", "predict=maps", "predict=learned", "predict=sequence",
            "predict=next:1,evict=popularity", "predict=learned,evict=popularity", "predict=sequence,evict=popularity")

RECORDS = ("predict=none", "predict=none,evict=lfu", "predict=none,free=layer", "predict=none,free=layer,evict=lfu")


def record_rows(trace: RoutingTrace, near_bytes: int) -> list[Replay]:
    """Of a sparse level, whose records are cached: `RECORDS`, then Belady's optimum (fewest misses)."""
    simulator = Simulator(trace, near_bytes)
    return [*map(simulator.run_choice, map(parse, RECORDS)), optimum(trace, near_bytes)]


def lossless_rows(train: RoutingTrace, test: RoutingTrace, near_bytes: int, learned: Mapping[str, Predictor],
                  ) -> list[Replay]:
    """The four baselines, two caches of textbooks, then `LOSSLESS`."""
    simulator = Simulator(test, near_bytes, learned=learned)
    return [*baselines(simulator, train), on_demand(test, near_bytes, False), on_demand(test, near_bytes, True),
            *(simulator.run_choice(choice, **taught(choice.evict.name, train, simulator))
              for choice in map(parse, LOSSLESS))]


def on_demand(trace: RoutingTrace, near_bytes: int, gated: bool) -> Replay:
    """Least recently used as textbooks have it: a miss evicts at once and every slot is in use. gated: only what was
    used `USES` times within `WINDOW` tokens may evict; the rest passes through, as where the processor computes it in
    place. Free slots fill ungated."""
    run, slots = trace.run, sizes_of(trace.run).divided(near_bytes).slots
    experts = trace.experts[trace.steps].astype(np.int64) + run.experts * np.arange(run.layers)[:, None]
    near: dict[int, None] = {}
    times: dict[int, list[int]] = {}
    hits = passed = 0
    for clock, token in enumerate(experts.reshape(len(experts), -1).tolist()):
        for thing in token:
            seen = times[thing] = [*times.get(thing, ()), clock][-USES:]
            if thing in near:
                hits += 1
                del near[thing]
            elif len(near) >= slots:
                if not slots or gated and not (len(seen) == USES and clock - seen[0] < WINDOW):
                    passed += 1
                    continue
                del near[next(iter(near))]
            near[thing] = None
    each = run.object_bytes
    name = "LRU on demand, admission on the third use" if gated else "LRU on demand"
    return Replay(name, len(experts), slots, Counters(experts.size * each, hits * each, (experts.size - hits) * each),
                  passed * each)


def coverage(train: RoutingTrace, test: RoutingTrace, share: float) -> tuple[float, float]:
    """Of the picks of an answer what a resident set of `share` of all experts holds -> by everybody's popularity, by
    what the answer before it took."""
    run, n = train.run, round(share * train.run.layers * train.run.experts)
    everybody, found = _resident(train, n), []
    previous = None
    for answer in np.unique(test.answer):
        rows = test.rows(np.flatnonzero(test.answer == answer))
        taken = (rows.experts[rows.steps].astype(np.int64) + run.experts * np.arange(run.layers)[:, None]).ravel()
        if previous is not None and len(taken):
            own = _resident(previous, n)
            found.append((len(taken), float(everybody[taken].sum()), float(own[taken].sum())))
        previous = rows
    total = sum(row[0] for row in found) or 1  # a single answer has none before it
    return sum(row[1] for row in found) / total, sum(row[2] for row in found) / total


def _resident(trace: RoutingTrace, n: int) -> np.ndarray:
    """bool [L * E]: the n experts that are taken most often."""
    return np.isin(np.arange(trace.run.layers * trace.run.experts), by_popularity(trace)[:n])
