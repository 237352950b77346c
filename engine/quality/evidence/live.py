"""Rows of the evidence that run the model: what a policy that changes the output costs, one token a step with the
policy live, against the exact model; and what it moves."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.core import Counters
from engine.experts.policy_hook import PolicyHook
from engine.experts.working_set import pin
from engine.model.load import Loaded
from engine.policies.choice import parse
from engine.quality.evaluate import stepwise
from engine.quality.loss_probe import Sums

LOSSY = ("", "evict=popularity,free=layer", "free=layer,admit=third,miss=place", "route=near:0.05:1",
         "route=near:0.1:1", "route=near:0.2:1", "route=drop:0.2", "route=drop:0.3", "route=skip:0.5",
         "route=near-only")
SPARSE = ("", "fidelity=score:0.6:0.9", "fidelity=score:0.5:1", "fidelity=bits:2.4")


@dataclass(frozen=True)
class Live:
    """One choice at one size of near memory. kl: nats per token from the exact model; dropped: share of the router's
    weight that was not computed."""

    name: str
    level: str
    tokens: int
    perplexity: float
    kl: float
    counters: Counters
    dropped: float

    @property
    def far_per_token(self) -> float:
        return self.counters.far_bytes / self.tokens


def live_rows(loaded: Loaded, asked: list[tuple[list[int], torch.Tensor]], near_bytes: int,
              popular: list[tuple[int, int]], level: str, choices: tuple[str, ...], report: Callable[[str], None],
              ) -> list[Live]:
    """asked: documents with what the exact model says of them (`reference_of`). popular: (layer, expert), the likeliest
    first: pinned before a text where nothing else may be used, as far as they fit."""
    runtime, found = loaded.runtime, []
    with torch.inference_mode():
        for text in choices:
            report(f"{level}, {near_bytes:,} bytes near, {text or 'exact'}")
            sums, used, choice = Sums(), Counters(), parse(text)
            runtime.set_level(level, near_bytes)
            hook = PolicyHook(runtime, loaded.model, parse(f"{text},predict=none" if text else "predict=none"))
            try:
                with runtime.hooked(hook):
                    for ids, reference in asked:
                        runtime.set_level(level, near_bytes)
                        if choice.route.name == "near-only":
                            pool, reserve = runtime.near.pools()[0]
                            pin(runtime, popular[:max(0, len(pool.object_of) - reserve)])
                        used += stepwise(loaded, ids, reference, sums)
            finally:
                hook.close()
            perplexity, kl = sums.figures().values()
            found.append(Live(text or "exact", level, sums.tokens, perplexity, max(0.0, kl), used,
                              float(hook.dropped) / (sums.tokens * runtime.far.layers)))
    return found
