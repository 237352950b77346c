"""The texts that a specialist is made for, in pieces of one length, and what a model loses on them.

Legend: B pieces, n tokens of each.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.core import UserError
from engine.policies.usage import Usage
from engine.quality.loss_probe import log_probabilities, loss_of
from engine.quality.specialists.mixed_model import MixedModel, Source
from engine.quality.specialists.mixture import identity
from engine.quality.texts import read_tokens

Tensor = torch.Tensor
PIECE = 64          # tokens: short ones are many, and many compare better
HELD_OUT = 4        # every so many pieces one is kept back
TOGETHER = 1024     # tokens that are read in one forward
Batches = list[Tensor]  # int64 [B, n] each


@dataclass(frozen=True)
class Examples:
    """What a specialist is fitted to, and what it is judged by."""

    fitted: Batches
    held_out: Batches

    @property
    def pieces(self) -> int:
        """That it is fitted to."""
        return sum(len(batch) for batch in self.fitted)


def examples_of(path: Path, tokenizer, n_tokens: int) -> Examples:
    """The first n_tokens of a file, as of `read_tokens`. UserError for one with too little in it."""
    pieces = read_tokens(path, tokenizer, n_tokens, PIECE)
    if len(pieces) < HELD_OUT:
        raise UserError(f"{path} holds {len(pieces)} pieces of {PIECE} tokens, too little to fit and to judge a "
                        "specialist by; give a longer text.")
    kept_back = pieces[HELD_OUT - 1::HELD_OUT]
    return Examples(_batches([piece for i, piece in enumerate(pieces) if i % HELD_OUT != HELD_OUT - 1]),
                    _batches(kept_back))


def batches_of(path: Path, tokenizer, n_tokens: int) -> Batches:
    return _batches(read_tokens(path, tokenizer, n_tokens, PIECE))


def _batches(pieces: list[list[int]]) -> Batches:
    """Pieces of one length together, so that nothing has to be filled up."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for piece in pieces:
        by_length[len(piece)].append(piece)
    return [batch for alike in by_length.values()
            for batch in torch.tensor(alike).split(max(1, TOGETHER // len(alike[0])))]


@torch.inference_mode()
def loss(model: MixedModel, batches: Batches, check: Callable[[], None] = lambda: None) -> float:
    """Nats a token, all but the first of each piece."""
    total, tokens = 0.0, 0
    for ids in batches:
        check()
        targets = ids[:, 1:].flatten()
        total += loss_of(log_probabilities(model.model, ids), targets)
        tokens += len(targets)
    return total / tokens


class Counting(MixedModel):
    """The model itself, whose experts' use is counted."""

    def __init__(self, source: Source) -> None:
        layers, experts = source.manifest.layers, source.manifest.experts
        super().__init__(source, experts)
        self.take(identity(layers, experts))
        self.hard = torch.zeros(layers, experts, dtype=torch.int64)
        self.soft, self.norms = (torch.zeros(layers, experts, dtype=torch.float64) for _ in range(2))
        self.tokens = 0

    def forward(self, layer, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self._ids, self._weights = ids, weights.float()
        self.tokens += len(x) if layer.index == 0 else 0
        return super().forward(layer, x, ids, weights)

    def whole(self, layer, j: int, x: Tensor) -> Tensor:
        y, share = super().whole(layer, j, x), self._weights[self._ids == j]  # in the order of the tokens, as x is
        self.hard[layer.index, j] += len(x)
        self.soft[layer.index, j] += share.sum()
        self.norms[layer.index, j] += (share * y.norm(dim=1)).sum()
        return y

    def usage(self) -> Usage:
        mean = self.norms / self.hard.clamp_min(1)
        return Usage(self.tokens, self.source.manifest.top_k,
                     *(found.clone().numpy() for found in (self.hard, self.soft, mean)))
