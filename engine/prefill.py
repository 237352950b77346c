"""Whole experts for many tokens on a device: packed blobs cross the link tile by tile, ahead of the compute.

A tile is a few consecutive experts of one layer, never a layer: two of them take 64 MB where two layers would take
most of a gigabyte. While one is decoded and multiplied, the next one is copied on a stream of its own. What is near is
copied from near memory instead, which stays as it is.

Legend: n experts of a tile, I neurons, H hidden, t tokens of one expert.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.activation import Gate
from kernels.layout import Layout
from kernels.planes import decode_down, decode_gate, decode_up

Tensor = torch.Tensor
TILE_BYTES = 32 << 20


class Staging:
    """Two tiles uint8 [n, blob_bytes], filled and read by turns."""

    def __init__(self, layout: Layout, experts: int, device: str, tile_bytes: int = TILE_BYTES) -> None:
        """experts: of a layer; a tile never needs to be larger."""
        self.per_tile = min(experts, max(1, tile_bytes // layout.blob_bytes))
        self.tiles = torch.empty(2, self.per_tile, layout.blob_bytes, dtype=torch.uint8, device=device)
        on_card = self.tiles.is_cuda
        self._stream = torch.cuda.Stream() if on_card else None
        self._filled, self._read = ([torch.cuda.Event() if on_card else None for _ in range(2)] for _ in range(2))

    def stream(self, experts: list[int], copy: Callable[[list[int], Tensor], None]) -> Iterator[tuple]:
        """Tile after tile -> its experts, uint8 [n, blob_bytes] until the next one. copy(experts, tile) fills a tile.

        The reader's work on a tile must be launched when it asks for the next one.
        """
        groups = [experts[at:at + self.per_tile] for at in range(0, len(experts), self.per_tile)]
        for turn in range(len(groups) + 1):
            if turn < len(groups):
                self._fill(turn, groups[turn], copy)
            if turn:
                yield groups[turn - 1], self._wait(turn - 1)[:len(groups[turn - 1])]
                self._done(turn - 1)

    def _fill(self, turn: int, group: list[int], copy: Callable[[list[int], Tensor], None]) -> None:
        tile = self.tiles[turn % 2][:len(group)]
        if self._stream is None:
            copy(group, tile)
            return
        if turn < 2:  # whatever used the tiles before
            self._stream.wait_stream(torch.cuda.current_stream())
        else:
            self._stream.wait_event(self._read[turn % 2])
        with torch.cuda.stream(self._stream):
            copy(group, tile)
            self._filled[turn % 2].record()

    def _wait(self, turn: int) -> Tensor:
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._filled[turn % 2])
        return self.tiles[turn % 2]

    def _done(self, turn: int) -> None:
        if self._stream is not None:
            self._read[turn % 2].record()


def decoded(tile: Tensor, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [n, blob_bytes] -> gate, up, down [n, I, H] at 4 bits."""
    n, rows = len(tile), layout.neurons
    sketch = tile[:, :rows * layout.sketch_row].reshape(n * rows, layout.sketch_row)
    records = tile[:, layout.sketch_bytes:].reshape(n * rows, layout.record)
    found = decode_gate(sketch, records, layout), decode_up(sketch, records, layout), decode_down(records, layout)
    return tuple(matrix[:, :layout.hidden].to(dtype).view(n, rows, layout.hidden) for matrix in found)


def product(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, kind: Gate, biases: tuple) -> Tensor:
    """One whole expert: x [t, H]; gate, up, down [I, H]; biases of gate and up [I], or None -> [t, H]."""
    g, u = x @ gate.T, x @ up.T
    if biases[0] is not None:
        g, u = g + biases[0], u + biases[1]
    return kind(g, u).to(x.dtype) @ down
