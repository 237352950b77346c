"""Device version of kernels/activation.py: 8 bits for scores, and 16-bit fixed point as two int8 halves for values.

A group of 128 activations in 16 bits with its own scale is finer than bfloat16, and two four-way dot products take it.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import LARGEST, FixedPoint
from kernels.gpu.planes import groups_at_once, product

Tensor = torch.Tensor

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
        code = _rounded(product(values, tl.broadcast_to(tl.div_rn(1.0, scale)[:, None], values.shape)))
    else:
        code = _rounded(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)))
    code = tl.minimum(tl.maximum(code, -LARGEST * 1.0), LARGEST * 1.0)
    return tl.where(scale[:, None] < float("inf"), code, 0).to(tl.int32), scale


@triton.jit
def _quantize(x, codes, scales, high, low, scale, sums, WIDTH: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
              STEP: tl.constexpr, SCORES: tl.constexpr, VALUES: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: GROUPS/STEP, T. x [T, WIDTH]. Writes codes and scales for SCORES, the rest for VALUES, of GROUPS."""
    token, own = tl.program_id(1), tl.program_id(0) * STEP + tl.arange(0, STEP)
    column = own[:, None] * GROUP + tl.arange(0, GROUP)[None]
    values = tl.load(x + token * WIDTH + column, mask=column < WIDTH, other=0).to(tl.float32)
    quantized(values, token * GROUPS + own, token * (GROUPS * GROUP) + column, codes, scales, high, low, scale, sums,
              SCORES, VALUES, LARGEST)


@triton.jit
def quantized(values, group, at, codes, scales, high, low, scale, sums, SCORES: tl.constexpr, VALUES: tl.constexpr,
              LARGEST: tl.constexpr):
    """float32 [G, g] of groups `group`, numbers `at` -> codes and scales for SCORES, the rest for VALUES."""
    if SCORES:
        code, unit = codes_of(values, 127)
        tl.store(scales + group, unit)
        tl.store(codes + at, code.to(tl.int8))
    if VALUES:
        code, unit = codes_of(values, LARGEST)
        upper = (code + 128) >> 8
        tl.store(high + at, upper.to(tl.int8))
        tl.store(low + at, (code - upper * 256).to(tl.int8))
        tl.store(scale + group, unit)
        tl.store(sums + group, tl.sum(code, axis=1).to(tl.float32) * unit)


def quantize_activation(x: Tensor, group: int, columns: int | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.activation.quantize_activation."""
    found = room(len(x), columns or x.shape[1], group, x.device)[:2]
    _launch(x, group, found, None)
    return found


def fixed_point(x: Tensor, group: int, columns: int | None = None) -> FixedPoint:
    """float [T, H] -> 16 bits each."""
    found = FixedPoint(*room(len(x), columns or x.shape[1], group, x.device)[2:])
    _launch(x, group, None, found)
    return found


def quantize(x: Tensor, group: int, columns: int | None = None) -> tuple[Tensor, ...]:
    """As kernels.activation.quantize: one launch."""
    found = room(len(x), columns or x.shape[1], group, x.device)
    _launch(x, group, found[:2], FixedPoint(*found[2:]))
    return found


def room(n_tokens: int, width: int, group: int, device: torch.device) -> tuple[Tensor, ...]:
    """For what `quantize` makes of [n_tokens, width]."""
    codes, high, low = torch.empty(3, n_tokens, width, dtype=torch.int8, device=device)
    scales, scale, sums = torch.empty(3, n_tokens, width // group, dtype=torch.float32, device=device)
    return codes, scales, high, low, scale, sums


def _launch(x: Tensor, group: int, scores: tuple[Tensor, Tensor] | None, values: FixedPoint | None) -> None:
    assert x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.is_contiguous(), (x.dtype, x.stride())
    groups = (scores or values)[-1].shape[1]
    assert x.shape[1] <= groups * group, (x.shape, groups, group)
    step = groups_at_once(groups, 8)
    _quantize[(groups // step, x.shape[0])](
        x, *(scores or (x, x)), *(values or (x, x, x, x)), WIDTH=x.shape[1], GROUPS=groups, GROUP=group, STEP=step,
        SCORES=scores is not None, VALUES=values is not None, LARGEST=LARGEST, num_warps=4)
