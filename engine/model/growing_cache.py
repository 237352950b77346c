"""transformers' growing cache with room ahead: a token writes its own row, where theirs copies all rows before it."""
from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kernels.trunk.attend import Heads, attend

Tensor = torch.Tensor
ROOM = 256  # rows ahead, at least; then half of what is there


class GrowingLayer(DynamicLayer):
    """As DynamicLayer, of which it takes the rows over. keys and values [1, heads, N, D] are views of what has room."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values, self.dtype, self.device = layer.keys, layer.values, layer.dtype, layer.device
        self.is_initialized = True
        self._rooms = self.keys, self.values

    def with_room(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, more than N + n - 1, D]; rows from N on are free. `end` says how far they are used
        then."""
        length = self.keys.shape[2]
        if length + n > self._rooms[0].shape[2]:
            self._rooms = tuple(self._longer(rows, length + n + max(ROOM, length // 2))
                                for rows in (self.keys, self.values))
        return self._rooms

    def attend(self, projected: Tensor, turn: Tensor, heads: Heads) -> Tensor:
        """As kernels.trunk.attend, behind what is held; in place of `update` and all that reads it."""
        length, n = self.keys.shape[2], len(projected)
        out = attend(projected, turn, *self.with_room(n), length, heads)
        self.end(length + n)
        return out

    @staticmethod
    def _longer(rows: Tensor, n: int) -> Tensor:
        found = rows.new_empty(*rows.shape[:2], n, rows.shape[3])
        found[:, :, :rows.shape[2]] = rows
        return found

    def end(self, length: int) -> None:
        self.keys, self.values = (rows[:, :, :length] for rows in self._rooms)

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        length, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for rows, states in zip(self.with_room(key_states.shape[2]), (key_states, value_states), strict=True):
            rows[:, :, length:end] = states
        self.end(end)
        return self.keys, self.values


def give_room(cache: DynamicCache) -> None:
    """Let every layer of plain attention grow without copies."""
    cache.layers = [GrowingLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer
                    for layer in cache.layers]
