"""A token's whole way through a decoder, where all that it reads lies in place: one call instead of some ten a layer.

It does what the separate functions do one after the other, to the same bits (engine/model/fused.py is that order), and
so has no reference of its own: only a processor has one, and there only what is compiled.

Legend: H hidden, L layers, E experts, k routed, V words, D of a head, C heads of the cache, N rows of the cache.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kernels.activation import Gate
from kernels.dispatch import twin
from kernels.layout import Layout
from kernels.trunk.attend import Heads
from kernels.trunk.delta import Mixer
from kernels.trunk.latent import Latent
from kernels.trunk.linear import Matrices
from kernels.trunk.route import Choice

Tensor = torch.Tensor


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm: weight [n], float32 on a processor."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Mapped:
    """A layer's experts side by side. blobs uint8 [E, blob_bytes]; there bool [E]: which may be read; budget: neurons
    refined, and all that are kept; None: every neuron, at its 4-bit values."""

    blobs: Tensor
    there: np.ndarray
    layout: Layout
    gate: Gate
    budget: tuple[int, int] | None


@dataclass(frozen=True)
class Block:
    """One decoder layer but its routed experts: attention or what stands for it behind a norm, their router behind
    another. Behind the router's E rows stand those of a shared expert: how much of it where that is asked, gate, up;
    `shared` is that one's way back, if there is one. A layer that has but one expert has no `choice`, and E is 0.
    queries: where `projections` have but few numbers for them, the norm and matrices that make the queries of these."""

    mixing: Heads | Latent | Mixer
    before: Norm
    projections: Matrices  # of queries, keys and values, or what else `mixing` takes
    output: Matrices
    between: Norm
    router: Matrices
    n_experts: int
    choice: Choice | None
    shared: Matrices | None = None
    queries: tuple[Norm, Matrices] | None = None


class Token(Protocol):
    """What `token_step` makes. Its tensors are the caller's to fill before `run`, and to read behind it."""

    x: Tensor     # float32 [1, H], the embedded token; `run` changes it
    turn: Tensor  # float32 [2, 1, turned], cosines and sines of its position
    ids: Tensor   # int32 [L, k], the experts that it was routed to

    def takes(self, layer: int, first: Tensor, second: Tensor) -> bool:
        """Go on in these from now on: keys and values float32 [1, C, N, D], or a delta-net's columns and state as of
        kernels.trunk.delta; False where their kind is left to others."""

    def at(self, position: int, n_best: int = 0) -> None:
        """The row of every cache of keys that the token writes: the first that is free. n_best: as of best_rows, where
        the head is nested."""

    def run(self, bring: Callable[[int], None]) -> Tensor:
        """-> logits float32 [V]. bring(layer): some expert that the token wants of it is not there yet."""


@twin(None, "kernels.cpu.trunk.token")
def token_step(blocks: list[Block], experts: list[Mapped], norm: Norm, head: Matrices, turned: int) -> Token | None:
    """A step of one token through these layers; None where the separate functions have to do it. turned: numbers of a
    head whose position is told by turning them."""
    return None
