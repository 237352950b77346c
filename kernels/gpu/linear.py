"""Device version of kernels/trunk/linear.py: a few rows and stretches of columns a block, four codes a multiplication.

The activation becomes 16-bit fixed point in two int8 halves, as for the experts: what is expected to bind is memory, so
that the second half costs little, and a token read alone gives the numbers of one read in a prompt. Every block does
that for itself, and the norm before it, or the gate that joins a shared expert's halves, which spares nodes of the
graph; up to three matrices of one kind, such as those of queries, keys and values, are a section, and one launch has
two. Few rows are spread over more blocks, first by fewer rows a block, then (`linear` alone) by splitting the
columns, whose sums are added in order: by shape alone, never by card.

Legend as in kernels/trunk/linear.py; G groups of a row, words are int32 of WORDS a group (4 or 8 codes each). Weights
that are no codes are WORDS numbers a group.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.activation import LARGEST, Gate
from kernels.gpu.activation import codes_of
from kernels.gpu.gate import check_gate, gated, kind_of
from kernels.gpu.planes import add_splits, dp4a, scale_offset, words_of
from kernels.trunk.linear import MOST_TOKENS, Matrices, columns, joined

Tensor = torch.Tensor
Part = tuple[Tensor, Tensor | None, Tensor | None]

MOST_ROWS, LEAST_ROWS = 16, 4       # of a block of four warps
TILE_WORDS = 2048                   # code words that a block has under way
PLAIN_GROUP, PLAIN_TILE = 64, 4096  # columns of a group, and numbers under way, where weights are no codes
BLOCKS = 256                        # wanted: twice the multiprocessors of the largest cards
SPLIT_BELOW = 128                   # blocks; only then the sums of columns are worth a second kernel
MOST_PARTS = 3                      # matrices of a section
PLAIN, NORMED, GATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)    # where an activation comes from: as it is,
# behind a norm, or (GATED and twice the kind of a gate, and one where a logit stands in front) of gates and ups
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
def loaded(x, norm, factor, column, inside, COLUMNS: tl.constexpr, FROM: tl.constexpr):
    """Numbers `column` of one token's activation, float32, as FROM says; factor: as `factor_of` has it."""
    if FROM >= GATED:
        first = (FROM - GATED) % 2
        gate = tl.load(x + first + column, mask=inside, other=0)
        up = tl.load(x + first + COLUMNS + column, mask=inside, other=0)
        return gated(gate, up, 0.0, 0.0, (FROM - GATED) // 2) * factor
    value = tl.load(x + column, mask=inside, other=0).to(tl.float32)
    if FROM == NORMED:
        value = tl.load(norm + column, mask=inside, other=0).to(tl.float32) * (value * factor)
    return value


@triton.jit
def factor_of(x, epsilon, COLUMNS: tl.constexpr, FROM: tl.constexpr):
    """What all numbers of a token are times: of a norm, or of a logit in front of gates."""
    if FROM == NORMED:
        return _factor(x, epsilon, COLUMNS, 1024)
    if FROM >= GATED and FROM % 2 == 1:
        return tl.sigmoid(tl.load(x))
    return 1.0


@triton.jit
def section(x, norm, codes, scales, bias, codes1, scales1, bias1, codes2, scales2, bias2, residual, out, normed, block,
            split, end0, end1, n_rows, epsilon, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
            STEP: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, FROM: tl.constexpr,
            BIASED: tl.constexpr, ADDED: tl.constexpr, WRITES: tl.constexpr, ROWS: tl.constexpr,
            LARGEST: tl.constexpr):
    """Rows [block * ROWS ..] of up to three matrices of one kind times one token x -> out, on top of residual; where
    WRITES the first block leaves the activation in `normed`. end0, end1: where the first two matrices' rows end."""
    row = block * ROWS + tl.arange(0, ROWS)
    there, within = row < n_rows, row
    group_size: tl.constexpr = WORDS if BITS == 16 else COLUMNS // GROUPS
    if PARTS > 1:
        if block * ROWS >= end1:
            codes, scales, bias, within = codes2, scales2, bias2, row - end1
        elif block * ROWS >= end0:
            codes, scales, bias, within = codes1, scales1, bias1, row - end0
    factor = factor_of(x, epsilon, COLUMNS, FROM)
    total = tl.zeros((ROWS, STEP), tl.float32)
    for step in range(STEPS):
        group = (split * STEPS + step) * STEP + tl.arange(0, STEP)
        column = group[:, None] * group_size + tl.arange(0, group_size)[None]
        inside = column < COLUMNS
        values = loaded(x, norm, factor, column, inside, COLUMNS, FROM)
        if WRITES:
            tl.store(normed + column, values, mask=inside & (block == 0))
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
    if ADDED:
        value += tl.load(residual + row, mask=there, other=0)
    tl.store(out + row, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _linear(x, norm, codes, scales, bias, codes1, scales1, bias1, codes2, scales2, bias2, codes3, scales3, bias3,
            codes4, scales4, bias4, codes5, scales5, bias5, residual, out, normed, end0, end1, n_rows, end3, end4,
            n_more, stride, width, epsilon, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
            STEP: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
            GROUPS1: tl.constexpr, WORDS1: tl.constexpr, STEP1: tl.constexpr, STEPS1: tl.constexpr,
            BITS1: tl.constexpr, PARTS1: tl.constexpr, ROWS1: tl.constexpr, FROM: tl.constexpr, BIASED: tl.constexpr,
            BIASED1: tl.constexpr, ADDED: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: T, blocks of rows of a first section and then of a second, if it has PARTS1, splits of STEPS steps of the
    only one. codes in words, scales where 4 bits as well; x [T, ..] `stride` apart, out [T, splits, R] with `width` to
    the next, residual likewise; normed [T, K]."""
    token, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = (token * tl.num_programs(2) + split) * width
    x, normed, out, residual = x + token * stride, normed + token * COLUMNS, out + at, residual + at
    if PARTS1 > 0:
        n_blocks = tl.cdiv(n_rows, ROWS)
        if block >= n_blocks:
            section(x, norm, codes3, scales3, bias3, codes4, scales4, bias4, codes5, scales5, bias5, residual + n_rows,
                    out + n_rows, normed, block - n_blocks, 0, end3, end4, n_more, epsilon, COLUMNS, GROUPS1, WORDS1,
                    STEP1, STEPS1, BITS1, PARTS1, FROM, BIASED1, ADDED, False, ROWS1, LARGEST)
        else:
            section(x, norm, codes, scales, bias, codes1, scales1, bias1, codes2, scales2, bias2, residual, out, normed,
                    block, 0, end0, end1, n_rows, epsilon, COLUMNS, GROUPS, WORDS, STEP, STEPS, BITS, PARTS, FROM,
                    BIASED, ADDED, FROM == NORMED, ROWS, LARGEST)
    else:
        section(x, norm, codes, scales, bias, codes1, scales1, bias1, codes2, scales2, bias2, residual, out, normed,
                block, split, end0, end1, n_rows, epsilon, COLUMNS, GROUPS, WORDS, STEP, STEPS, BITS, PARTS, FROM,
                BIASED, ADDED, FROM == NORMED, ROWS, LARGEST)


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As kernels.trunk.linear.linear."""
    n_tokens, n_rows = len(x), len(codes)
    assert x.shape == (n_tokens, columns(codes)) and n_tokens <= MOST_TOKENS, (x.shape, codes.shape)
    splits = partition(n_rows, scales.shape[1], codes.shape[1] // scales.shape[1] // 4)[2]
    out = torch.empty(n_tokens, n_rows, dtype=x.dtype, device=x.device)
    sums = out if splits == 1 else torch.empty(n_tokens, splits, n_rows, dtype=torch.float32, device=x.device)
    launch(x.contiguous(), x.shape[1], [[(codes, scales, bias if splits == 1 else None)]], sums, splits=splits)
    if splits > 1:
        add_splits(sums, out, bias)
    return out


def linears(x: Tensor, matrices: Matrices, norm: Tensor | None = None, epsilon: float = 0.0,
            residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.linear.linears: one launch, but for matrices of many kinds."""
    assert x.shape[1] == matrices.columns and len(x) <= MOST_TOKENS and x.dtype == torch.float32, x.shape
    assert norm is None or norm.is_contiguous() and norm.shape == x.shape[1:], norm.shape
    x = x.contiguous()
    normed = x if norm is None else torch.empty_like(x)
    return _multiplied(x, matrices, residual, norm, epsilon, normed, (PLAIN if norm is None else NORMED).value), normed


def gated_linears(x: Tensor, matrices: Matrices, residual: Tensor | None = None, kind: str = "silu") -> Tensor:
    """As kernels.trunk.gated.gated_linears: every block joins gate and up for itself."""
    logit, size, gate = x.shape[1] % 2, matrices.columns, Gate(kind)
    check_gate(gate)
    assert x.shape[1] == logit + 2 * size and len(x) <= MOST_TOKENS and x.dtype == torch.float32, x.shape
    assert x.stride(1) == 1 and kind != "clamped_swiglu", x.stride()
    return _multiplied(x, matrices, residual, None, 0.0, x, GATED.value + 2 * kind_of(gate) + logit)


def _multiplied(x: Tensor, matrices: Matrices, residual: Tensor | None, norm: Tensor | None, epsilon: float,
                normed: Tensor, where: int) -> Tensor:
    out = torch.empty(len(x), matrices.rows, dtype=torch.float32, device=x.device)
    assert residual is None or residual.is_contiguous() and (residual.shape, residual.dtype) == (out.shape, out.dtype)
    found, first = sections(matrices), 0
    for at in range(0, len(found), 2):
        both = found[at:at + 2]
        launch(x, matrices.columns, both, out[:, first:], norm, epsilon, normed,
                None if residual is None else residual[:, first:], where)
        first += sum(len(part[0]) for parts in both for part in parts)
    return out


def sections(matrices: Matrices) -> list[list[Part]]:
    """Neighbours of one kind, few, of whole blocks but for the last."""
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


def launch(x: Tensor, n_columns: int, both: list[list[Part]], out: Tensor, norm: Tensor | None = None,
           epsilon: float = 0.0, normed: Tensor | None = None, residual: Tensor | None = None, where: int = 0,
           splits: int = 1) -> None:
    """One section or two. out [T, ...], any distance from one token's (or split's) row to the next."""
    first, second = shaped(both[0], n_columns, splits), shaped(both[-1], n_columns)
    alone = len(both) == 1
    _linear[(len(x), first.blocks + (0 if alone else second.blocks), splits)](
        x, x if norm is None else norm, *first.pointers(x), *second.pointers(x), x if residual is None else residual,
        out, x if normed is None else normed, *first.ends, *second.ends, x.stride(0), out.stride(-2), epsilon,
        COLUMNS=n_columns, **first.sizes(""), **second.sizes("1", alone), FROM=where, ADDED=residual is not None,
        LARGEST=LARGEST, num_warps=4)


@dataclass(frozen=True)
class Section:
    """How a launch has the parts of one section: rows of a block, groups of a row and of a step, words of a group."""

    parts: list[Part]
    bits: int
    rows: int
    groups: int
    words: int
    step: int
    steps: int

    @property
    def ends(self) -> list[int]:
        """Where the rows of the first MOST_PARTS parts end."""
        return [sum(len(part[0]) for part in self.parts[:n]) for n in range(1, MOST_PARTS + 1)]

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.ends[-1], self.rows)

    def pointers(self, x: Tensor) -> list[Tensor]:
        """codes, scales and bias of each part; x stands where there is none."""
        every = (*self.parts, *[self.parts[-1]] * (MOST_PARTS - len(self.parts)))
        return [pointer for part in every for pointer in _pointers(part, x)]

    def sizes(self, which: str, is_left_out: bool = False) -> dict[str, int]:
        """Constants of the kernel, their names with `which` behind them."""
        found = {"GROUPS": self.groups, "WORDS": self.words, "STEP": self.step, "STEPS": self.steps, "BITS": self.bits,
                 "PARTS": 0 if is_left_out else len(self.parts), "ROWS": self.rows,
                 "BIASED": self.parts[0][2] is not None}
        return {name + which: value for name, value in found.items()}


def shaped(parts: list[Part], n_columns: int, splits: int = 1) -> Section:
    codes, scales, _ = parts[0]
    bits = 16 if scales is None else 8 if codes.dtype == torch.int8 else 4
    groups = triton.cdiv(n_columns, PLAIN_GROUP) if bits == 16 else scales.shape[1]
    words = PLAIN_GROUP if bits == 16 else codes.shape[1] // groups // 4
    rows, step, _ = partition(sum(len(part[0]) for part in parts), groups, words, bits == 16)
    return Section(parts, bits, rows, groups, words, step, triton.cdiv(triton.cdiv(groups, step), splits))


def _pointers(part: Part, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
