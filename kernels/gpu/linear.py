"""Device version of kernels/trunk/linear.py: a few rows and stretches of columns a block, four codes a multiplication.

The activation becomes 16-bit fixed point in two int8 halves, as for the experts: what binds is memory, so the second
half is free, and a token read alone gives the numbers of one read in a prompt. Every block does that for itself, and
the norm before it, which spares two nodes of the graph; up to three matrices of one kind, such as those of queries,
keys and values, are one launch. Few rows are spread over more blocks, first by fewer rows a block, then (`linear`
alone) by splitting the columns, whose sums are added in order: by shape alone, never by card.

Legend as in kernels/trunk/linear.py; G groups of a row, words are int32 of WORDS a group (4 or 8 codes each). Weights
that are no codes are WORDS numbers a group.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import LARGEST
from kernels.gpu.activation import codes_of
from kernels.gpu.planes import add_splits, dp4a, scale_offset, words_of
from kernels.trunk.linear import MOST_TOKENS, Matrices, columns, joined

Tensor = torch.Tensor
Part = tuple[Tensor, Tensor | None, Tensor | None]

MOST_ROWS, LEAST_ROWS = 16, 4       # of a block of four warps
TILE_WORDS = 2048                   # code words that a block has under way
PLAIN_GROUP, PLAIN_TILE = 64, 4096  # columns of a group, and numbers under way, where weights are no codes
BLOCKS = 256                        # wanted: twice the multiprocessors of the largest cards
SPLIT_BELOW = 128                   # blocks; only then the sums of columns are worth a second kernel
MOST_PARTS = 3                      # matrices of one launch
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
def _factor(x, epsilon, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """1 / sqrt(mean(x**2) + epsilon) of one token."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < COLUMNS, other=0).to(tl.float32)
        squares += value * value
    return 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / COLUMNS + epsilon)


