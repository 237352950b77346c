"""Whole packed experts into 16-bit matrices, for the matrix products of prefill.

Legend: n experts of a tile, I neurons, H hidden (not padded).
"""
from __future__ import annotations

import torch

from kernels.dense import decode_blob
from kernels.dispatch import twin
from kernels.layout import Layout

Tensor = torch.Tensor


@twin("kernels.gpu.dequantize")
def dequantize(blobs: Tensor, gate_up: Tensor, down: Tensor, layout: Layout) -> None:
    """blobs uint8 [n, blob_bytes] -> gate_up [n, 2I, H] (rows of gate, then of up) and down [n, I, H], in their dtype.

    Every neuron at 4 bits.
    """
    half = layout.neurons
    for blob, both, last in zip(blobs, gate_up, down, strict=True):
        for target, values in zip((both[:half], both[half:], last), decode_blob(blob, layout), strict=True):
            target.copy_(values[:, :layout.hidden])
