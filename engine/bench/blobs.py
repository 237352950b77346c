"""Made-up experts and matrices: any bytes are valid codes of our formats, the scales keep the numbers in range."""
from __future__ import annotations

import math

import numpy as np
import torch

from engine.files.trunk import GROUP
from kernels.layout import Layout

Tensor = torch.Tensor


class Blobs:
    """Random experts of one layout. spread: how unequally loud the neurons are."""

    def __init__(self, layout: Layout, spread: float, seed: int) -> None:
        self.layout, self.spread, self._random = layout, spread, np.random.default_rng(seed)

    def fill(self, blob: Tensor) -> None:
        """blob uint8 [blob_bytes], contiguous: all of it is written."""
        layout, words = self.layout, blob.numpy().view(np.uint64)
        words[:] = self._random.integers(0, 2**64, len(words), dtype=np.uint64)
        rows, sketch_bytes = layout.neurons, layout.neurons * layout.sketch_row
        sketch = blob[:sketch_bytes].view(rows, layout.sketch_row)
        records = blob[layout.sketch_bytes:layout.blob_bytes].view(rows, layout.record)
        loud = torch.from_numpy(np.exp(self.spread * self._random.standard_normal(rows)).astype(np.float32))
        step = 1 / (4.61 * math.sqrt(layout.hidden))          # codes 0..15 spread by 4.61 steps
        even = torch.ones(rows)
        for at, factor in ((0, even), (1, loud)):
            self._write(sketch, layout.sketch_scales_at + at * layout.scales, 4 * step * factor, -6 * step * factor)
        for at, factor in ((0, even), (1, even), (2, loud)):  # down, gate, up
            self._write(records, layout.record_scales_at + at * layout.scales, step * factor, -7.5 * step * factor)

    def _write(self, rows: Tensor, at: int, scale: Tensor, offset: Tensor) -> None:
        """The same (scale, offset) for all groups of a row."""
        pairs = torch.stack((scale, offset), -1).half()[:, None].expand(-1, self.layout.groups, 2)
        rows[:, at:at + self.layout.scales] = pairs.reshape(len(rows), -1).view(torch.uint8)


def random_blobs(layout: Layout, n: int, seed: int = 0) -> Tensor:
    """uint8 [n, blob_bytes]."""
    blobs, random = torch.empty(n, layout.blob_bytes, dtype=torch.uint8), Blobs(layout, 0.0, seed)
    for blob in blobs:
        random.fill(blob)
    return blobs


def random_matrix(n_rows: int, width: int, bits: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """codes and scales of a trunk matrix, as of kernels/trunk/linear.py; what it multiplies keeps its size."""
    std = 1 / math.sqrt(width)
    if bits == 8:
        codes = torch.randint(-127, 128, (n_rows, width), generator=draw, dtype=torch.int8)
        return codes, torch.full((n_rows, width // GROUP), std / 73.6).half()
    codes = torch.randint(0, 256, (n_rows, width // 2), generator=draw, dtype=torch.uint8)
    pair = torch.tensor([std / 4.61, -7.5 * std / 4.61]).half()
    return codes, pair.expand(n_rows, width // GROUP, 2).contiguous()