@triton.jit
def _linear(x, norm, codes, scales, bias, codes1, scales1, bias1, codes2, scales2, bias2, residual, out, normed,
            end0, end1, n_rows, width, epsilon, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
            STEP: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr,
            BIASED: tl.constexpr, ADDED: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: T, blocks of rows, splits of STEPS steps. codes in words, scales where 4 bits as well; out [T, splits, R]
    with `width` to the next, residual likewise; normed [T, K]. end0, end1: where the first two matrices' rows end."""
    token, split = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there, within = row < n_rows, row
    group_size: tl.constexpr = WORDS if BITS == 16 else COLUMNS // GROUPS
    if PARTS > 1:
        if tl.program_id(1) * ROWS >= end1:
            codes, scales, bias, within = codes2, scales2, bias2, row - end1
        elif tl.program_id(1) * ROWS >= end0:
            codes, scales, bias, within = codes1, scales1, bias1, row - end0
    x += token * COLUMNS
    if NORMED:
        factor = _factor(x, epsilon, COLUMNS, 1024)
    total = tl.zeros((ROWS, STEP), tl.float32)
    for step in range(STEPS):
        group = (split * STEPS + step) * STEP + tl.arange(0, STEP)
        column = group[:, None] * group_size + tl.arange(0, group_size)[None]
        inside = column < COLUMNS
        values = tl.load(x + column, mask=inside, other=0).to(tl.float32)
        if NORMED:
            values = tl.load(norm + column, mask=inside, other=0).to(tl.float32) * (values * factor)
            tl.store(normed + token * COLUMNS + column, values, mask=inside & (tl.program_id(1) == 0))
        if BITS == 16:
            weights = tl.load(codes + within[:, None, None] * COLUMNS + column[None],
                              mask=there[:, None, None] & inside[None], other=0).to(tl.float32)
            total += tl.sum(weights * values[None], axis=2)
        else:
            valid = there[:, None] & (group < GROUPS)[None]
            at = group[:, None] * WORDS + tl.arange(0, WORDS)[None]
            words = tl.load(codes + within[:, None, None] * (GROUPS * WORDS) + at[None], mask=valid[:, :, None],
                            other=0)
            pair = tl.load(scales + within[:, None] * GROUPS + group[None], mask=valid, other=0)
            code, scale_x = codes_of(values, LARGEST)
            if BITS == 4:
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
        value += tl.load(bias + within, mask=there, other=0).to(tl.float32)
    at = (token * tl.num_programs(2) + split) * width + row
    if ADDED:
        value += tl.load(residual + at, mask=there, other=0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=there)


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As kernels.trunk.linear.linear."""
    n_tokens, n_rows = len(x), len(codes)
    assert x.shape == (n_tokens, columns(codes)) and n_tokens <= MOST_TOKENS, (x.shape, codes.shape)
    rows, step, splits = partition(n_rows, scales.shape[1], codes.shape[1] // scales.shape[1] // 4)
    out = torch.empty(n_tokens, n_rows, dtype=x.dtype, device=x.device)
    sums = out if splits == 1 else torch.empty(n_tokens, splits, n_rows, dtype=torch.float32, device=x.device)
    _launch(x.contiguous(), [(codes, scales, bias if splits == 1 else None)], sums, (rows, step, splits))
    if splits > 1:
        add_splits(sums, out, bias)
    return out


def linears(x: Tensor, matrices: Matrices, norm: Tensor | None = None, epsilon: float = 0.0,
            residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.linear.linears: one launch for neighbours of one kind."""
    assert x.shape[1] == matrices.columns and len(x) <= MOST_TOKENS and x.dtype == torch.float32, x.shape
    x, width = x.contiguous(), matrices.rows
    out = torch.empty(len(x), width, dtype=torch.float32, device=x.device)
    assert residual is None or residual.is_contiguous() and (residual.shape, residual.dtype) == (out.shape, out.dtype)
    assert norm is None or norm.is_contiguous() and norm.shape == x.shape[1:], norm.shape
    normed, first = x if norm is None else torch.empty_like(x), 0
    for parts in _launches(matrices):
        n_rows = sum(len(codes) for codes, _, _ in parts)
        codes, scales, _ = parts[0]
        groups = triton.cdiv(matrices.columns, PLAIN_GROUP) if scales is None else scales.shape[1]
        rows, step, _ = partition(n_rows, groups, PLAIN_GROUP if scales is None else codes.shape[1] // groups // 4,
                                  scales is None)
        _launch(x, parts, out[:, first:], (rows, step, 1), norm, epsilon, normed,
                None if residual is None else residual[:, first:])
        first += n_rows
    return out, normed


def _launches(matrices: Matrices) -> list[list[Part]]:
    """Parts that one launch computes: neighbours of one kind, few, of whole blocks but for the last."""
    found: list[list[Part]] = []
    for part in matrices.parts:
        fits = (found and _kind(part) == _kind(found[-1][0]) and len(found[-1]) < MOST_PARTS
                and len(found[-1][-1][0]) % MOST_ROWS == 0)
        if fits:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _kind(part: Part) -> tuple:
    codes, scales, bias = part
    return codes.dtype, scales is None, None if bias is None else bias.dtype


def _launch(x: Tensor, parts: list[Part], out: Tensor, sizes: tuple[int, int, int],
            norm: Tensor | None = None, epsilon: float = 0.0, normed: Tensor | None = None,
            residual: Tensor | None = None) -> None:
    """out [T, ...], any distance from one token's (or split's) row to the next. sizes: as `partition` returns."""
    rows, step, splits = sizes
    codes, scales, bias = parts[0]
    bits = 16 if scales is None else 8 if codes.dtype == torch.int8 else 4
    groups = triton.cdiv(x.shape[1], PLAIN_GROUP) if bits == 16 else scales.shape[1]
    ends = [sum(len(part[0]) for part in parts[:n]) for n in range(1, MOST_PARTS + 1)]
    given = [_given(part, x) for part in (*parts, *[parts[-1]] * (MOST_PARTS - len(parts)))]
    _linear[(len(x), triton.cdiv(ends[-1], rows), splits)](
        x, x if norm is None else norm, *(pointer for part in given for pointer in part),
        x if residual is None else residual, out, x if normed is None else normed, ends[0], ends[1], ends[2],
        out.stride(-2), epsilon, COLUMNS=x.shape[1], GROUPS=groups,
        WORDS=PLAIN_GROUP if bits == 16 else codes.shape[1] // groups // 4, STEP=step,
        STEPS=triton.cdiv(triton.cdiv(groups, step), splits), BITS=bits, PARTS=len(parts), NORMED=norm is not None,
        BIASED=bias is not None, ADDED=residual is not None, ROWS=rows, LARGEST=LARGEST, num_warps=4)


def _given(part: Part, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales and bias as the kernel reads them; x stands where there is none."""
    codes, scales, bias = part
    assert codes.is_contiguous() and (bias is None or bias.is_contiguous())
    if scales is None:
        return codes, x, x if bias is None else bias
    assert scales.is_contiguous() and scales.dtype == torch.float16
    four = codes.dtype == torch.uint8
    return (words_of(codes.view(torch.uint8)), scales.view(torch.int32)[..., 0] if four else scales,
            x if bias is None else bias)


def partition(n_rows: int, groups: int, words: int, is_plain: bool = False) -> tuple[int, int, int]:
    """-> rows of a block, groups of a step, splits of the columns; words: of a group."""
    rows, least, tile = MOST_ROWS, 1 if is_plain else LEAST_ROWS, PLAIN_TILE if is_plain else TILE_WORDS
    while rows > least and triton.cdiv(n_rows, rows) < BLOCKS:
        rows //= 2
    step = min(tile // rows // words, triton.next_power_of_2(groups))
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
    codes = joined(codes)
    n_rows, n_columns = len(codes), columns(codes)
    four, groups = codes.dtype == torch.uint8, scales.shape[1]
    assert out.shape == (n_rows, n_columns) and out.is_contiguous() and codes.is_contiguous()
    _dequantize[(n_rows, triton.cdiv(n_columns, STRETCH))](
        codes, scales.view(torch.int32)[..., 0] if four else scales, out, COLUMNS=n_columns,
        GROUP=n_columns // groups, FOUR=four, STRETCH=STRETCH, num_warps=4)
