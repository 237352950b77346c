"""Device version of kernels/trunk/linear.py: a few rows and stretches of columns a block, four codes a multiplication.

The activation becomes 16-bit fixed point in two int8 halves, as for the experts: what binds is memory, so the second
half is free, and a token read alone gives the numbers of one read in a prompt. Every block does that for itself, which
spares a node of the graph. Few rows are spread over more blocks, first by fewer rows a block, then by splitting the
columns, whose sums are added in order: by shape alone, never by card.

Legend as in kernels/trunk/linear.py; G groups of a row, words are int32 of WORDS a group (4 or 8 codes each).
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.activation import LARGEST, codes_of
from kernels.gpu.planes import add_splits, dp4a, scale_offset, words_of
from kernels.trunk.linear import MOST_TOKENS, columns

Tensor = torch.Tensor

MOST_ROWS, LEAST_ROWS = 16, 4       # of a block of four warps
TILE_WORDS = 2048                   # code words that a block has under way
BLOCKS = 256                        # wanted: twice the multiprocessors of the largest cards
SPLIT_BELOW = 128                   # blocks; only then the sums of columns are worth a second kernel
STRETCH = 1024                      # columns that a block of `_dequantize` turns


@triton.jit
def _dot(words, code):
    """Code words [ROWS, STEP, WORDS] times activations int32 [STEP, WORDS, 4] of 16 bits -> int32 like words."""
    shift = (8 * tl.arange(0, 4))[None, None]
    high = (code + 128) >> 8
    low = tl.sum(((code - high * 256) & 255) << shift, axis=2)
    total = dp4a(words, tl.sum((high & 255) << shift, axis=2)[None], tl.zeros_like(words)) * 256
    return dp4a(words, low[None], total)


@triton.jit
def _linear(x, codes, scales, bias, out, n_rows, GROUPS: tl.constexpr, WORDS: tl.constexpr, STEP: tl.constexpr,
            STEPS: tl.constexpr, FOUR: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: T, blocks of rows, splits of STEPS steps. codes in words, scales where FOUR as well; out [T, splits, R]."""
    token, split = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < n_rows
    group_size: tl.constexpr = WORDS * (8 if FOUR else 4)
    total = tl.zeros((ROWS, STEP), tl.float32)
    for step in range(STEPS):
        group = (split * STEPS + step) * STEP + tl.arange(0, STEP)
        inside = group < GROUPS
        valid = there[:, None] & inside[None]
        at = group[:, None] * WORDS + tl.arange(0, WORDS)[None]
        words = tl.load(codes + row[:, None, None] * (GROUPS * WORDS) + at[None], mask=valid[:, :, None], other=0)
        pair = tl.load(scales + row[:, None] * GROUPS + group[None], mask=valid, other=0)
        column = group[:, None] * group_size + tl.arange(0, group_size)[None]
        values = tl.load(x + token * (GROUPS * group_size) + column, mask=inside[:, None], other=0)
        code, scale_x = codes_of(values.to(tl.float32), LARGEST)
        if FOUR:
            even, odd = code.reshape(STEP, WORDS, 4, 2).split()
            dot = _dot(words & 0x0F0F0F0F, even) + _dot((words >> 4) & 0x0F0F0F0F, odd)
            scale, offset = scale_offset(pair)
            sum_x = tl.sum(code, axis=1).to(tl.float32) * scale_x
            total += scale * (tl.sum(dot, axis=2).to(tl.float32) * scale_x[None]) + offset * sum_x[None]
        else:
            dot = _dot(words, code.reshape(STEP, WORDS, 4))
            total += pair.to(tl.float32) * (tl.sum(dot, axis=2).to(tl.float32) * scale_x[None])
    value = tl.sum(total, axis=1)
    if BIASED:
        value += tl.load(bias + row, mask=there, other=0).to(tl.float32)
    out += (token * tl.num_programs(2) + split) * n_rows
    tl.store(out + row, value.to(out.dtype.element_ty), mask=there)


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As kernels.trunk.linear.linear."""
    n_tokens, n_rows = len(x), len(codes)
    four, groups = codes.dtype == torch.uint8, scales.shape[1]
    assert x.shape == (n_tokens, columns(codes)) and n_tokens <= MOST_TOKENS, (x.shape, codes.shape)
    assert codes.is_contiguous() and scales.is_contiguous() and scales.dtype == torch.float16
    assert bias is None or bias.is_contiguous()
    rows, step, splits = partition(n_rows, groups, words := codes.shape[1] // groups // 4)
    steps = triton.cdiv(triton.cdiv(groups, step), splits)
    out = torch.empty(n_tokens, n_rows, dtype=x.dtype, device=x.device)
    sums = out if splits == 1 else torch.empty(n_tokens, splits, n_rows, dtype=torch.float32, device=x.device)
    added = bias is not None and splits == 1
    _linear[(n_tokens, triton.cdiv(n_rows, rows), splits)](
        x.contiguous(), words_of(codes.view(torch.uint8)), scales.view(torch.int32)[..., 0] if four else scales,
        bias if added else x, sums, n_rows, GROUPS=groups, WORDS=words, STEP=step, STEPS=steps, FOUR=four,
        BIASED=added, ROWS=rows, LARGEST=LARGEST, num_warps=4)
    if splits > 1:
        add_splits(sums, out, bias)
    return out


def partition(n_rows: int, groups: int, words: int) -> tuple[int, int, int]:
    """-> rows of a block, groups of a step, splits of the columns; words: of a group."""
    rows = MOST_ROWS
    while rows > LEAST_ROWS and triton.cdiv(n_rows, rows) < BLOCKS:
        rows //= 2
    step = min(TILE_WORDS // rows // words, triton.next_power_of_2(groups))
    blocks, steps = triton.cdiv(n_rows, rows), triton.cdiv(groups, step)
    return rows, step, 1 if blocks >= SPLIT_BELOW else min(steps, triton.cdiv(SPLIT_BELOW, blocks))


@triton.jit
def _dequantize(codes, scales, out, COLUMNS: tl.constexpr, GROUP: tl.constexpr, FOUR: tl.constexpr,
                STRETCH: tl.constexpr):
    """Grid: R, stretches of K. scales: words of two float16 where FOUR."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    valid = column < COLUMNS
    pair = tl.load(scales + row * (COLUMNS // GROUP) + column // GROUP, mask=valid, other=0)
    if FOUR:
        code = tl.load(codes + row * (COLUMNS // 2) + column // 2, mask=valid, other=0).to(tl.int32)
        scale, offset = scale_offset(pair)
        value = scale * ((code >> (4 * (column % 2))) & 15).to(tl.float32) + offset
    else:
        value = pair.to(tl.float32) * tl.load(codes + row * COLUMNS + column, mask=valid, other=0).to(tl.float32)
    tl.store(out + row * COLUMNS + column, value.to(out.dtype.element_ty), mask=valid)


def dequantize_rows(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """As kernels.trunk.linear.dequantize_rows."""
    n_rows, n_columns = len(codes), columns(codes)
    four, groups = codes.dtype == torch.uint8, scales.shape[1]
    assert out.shape == (n_rows, n_columns) and out.is_contiguous() and codes.is_contiguous()
    _dequantize[(n_rows, triton.cdiv(n_columns, STRETCH))](
        codes, scales.view(torch.int32)[..., 0] if four else scales, out, COLUMNS=n_columns,
        GROUP=n_columns // groups, FOUR=four, STRETCH=STRETCH, num_warps=4)
