"""transformers' growing cache with room ahead: a token writes its own row, where theirs copies all rows before it."""
from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kernels.trunk.attend import Heads, attend
from kernels.trunk.latent import Latent, attend_latent

Tensor = torch.Tensor
ROOM = 256  # rows ahead, at least; then half of what is there


class GrowingLayer(DynamicLayer):
    """As DynamicLayer, of which it takes the rows over. keys and values [1, heads, N, D] are views of what has room,
    made when somebody asks: a token that is one call asks for none, in any layer."""

    def __init__(self, layer: DynamicLayer) -> None:
        self._rooms, self._length = (layer.keys, layer.values), layer.keys.shape[2]
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True

    @property
    def keys(self) -> Tensor:
        return self._rooms[0][:, :, :self._length]

    @property
    def values(self) -> Tensor:
        return self._rooms[1][:, :, :self._length]

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """tokens_to_remove: minus their number, as transformers gives it."""
        self.end(max(0, self._length - abs(tokens_to_remove)))

    def with_room(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, more than N + n - 1, D]; rows from N on are free. `end` says how far they are used
        then."""
        if self._length + n > self._rooms[0].shape[2]:
            self._rooms = tuple(_longer(rows, self._length + n + max(ROOM, self._length // 2))
                                for rows in (self.keys, self.values))
        return self._rooms

    def attend(self, projected: Tensor, turn: Tensor, heads: Heads) -> Tensor:
        """As kernels.trunk.attend, behind what is held; in place of `update` and all that reads it."""
        length, n = self._length, len(projected)
        out = attend(projected, turn, *self.with_room(n), length, heads)
        self.end(length + n)
        return out

    def attend_latent(self, query: Tensor, new: Tensor, turn: Tensor, latent: Latent) -> Tensor:
        """As kernels.trunk.latent.attend_latent, likewise; keys are its rows, values its keys."""
        length, n = self._length, len(query)
        out = attend_latent(query, new, turn, *self.with_room(n), length, latent)
        self.end(length + n)
        return out

    def end(self, length: int) -> None:
        self._length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        length, end = self._length, self._length + key_states.shape[2]
        for rows, states in zip(self.with_room(key_states.shape[2]), (key_states, value_states), strict=True):
            rows[:, :, length:end] = states
        self.end(end)
        return self.keys, self.values


class GrowingWindow(DynamicSlidingWindowLayer):
    """As DynamicSlidingWindowLayer, of which it takes the rows over: the last W - 1. keys and values are views of what
    has room; tokens written by `attend` move on in it."""

    def __init__(self, layer: DynamicSlidingWindowLayer) -> None:
        super().__init__(layer.sliding_window)
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values, self.cumulative_length = layer.keys, layer.values, layer.cumulative_length
        self._rooms, self._first = (self.keys, self.values), 0

    def plain(self) -> DynamicSlidingWindowLayer:
        """transformers' own layer of the same rows."""
        layer = DynamicSlidingWindowLayer(self.sliding_window)
        layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
        layer.keys, layer.values, layer.cumulative_length = self.keys, self.values, self.cumulative_length
        return layer

    def attend(self, projected: Tensor, turn: Tensor, heads: Heads) -> Tensor:
        """As kernels.trunk.attend, behind what is held; in place of `update` and all that reads it."""
        held, n = self.keys.shape[2], len(projected)
        if self._first + held + n > self._rooms[0].shape[2]:
            self._rooms = tuple(_longer(rows, held + n + max(ROOM, held // 2)) for rows in (self.keys, self.values))
            self._first = 0
        out = attend(projected, turn, *(rows[:, :, self._first:] for rows in self._rooms), held, heads)
        end, kept = self._first + held + n, min(held + n, self.sliding_window - 1)
        self._first, self.cumulative_length = end - kept, self.cumulative_length + n
        self.keys, self.values = (rows[:, :, self._first:end] for rows in self._rooms)
        return out

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        seen = super().update(key_states, value_states)
        self._rooms, self._first = (self.keys, self.values), 0
        return seen


def give_room(cache: DynamicCache) -> None:
    """Let every layer of plain attention, or of attention in a window, grow without copies."""
    cache.layers = [_with_room(layer) for layer in cache.layers]


def _with_room(layer: object) -> object:
    if type(layer) is DynamicLayer and layer.is_initialized:
        return GrowingLayer(layer)
    if type(layer) is DynamicSlidingWindowLayer and layer.is_initialized and not layer.record_past:
        return GrowingWindow(layer)
    return layer


def _longer(rows: Tensor, n: int) -> Tensor:
    found = rows.new_empty(*rows.shape[:2], n, rows.shape[3])
    found[:, :, :rows.shape[2]] = rows
    return found
