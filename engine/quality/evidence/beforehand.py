"""Rows of the evidence that are made of the model beforehand: smaller models for one kind of text, and what a layer's
experts have in common."""
from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.experts.base_experts import common_of
from engine.experts.runtime import Runtime
from engine.policies.barycenter import MOST_LEFT
from engine.quality.specialists.examples import batches_of, examples_of
from engine.quality.specialists.make import Choice, Losses, fitted, kept_of
from engine.quality.specialists.mixed_model import Source
from engine.quality.specialists.search import LEAST_EXAMPLES
from engine.quality.texts import CALIBRATION_TEXT, EVALUATION_TEXT

KEEP = 0.5
ROUNDS = 24
WAYS = (("mask", "hard"), ("mask", "soft"), ("mask", "reap"), ("merge", "reap"), ("search", "reap"))
GENERAL_TOKENS = 4096


@dataclass(frozen=True)
class Made:
    """A specialist of so many experts of a layer. name: its way, and what the experts were chosen by."""

    name: str
    kept: int
    experts: int
    losses: Losses


@dataclass(frozen=True)
class Shared:
    """What a layer's experts have in common, over the layers: how much of them is each one's own, as a share of what
    strangers have of their own."""

    unexplained: tuple[float, ...]

    @property
    def is_there(self) -> bool:
        return max(self.unexplained) <= MOST_LEFT


def specialists(folder: Path, tokenizer, n_tokens: int, report: Callable[[str], None]) -> list[Made]:
    """n_tokens: of the text that they are made for. A search only where that are enough to compare on."""
    source = Source(folder)
    n, examples = kept_of(source.manifest, KEEP), examples_of(CALIBRATION_TEXT, tokenizer, n_tokens)
    general, found = batches_of(EVALUATION_TEXT, tokenizer, min(n_tokens, GENERAL_TOKENS)), []
    for way, score in WAYS:
        if way == "search" and examples.pieces < LEAST_EXAMPLES:
            continue
        report(f"a specialist by {way} ({score})")
        choice = Choice(CALIBRATION_TEXT, EVALUATION_TEXT, KEEP, way, score, ROUNDS, n_tokens)
        with tempfile.TemporaryDirectory() as place:
            _, losses = fitted(source, n, examples, general, choice, Path(place) / "search.npz")
        found.append(Made(f"{way} by {score}", n, source.manifest.experts, losses))
    return found


def shared(runtime: Runtime) -> Shared:
    return Shared(tuple(common_of(runtime, layer).unexplained for layer in range(runtime.far.layers)))
