"""Trunk weights (all but routed experts) at 16, 8 or 4 bits on disk.

A quantised tensor `name` is stored as `name:codes` and `name:scales`, as of kernels/trunk/linear.py. With 4 bits
the small and sensitive parts stay at 8: routers and other gates, embedding and head, the first and the last layer.
Norms, biases, convolutions and whatever is small stay as they are.
"""
from __future__ import annotations

import re

import torch

from engine.core import UserError
from engine.files.quantize import BLOCK, in_parallel, search

Tensor = torch.Tensor
CODES, SCALES = ":codes", ":scales"
GROUP = 64
SMALLEST = 16384  # weights; below this the saving is nothing
_SENSITIVE = re.compile(r"(^|\.)(gate|router|shared_expert_gate|embed_tokens|lm_head|in_proj_a|in_proj_b|in_proj_ba)\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def bits_of(name: str, tensor: Tensor, trunk_bits: int, decoder_layers: int) -> int:
    """16, 8 or 4: how the tensor is stored."""
    if trunk_bits == 16 or tensor.ndim != 2 or tensor.numel() < SMALLEST or tensor.shape[1] % GROUP:
        return 16
    if not name.endswith("weight") or not tensor.is_floating_point() or "norm" in name.rsplit(".", 2)[-2]:
        return 16
    layer = _LAYER.search(name)
    edge = layer is not None and int(layer.group(1)) in (0, decoder_layers - 1)
    return 8 if trunk_bits == 8 or edge or _SENSITIVE.search(name) else 4


def encode(name: str, tensor: Tensor, bits: int) -> dict[str, Tensor]:
    """-> tensors to store. 8 bits: int8 codes, float16 scale per group; 4 bits: packed uint8, (scale, offset).

    Block of rows by block of rows, so that an embedding of half a million rows needs no float32 copy of itself.
    UserError for weights to be quantised that are not finite.
    """
    if bits == 16:
        return {name: tensor}
    n_rows, width = tensor.shape
    codes = torch.empty(n_rows, width * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(n_rows, width // GROUP, *(() if bits == 8 else (2,)), dtype=torch.float16)
    step = max(1, BLOCK // width)

    def encode_rows(first: Tensor) -> None:
        at = slice(int(first), int(first) + step)
        codes[at], scales[at] = _encode(name, tensor[at], bits)

    in_parallel(encode_rows, torch.arange(0, n_rows, step).unbind())
    return {name + CODES: codes, name + SCALES: scales}


def _encode(name: str, rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    groups = rows.float().unflatten(-1, (-1, GROUP))
    if not torch.isfinite(groups).all():
        raise UserError(f"{name} contains values that are not finite; get an intact checkpoint.")
    return _encode8(groups) if bits == 8 else _encode4(groups)


def _encode8(groups: Tensor) -> tuple[Tensor, Tensor]:
    scale = scale8(groups)
    codes = (groups / scale[..., None].float()).round().clamp(-127, 127).to(torch.int8)
    return codes.flatten(-2), scale


def scale8(groups: Tensor) -> Tensor:
    """float16 step of 8-bit codes that reach the largest weight of each group [..., g]."""
    return (groups.abs().amax(-1) / 127).clamp(6e-8, 65504).to(torch.float16)


def _encode4(groups: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = search(groups)
    return packed(codes.flatten(-2)), scales


def stored_as(name: str, codes: Tensor, grids: Tensor, bits: int) -> dict[str, Tensor]:
    """-> tensors to store of codes uint8 [R, C] and their (scale, offset) [R, G, 2]; 8 bits: 127 is zero."""
    made = (packed(codes), grids) if bits == 4 else ((codes.short() - 127).to(torch.int8), grids[..., 0].contiguous())
    return {name + CODES: made[0].cpu(), name + SCALES: made[1].cpu()}


def packed(codes: Tensor) -> Tensor:
    """4-bit codes uint8 [..., n] -> [..., n/2]."""
    return codes[..., ::2] | codes[..., 1::2] << 4
