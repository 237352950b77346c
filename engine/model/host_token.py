"""A token in one compiled call on the processor, where all experts lie in the file's map.

The call is put together anew when the level changes. Between two tokens only what has moved is told: the cache's rows,
their number, the token itself. Where anything has to be done between two layers (a hook, an arena that is filled), the
separate calls of engine/model/fused.py make the same bits.
"""
from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from engine.experts.host import HostRuntime
from engine.model.growing_cache import GrowingLayer
from engine.model.registration import FloeExperts
from kernels.trunk.linear import Matrices
from kernels.trunk.token import Block, Norm, Token, token_step

Tensor = torch.Tensor


class HostToken:
    """Of one model's layers. experts: theirs, ours where the block chooses some, else None. turned: as of
    `token_step`."""

    def __init__(self, blocks: list[Block], experts: list[nn.Module | None], norm: Norm, head: Matrices,
                 turned: int) -> None:
        self._blocks, self._norm, self._head, self._turned = blocks, norm, head, turned
        self._experts = experts if all(isinstance(own, FloeExperts) for own in experts) else []
        self._made_of, self._token = (None, None), None

    @property
    def _runtime(self) -> HostRuntime | None:
        runtime = self._experts[0].runtime if self._experts else None
        return runtime if isinstance(runtime, HostRuntime) else None

    def takes(self, cache: DynamicCache) -> bool:
        """Whether the next token can be computed so, behind this cache."""
        runtime = self._runtime
        if runtime is None or not runtime.in_place():
            return False
        made_of = runtime.near, runtime.kept_neurons if runtime.is_sparse else None
        if any(now is not before for now, before in zip(made_of, self._made_of, strict=True)):
            self._made_of, self._token = made_of, self._made(runtime)
        token = self._token
        return token is not None and all(token.takes(i, *_written(rows)) for i, rows in enumerate(cache.layers))

    def _made(self, runtime: HostRuntime) -> Token | None:
        experts = [runtime.mapped(own.layer) for own in self._experts]
        return None if None in experts else token_step(
            self._blocks, experts, self._norm, self._head, self._turned)

    def __call__(self, x: Tensor, turn: Tensor, cache: DynamicCache, position: int, n_best: int) -> Tensor:
        """x float32 [1, H], turn float32 [2, 1, turned] -> logits float32 [V]. n_best: as of `at`."""
        token, runtime = self._token, self._runtime
        token.x.copy_(x)
        token.turn.copy_(turn)
        token.at(position, n_best)
        runtime.token_began()
        logits = token.run(lambda layer: runtime.fetch(layer, token.ids[layer].tolist()))
        runtime.token_ended(token.ids)
        for rows in cache.layers:
            if isinstance(rows, GrowingLayer):
                rows.end(position + 1)
        return logits


def _written(rows: GrowingLayer | LinearAttentionLayer) -> tuple[Tensor, Tensor]:
    """What a token changes of a layer's cache."""
    return rows.with_room(1) if isinstance(rows, GrowingLayer) else (rows.conv_states[0], rows.recurrent_states[0])
