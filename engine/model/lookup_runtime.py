"""The runtime of a Mixture of Lookup Experts: a row of a table a token, known as soon as the token is.

Nothing is guessed and nothing is kept near: what a step needs of all layers is one row (FarTable), read when the first
layer is called. Rows lie in the file's map, or, beside a card, in page-locked memory that its kernels read.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.core import UserError
from engine.experts.cache import NearMemory
from engine.experts.hook import Hook
from engine.experts.runtime import Runtime
from engine.experts.store import NO_EXPERTS
from engine.experts.window import Window

Tensor = torch.Tensor


@dataclass(frozen=True)
class TableLayer:
    """In place of a LayerExperts: rows are computed with nothing."""

    index: int
    is_shortcut = False

    @property
    def router_weight(self) -> None:
        raise UserError(NO_EXPERTS)


class NothingNear(NearMemory):
    """A row is read once, by its token, and stays nowhere."""

    near_bytes = 0

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def pools(self) -> list:
        return []

    def is_complete(self) -> bool:
        return True

    def used_bytes(self) -> int:
        return 0

    def residency(self) -> list[float]:
        return [0.0] * self.layers


class LookupRuntime(Runtime):
    """rows: tokens int [T] -> [T, layers * experts * hidden] on the runtime's device; None: out of the file's map."""

    def __init__(self, *given: Any, rows: Callable[[Tensor], Tensor] | None = None, **named: Any) -> None:
        super().__init__(*given, **named)
        self._read = rows or self.far.rows
        self._rows_of_step: Tensor | None = None

    @property
    def hook(self) -> None:
        return None

    @hook.setter
    def hook(self, hook: Hook | None) -> None:
        if hook is not None:
            raise UserError(NO_EXPERTS)

    @property
    def whole_bytes(self) -> int:
        """Of an expert: what a token reads of it."""
        return self.far.expert_bytes

    def forward(self, layer: TableLayer, x: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], for its type and place alone; tokens int [T]; weights float32 [T, E] -> [T, H] like x."""
        tokens, weights = tokens.to(self.device), weights.to(self.device)
        if layer.index == 0:
            shape = len(tokens), self.far.layers, self.far.experts, self.far.hidden
            self._rows_of_step = None       # a prompt's go before the next chunk's come
            self._rows_of_step = self._read(tokens).view(shape)
            self._count(tokens)
        rows = self._rows_of_step[:, layer.index].float()
        return (weights[:, None] @ rows)[:, 0].to(x.device, x.dtype)

    def _new_cache(self) -> NearMemory:
        return NothingNear(self.far.layers)

    def _count(self, tokens: Tensor) -> None:
        """A prompt's rows, or those of steps, in which every expert counts as picked."""
        window = Window.of(self.phase, self.window, len(tokens))
        n_steps = len(tokens) * (window.length - window.whole) // window.length
        row_bytes = self.far.layers * self.far.experts * self.far.expert_bytes
        self.prefill_far_bytes += (len(tokens) - n_steps) * row_bytes
        if n_steps:
            needed = n_steps * row_bytes * self.done.logical_not()
            self.counts[0:1].add_(needed)
            self.counts[2:3].add_(needed)
            self.clock.add_(1)
            every = torch.arange(self.far.experts, device=self.device)
            self.busy.count(every.expand(self.far.layers, -1))

    def _prefill(self, layer: TableLayer, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("a row is no expert")
