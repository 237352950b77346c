"""MXFP4 and block-fp8 checkpoints seen as plain bfloat16 ones, tensor by tensor.

`Dequantized` wraps a `TensorSource`: `x_blocks` + `x_scales` become `x` (gpt-oss: 4-bit floats in blocks of 32 along
the input, transposed into transformers' layout), and a weight with `x_scale_inv` beside it becomes the product with
its blockwise scales. All other tensors pass through. MXFP4 is decoded by transformers, fp8 with its arithmetic; the
first axis (experts) is never mixed, so a slice of it can be read and decoded alone.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.core import UserError
from engine.files.tensor_source import TensorSource

Tensor = torch.Tensor
MXFP4_BLOCKS = 1 << 19       # decoded at a time: each of 32 codes takes nine bytes meanwhile
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_BLOCK = 128
SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
# Scales of activations: what an fp8 kernel needs and a dequantised weight does not.
ACTIVATION_SCALES = (".input_scale", ".activation_scale", "_activation_scale")


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [E, R, G, 16] (two codes a byte, low first), uint8 [E, R, G] (2^(s-127)) -> bfloat16 [E, G*32, R]."""
    return convert_moe_packed_tensors(blocks, scales, rows_per_chunk=MXFP4_BLOCKS)


def block_fp8(weight: Tensor, scales: Tensor) -> Tensor:
    """fp8 [..., R, C] times the scales [..., r, c] of its blocks -> bfloat16; scales as floats, or uint8 2^(s-127).

    Blocks are of 128 where that gives r or c of them (the last may be cut short, which transformers' own refuses, and
    DeepSeek's have), else equal parts.
    """
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.float() - 127)
    if weight.dim() > 2:
        return torch.stack([block_fp8(*expert) for expert in zip(weight, scales, strict=True)])
    return (weight.float() * _spread(scales.float(), weight.shape)).to(torch.bfloat16)


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """Every scale repeated over its block; a single one is left as it is."""
    if scales.numel() == 1:
        return scales.reshape(())
    for axis in (-2, -1):
        size = _block(shape[axis], scales.shape[axis])
        scales = scales.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return scales


def _block(length: int, n_scales: int) -> int:
    if -(-length // FP8_BLOCK) == n_scales:
        return FP8_BLOCK
    if length % n_scales:
        raise UserError(f"An fp8 weight of {length} rows or columns does not fit its {n_scales} scales.")
    return length // n_scales


class Dequantized:
    """A source without quantised tensors, over one that may have some. Keys are those of the plain checkpoint."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        names = set(source.keys())
        self._packed = {key.removesuffix(BLOCKS) for key in names
                        if key.endswith(BLOCKS) and key.removesuffix(BLOCKS) + SCALES in names}
        self._scaled = {key for key in names if key + SCALE in names}
        hidden = {base + suffix for base in self._packed for suffix in (BLOCKS, SCALES)}
        hidden |= {key + SCALE for key in self._scaled}
        hidden |= {key for key in names if self._scaled and key.endswith(ACTIVATION_SCALES)}
        self._keys = sorted((names - hidden) | self._packed)

    def keys(self) -> Iterable[str]:
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._packed:
            return self._source.shape(key)
        experts, rows, groups, half = self._source.shape(key + BLOCKS)
        return experts, groups * half * 2, rows

    def dtype(self, key: str) -> torch.dtype:
        if key in self._packed or key in self._scaled:
            return torch.bfloat16
        return self._source.dtype(key)

    def stored_bytes(self, key: str) -> int:
        return sum(self._source.stored_bytes(part) for part in self.parts(key))

    def get(self, key: str) -> Tensor:
        return self._decode(key, [self._source.get(part) for part in self.parts(key)])

    def get_slice(self, key: str, start: int, stop: int) -> Tensor:
        if key in self._scaled and len(self._source.shape(key)) < 3:
            return self.get(key)[start:stop]        # rows of one matrix share the scales of a block
        return self._decode(key, [self._source.get_slice(part, start, stop) for part in self.parts(key)])

    def parts(self, key: str) -> list[str]:
        """The keys of the underlying source that make `key`."""
        if key in self._packed:
            return [key + BLOCKS, key + SCALES]
        return [key, key + SCALE] if key in self._scaled else [key]

    def _decode(self, key: str, parts: list[Tensor]) -> Tensor:
        if key in self._packed:
            return mxfp4(*parts)
        if key in self._scaled:
            return block_fp8(*parts)
        if parts[0].dtype in FP8:
            raise UserError(f"The tensor {key} is stored in fp8 without the scales that belong to it.")
        return parts[0]
