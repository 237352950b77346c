"""Whole experts for many tokens: on a processor a few at a time from their codes, on a card tile by tile.

On a card packed blobs cross the link ahead of the compute. A tile is a few consecutive experts of one layer, never a
layer: two of them take 128 MB where two layers would take most of a gigabyte. While one is multiplied as it is packed
(kernels/gpu/grouped.py), the next one is copied on a stream of its own. What is near is copied from near memory
instead, which stays as it is. Cards whose matrix units Triton does not use decode a tile into 16-bit matrices for
torch's grouped product.

Legend: n experts of a tile, I neurons, H hidden, T tokens, t picks: tokens, once for each of these experts
that they go to.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from engine.planning.sizes import PACKED_FROM, tile_experts
from kernels.activation import Gate, NeuronBias
from kernels.dense import dequantize, multiply_tile
from kernels.layout import Layout

Tensor = torch.Tensor
PRODUCT_ROW = 16  # bytes: what torch's grouped product asks of a row of its operands


class Staging:
    """Two tiles uint8 [n, blob_bytes], filled and read by turns, and where they are decoded, the matrices of one."""

    def __init__(self, layout: Layout, experts: int, device: str, dtype: torch.dtype = torch.float32,
                 per_tile: int | None = None, decodes: bool = False) -> None:
        """experts: of a layer. dtype: of activations and matrices. per_tile: experts of a tile, else as planned."""
        self.layout, self.per_tile = layout, per_tile or tile_experts(experts, layout.blob_bytes)
        self.tiles = torch.empty(2, self.per_tile, layout.blob_bytes, dtype=torch.uint8, device=device)
        self.dtype = dtype
        self._matrices = [torch.empty(self.per_tile, rows * layout.neurons, layout.hidden, dtype=dtype, device=device)
                          for rows in ((2, 1) if decodes else ())]     # gate and up, down
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

    def product(self, x: Tensor, tokens: Tensor, ends: Tensor, tile: Tensor, gate: Gate,
                bias: NeuronBias | None) -> Tensor:
        """The experts of a tile, each over its own picks -> [t, H], as kernels.dense.multiply_tile."""
        if not self._matrices:
            return multiply_tile(x, tokens, ends, tile, self.layout, gate, bias)
        gate_up, down = (matrix[:len(tile)] for matrix in self._matrices)
        dequantize(tile, gate_up, down, self.layout)
        g, u = F.grouped_mm(x[tokens], gate_up.transpose(1, 2), offs=ends).split(self.layout.neurons, 1)
        if bias is not None:
            of_row = torch.searchsorted(ends, torch.arange(len(tokens), dtype=ends.dtype, device=x.device), right=True)
            g, u = (product + own[of_row] for product, own in zip((g, u), bias.rows, strict=True))
        return F.grouped_mm(gate(g, u).to(x.dtype), down, offs=ends)


def decodes(device: str) -> bool:
    """Whether tiles are decoded for torch's product, because Triton's makes no use of this card's matrix units."""
    return device.startswith("cuda") and torch.cuda.get_device_capability() < PACKED_FROM


def expert_by_expert(x: Tensor, ids: Tensor, weights: Tensor, whole: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Every routed expert once, in order, over the tokens that chose it: x [T, H], ids and weights [T, k], id -1 for
    none -> float32 [T, H]. whole(expert, x [n, H]) -> [n, H], before the router's weight."""
    return by_experts(x, ids, weights, lambda experts, _, rows: whole(experts[0], rows), picks=1)


def by_experts(x: Tensor, ids: Tensor, weights: Tensor, whole: Callable[[list[int], list[int], Tensor], Tensor],
               picks: int) -> Tensor:
    """The same for a few consecutive experts at a time, which is enough of them for so many picks:
    whole(experts, how many tokens of each, x [n, H]) -> [n, H]."""
    x, weights, flat = x.float(), weights.float(), ids.flatten()
    order = flat.argsort(stable=True)[int((flat < 0).sum()):]
    tokens, share = order // ids.shape[1], weights.flatten()[order, None]
    out, at = torch.zeros_like(x), 0
    for experts, counts in _in_groups(torch.bincount(flat[order]).tolist(), picks):
        end = at + sum(counts)
        rows = tokens[at:end]
        out.index_add_(0, rows, whole(experts, counts, x[rows]) * share[at:end])
        at = end
    return out


def _in_groups(counts: list[int], picks: int) -> Iterator[tuple[list[int], list[int]]]:
    """Experts that somebody chose, and how often, until they make so many picks."""
    experts: list[int] = []
    for expert, count in enumerate(counts):
        experts += [expert] if count else []
        chosen = [counts[i] for i in experts]
        if experts and (sum(chosen) >= picks or expert + 1 == len(counts)):
            yield experts, chosen
            experts = []
