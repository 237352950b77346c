"""How much each expert was used, over a trace or a text: three ways to count, and what is worth pinning.

Legend: L layers, E experts, k routed.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.policies.trace import RoutingTrace

SCORES = ("hard", "soft", "reap")


@dataclass(frozen=True)
class Usage:
    """hard int64 [L, E]: how often an expert was taken; soft float64 [L, E]: the weights that the router gave it then,
    summed (SEER-MoE's two counts, arXiv 2404.05089). reap float64 [L, E]: of the tokens that took it the mean of weight
    x norm of its output (REAP, arXiv 2510.13999), 0 for one that none took; None where outputs were not seen."""

    tokens: int
    top_k: int
    hard: np.ndarray
    soft: np.ndarray
    reap: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.hard.shape == self.soft.shape and (self.reap is None or self.reap.shape == self.hard.shape)
        assert (self.hard.sum(1) <= self.tokens * self.top_k).all(), "a token takes k experts of every layer at most"

    def score(self, name: str) -> np.ndarray:
        """[L, E] of one of SCORES."""
        return getattr(self, name)

    def best(self, n: int, name: str) -> np.ndarray:
        """int64 [L, n]: of every layer the n experts with the highest score, ascending; of equals the first."""
        return np.sort(np.argsort(-self.score(name), axis=1, kind="stable")[:, :n], axis=1)

    def pins(self) -> Iterator[tuple[int, int]]:
        """(layer, expert), the most used of the whole model first: what a pinned working set is filled from
        (engine/experts/working_set.py). Experts that were never used are none of it."""
        for thing in np.argsort(-self.hard, axis=None, kind="stable").tolist():
            layer, expert = divmod(thing, self.hard.shape[1])
            if not self.hard[layer, expert]:
                return
            yield layer, expert

    def coverage(self, share: float) -> float:
        """Of all picks, those that the most used `share` of the experts answers."""
        most = np.sort(self.hard, axis=None)[::-1]
        return float(most[:round(share * most.size)].sum() / max(1, most.sum()))

    def document(self) -> dict:
        return {"tokens": self.tokens, "hard": self.hard.tolist(), "soft": self.soft.round(4).tolist(),
                "reap": None if self.reap is None else self.reap.round(6).tolist(), "pins": [*self.pins()],
                "coverage": {f"{share:.2f}": round(self.coverage(share), 4) for share in (0.25, 0.5, 0.75)}}


def of_trace(trace: RoutingTrace) -> Usage:
    """Over every token of a trace, prompts included; it holds no outputs, so there is no `reap`."""
    layers, experts = trace.run.layers, trace.run.experts
    thing = trace.experts.astype(np.int64) + experts * np.arange(layers)[:, None]
    hard = np.bincount(thing[trace.weights != 0], minlength=layers * experts)
    soft = np.bincount(thing.ravel(), trace.weights.ravel().astype(np.float64), layers * experts)
    return Usage(len(trace), trace.run.top_k, hard.reshape(layers, experts), soft.reshape(layers, experts))
