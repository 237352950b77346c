"""Device version of quantize_activation, and the finer one for values: 16-bit fixed point as two int8 halves.

A group of 128 activations in 16 bits with its own scale is finer than bfloat16, and two four-way dot products take it.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.planes import groups_at_once

Tensor = torch.Tensor

LARGEST = 127 * 256 + 127       # so that both halves fit in int8


class FixedPoint(NamedTuple):
    """x is about (256 * high + low) * scale, group by group."""

    high: Tensor    # int8 [T, H]
    low: Tensor     # int8 [T, H]
    scale: Tensor   # float32 [T, G]
    sums: Tensor    # float32 [T, G], sum of x over the group


@triton.jit
def _rounded(x):
    """Nearest integer, halves to even, as torch.round: adding 1.5 * 2**23 leaves no bit for the fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def codes_of(values, LARGEST: tl.constexpr):
    """float32 [G, g] -> integers of at most LARGEST, int32 [G, g], and their scale, float32 [G]. Eight bits are rounded
    as the reference does; at sixteen a division each is not worth its eight instructions."""
    size = tl.abs(values)
    # A maximum passes over NaN, so it counts as an infinity.
    largest = tl.max(tl.where(size <= 3.4028234663852886e38, size, float("inf")), axis=1)
    scale = tl.div_rn(tl.maximum(largest, 1e-20), LARGEST * 1.0)
    if LARGEST > 127:
        code = _rounded(values * tl.div_rn(1.0, scale)[:, None])
    else:
        code = _rounded(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)))
    code = tl.minimum(tl.maximum(code, -LARGEST * 1.0), LARGEST * 1.0)
    return tl.where(scale[:, None] < float("inf"), code, 0).to(tl.int32), scale


@triton.jit
def _quantize(x, codes, low, scales, sums, GROUPS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
              HALVES: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: GROUPS/STEP, T."""
    group = tl.program_id(1) * GROUPS + tl.program_id(0) * STEP + tl.arange(0, STEP)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None]
    code, scale = codes_of(tl.load(x + at).to(tl.float32), LARGEST)
    tl.store(scales + group, scale)
    if HALVES:
        high = (code + 128) >> 8
        tl.store(codes + at, high.to(tl.int8))
        tl.store(low + at, (code - high * 256).to(tl.int8))
        tl.store(sums + group, tl.sum(code, axis=1).to(tl.float32) * scale)
    else:
        tl.store(codes + at, code.to(tl.int8))


def quantize_activation(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """As kernels.activation.quantize_activation."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[0], x.shape[1] // group, dtype=torch.float32, device=x.device)
    _launch(x, group, codes, codes, scales, scales, False)
    return codes, scales


def fixed_point(x: Tensor, group: int) -> FixedPoint:
    """float32 [T, H] -> 16 bits each."""
    high, low = torch.empty(2, *x.shape, dtype=torch.int8, device=x.device)
    scale, sums = torch.empty(2, x.shape[0], x.shape[1] // group, dtype=torch.float32, device=x.device)
    _launch(x, group, high, low, scale, sums, True)
    return FixedPoint(high, low, scale, sums)


def _launch(x: Tensor, group: int, codes: Tensor, low: Tensor, scales: Tensor, sums: Tensor, halves: bool) -> None:
    assert x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.is_contiguous() and x.shape[1] % group == 0
    groups = x.shape[1] // group
    step = groups_at_once(groups, 8)
    _quantize[(groups // step, x.shape[0])](x, codes, low, scales, sums, GROUPS=groups, GROUP=group, STEP=step,
                                            HALVES=halves, LARGEST=LARGEST if halves else 127, num_warps=4)
