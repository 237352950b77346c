"""Device version of kernels/trunk/head.py: two launches over all rows, most of which the second leaves at once.

What is computed is decided on the device, row by row, so a recorded step serves every answer. Sums and scales are those
of `linear` (kernels/gpu/linear.py), whose norm and activation these launches share.

Legend as there and in kernels/trunk/head.py.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import LARGEST
from kernels.gpu.activation import codes_of
from kernels.gpu.linear import _dot, _factor, partition
from kernels.gpu.planes import words_of
from kernels.trunk.head import DEVIATIONS, REMAINDER, limit_of
from kernels.trunk.linear import Matrices

Tensor = torch.Tensor

WORDS = 8   # int32 of a plane's group


@triton.jit
def _scores(x, norm, upper, lower, scales, row, there, epsilon, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
            WORDS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, NORMED: tl.constexpr, ROWS: tl.constexpr,
            LARGEST: tl.constexpr, BOTH: tl.constexpr):
    """-> of each row its score, by both planes or by the upper one, and the sum of squared scales times squares."""
    group_size: tl.constexpr = 8 * WORDS
    if NORMED:
        factor = _factor(x, epsilon, COLUMNS, 1024)
    total, squared = tl.zeros((ROWS, STEP), tl.float32), tl.zeros((ROWS, STEP), tl.float32)
    for step in range(STEPS):
        group = step * STEP + tl.arange(0, STEP)
        column = group[:, None] * group_size + tl.arange(0, group_size)[None]
        values = tl.load(x + column, mask=column < COLUMNS, other=0)
        if NORMED:
            values = tl.load(norm + column, mask=column < COLUMNS, other=0).to(tl.float32) * (values * factor)
        valid = there[:, None] & (group < GROUPS)[None]
        at = row[:, None, None] * (GROUPS * WORDS) + (group[:, None] * WORDS + tl.arange(0, WORDS)[None])[None]
        scale = tl.load(scales + row[:, None] * GROUPS + group[None], mask=valid, other=0).to(tl.float32)
        code, scale_x = codes_of(values, LARGEST)
        even, odd = code.reshape(STEP, WORDS, 4, 2).split()
        words = tl.load(upper + at, mask=valid[:, :, None], other=0)
        whole = 16 * tl.sum(_dot(words & 0x0F0F0F0F, even) + _dot((words >> 4) & 0x0F0F0F0F, odd), axis=2)
        sums = tl.sum(code, axis=1)[None]
        if BOTH:
            words = tl.load(lower + at, mask=valid[:, :, None], other=0)
            whole += tl.sum(_dot(words & 0x0F0F0F0F, even) + _dot((words >> 4) & 0x0F0F0F0F, odd), axis=2)
            total += scale * ((whole - 128 * sums).to(tl.float32) * scale_x[None])
        else:
            total += scale * ((2 * whole - 241 * sums).to(tl.float32) * (0.5 * scale_x)[None])
            squared += scale * scale * tl.sum(values * values, axis=1)[None]
    return tl.sum(total, axis=1), tl.sum(squared, axis=1)


@triton.jit
def _scan(x, norm, upper, scales, out, reach, n_rows, epsilon, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
          WORDS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, NORMED: tl.constexpr, ROWS: tl.constexpr,
          LARGEST: tl.constexpr, REACH: tl.constexpr):
    """Grid: blocks of rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < n_rows
    score, squared = _scores(x, norm, upper, upper, scales, row, there, epsilon, COLUMNS, GROUPS, WORDS, STEP, STEPS,
                             NORMED, ROWS, LARGEST, False)
    tl.store(out + row, score, mask=there)
    tl.store(reach + row, REACH * tl.sqrt_rn(squared), mask=there)


@triton.jit
def _compute(x, norm, upper, lower, scales, out, reach, limit, n_rows, epsilon, COLUMNS: tl.constexpr,
             GROUPS: tl.constexpr, WORDS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
             NORMED: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr, SCANNED: tl.constexpr):
    """Grid: blocks of rows. Scanned: only those that may reach the limit; the others become -inf."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, score = row < n_rows, tl.full((ROWS,), float("-inf"), tl.float32)
    wanted = there
    if SCANNED:
        highest = tl.load(out + row, mask=there, other=0) + tl.load(reach + row, mask=there, other=0)
        wanted = there & ~(highest < tl.load(limit))    # what is no number is below nothing, and stays
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        score, _ = _scores(x, norm, upper, lower, scales, row, wanted, epsilon, COLUMNS, GROUPS, WORDS, STEP, STEPS,
                           NORMED, ROWS, LARGEST, True)
    tl.store(out + row, tl.where(wanted, score, float("-inf")), mask=there)


def best_rows(x: Tensor, head: Matrices, n_best: int | Tensor, norm: Tensor | None = None, epsilon: float = 0.0,
              ) -> Tensor:
    """As kernels.trunk.head.best_rows."""
    codes, scales, _ = head.parts[0]
    n_rows, groups = scales.shape
    assert x.shape == (1, head.columns) and x.dtype == torch.float32 and x.is_contiguous(), x.shape
    assert codes.stride(2) == 1 and codes.stride(0) == codes.shape[2] and scales.is_contiguous()
    upper, lower = (words_of(plane) for plane in codes.unbind(1))
    out = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    reach = torch.empty_like(out)
    rows, step, _ = partition(n_rows, groups, WORDS)
    sizes = dict(COLUMNS=head.columns, GROUPS=groups, WORDS=WORDS, STEP=step, STEPS=triton.cdiv(groups, step),
                 NORMED=norm is not None, ROWS=rows, LARGEST=LARGEST, num_warps=4)
    norm, grid, limit = x if norm is None else norm, (triton.cdiv(n_rows, rows),), reach
    scanned = isinstance(n_best, Tensor) or n_best > 0
    if scanned:
        _scan[grid](x, norm, upper, scales, out, reach, n_rows, epsilon, REACH=DEVIATIONS * REMAINDER, **sizes)
        limit = limit_of(out - reach, n_best)
    _compute[grid](x, norm, upper, lower, scales, out, reach, limit, n_rows, epsilon, SCANNED=scanned, **sizes)
    return out
