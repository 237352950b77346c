"""Compiled twin of kernels/trunk/linear.py: each row of codes is read once for all tokens, and its codes stay codes.

A code of 8 bits counts as two of 4 bits, (code + 128) // 16 and (code + 128) % 16, so that the same dot product serves
both; the activation is in 16-bit fixed point. A line of codes is 64 columns at 8 bits and 128 at 4; what an activation
has beside it is laid out by `_lay_out`: high and low bytes that meet the codes, at 4 bits those that meet the upper
halves, then 16 scales and 16 sums.

Legend as there; a piece of work is ROWS rows.
"""
from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import carray, float32, int8, int32, int64, njit

from kernels.cpu.activation import LARGEST, scale_of
from kernels.cpu.dots import DOTS
from kernels.cpu.rows import EVERY_BYTE, FLOATS, LINE, WORDS
from kernels.cpu.threads import address, call, claim, fields, pack, pointer, task
from kernels.cpu.vectors import INT32, LANES, Code, Value, in_vectors, joined, vector
from kernels.trunk.linear import MOST_TOKENS, Matrices, columns

Tensor = torch.Tensor

ROWS = 32
GROUP = 64
BLOCK = 6 * LINE    # bytes of an activation beside a line of codes: four times bytes, scales, sums
NIBBLES = 15 * EVERY_BYTE
PLUS_128 = (128 * EVERY_BYTE) - 2**32   # the sign of each byte turned


def _dot16(code: Code, nibbles: Value, x: Value) -> Value:
    """16 words of codes 0..15 times 16-bit activations, whose low bytes lie a line behind the high ones."""
    high, low = (DOTS.sums(DOTS.add(DOTS.zero(code), nibbles, code.load(x + at, WORDS))) for at in (0, LINE))
    return (high << 8) + low


@in_vectors("f32(i64, i64, i64, i64)")
def row8(code: Code, codes: Value, scales: Value, x: Value, n_lines: Value) -> Value:
    """A row of 8-bit codes times an activation; a line is one group."""
    total = code.variable(code.constant(FLOATS, 0.0))
    with code.loop(n_lines) as line:
        at, step = x + line * BLOCK, scales + line * 2
        words = code.load(codes + line * LINE, WORDS) ^ PLUS_128
        whole = (_dot16(code, words >> 4 & NIBBLES, at) << 4) + _dot16(code, words & NIBBLES, at)
        scale = code.halves(step, 1).pick([0] * LANES)
        whole = (whole - code.load(at + 5 * LINE, WORDS)).to_float()
        total.set(code.multiply_add(scale * code.load(at + 4 * LINE, FLOATS), whole, total.get()))
    return total.get().total()


@in_vectors("f32(i64, i64, i64, i64, i64)")
def row4(code: Code, codes: Value, pairs: Value, x: Value, n_lines: Value, n_rest: Value) -> Value:
    """A row of 4-bit codes times an activation; a line is two groups, and n_rest is 1 where one group is left."""
    total = code.variable(code.constant(FLOATS, 0.0))

    def add(line: Value, words: Value, both: Value) -> None:
        at = x + line * BLOCK
        even, odd = _dot16(code, words & NIBBLES, at), _dot16(code, words >> 4 & NIBBLES, at + 2 * LINE)
        scale, offset = (both.pick([2 * (lane // 8) + i for lane in range(LANES)]) for i in range(2))
        found = code.multiply_add(scale * code.load(at + 4 * LINE, FLOATS), (even + odd).to_float(), total.get())
        total.set(code.multiply_add(offset, code.load(at + 5 * LINE, FLOATS), found))

    with code.loop(n_lines) as line:
        add(line, code.load(codes + line * LINE, WORDS), code.halves(pairs + line * 8, 4))
    half = vector(INT32, LANES // 2)
    with code.loop(n_rest):     # what lies behind a row may be nobody's
        words = joined([code.load(codes + n_lines * LINE, half), code.constant(half, 0)])
        both = code.halves(pairs + n_lines * 8, 2)
        add(n_lines, words, joined([both, both]))
    return total.get().total()


@in_vectors("f32(i64, i64, i64)")
def row32(code: Code, weights: Value, x: Value, n_lines: Value) -> Value:
    """A row of float32 times an activation of the same kind; a line is 16 columns."""
    total = code.variable(code.constant(FLOATS, 0.0))
    with code.loop(n_lines) as line:
        at = line * LINE
        total.set(code.multiply_add(code.load(weights + at, FLOATS), code.load(x + at, FLOATS), total.get()))
    return total.get().total()


@njit(cache=True, nogil=True)
def lay_out(x, eight_bits, blocks, floats, ints):
    """x float32 [T, K] -> blocks int8 [T, lines, BLOCK], which floats and ints view as 32 bits."""
    blocks[:] = 0
    for t in range(len(x)):
        for group in range(x.shape[1] // GROUP):
            first = group * GROUP
            scale = scale_of(x[t, first:first + GROUP], LARGEST)
            usable = math.isfinite(scale)
            line, lane, lanes = (group, 0, 16) if eight_bits else (group // 2, group % 2 * 8, 8)
            for i in range(GROUP):
                code = np.int32(np.rint(x[t, first + i] / scale)) if usable else np.int32(0)
                byte = i if eight_bits else 32 * (group % 2) + i // 2
                at = byte if eight_bits else byte + 2 * LINE * (i % 2)
                high = (code + 128) >> 8
                blocks[t, line, at], blocks[t, line, LINE + at] = high, code - high * 256
                if eight_bits:
                    ints[t, line, 5 * 16 + byte // 4] += 128 * code
                else:
                    floats[t, line, 5 * 16 + byte // 4] += code
            for i in range(lane, lane + lanes):
                floats[t, line, 4 * 16 + i] = scale
                if not eight_bits:
                    floats[t, line, 5 * 16 + i] *= scale


RECORD = fields("tokens columns x norm given blocks8 bytes8 blocks4 bytes4 matrices n_matrices out out_row residual",
                floats="epsilon")
KIND, N_ROWS, CODES, CODE_BYTES, SCALES, SCALE_BYTES, BIAS, FIRST, PIECE = range(9)    # of a row of the matrices' table


@task
def _prepare(table):
    """The norm, and the activation as the matrices' kinds want it."""
    a = carray(pointer(table), 1, RECORD)[0]
    shape = (a.tokens, a.columns)
    x = carray(pointer(a.x), shape, float32)
    if a.norm:
        normed, norm = carray(pointer(a.given), shape, float32), carray(pointer(a.norm), a.columns, float32)
        for t in range(a.tokens):
            total = float32(0)
            for i in range(a.columns):
                total += x[t, i] * x[t, i]
            one = float32(1) / math.sqrt(total / float32(a.columns) + a.epsilon)
            for i in range(a.columns):
                normed[t, i] = norm[i] * (x[t, i] * one)
        x = normed
    for blocks, n_bytes, eight_bits in ((a.blocks8, a.bytes8, True), (a.blocks4, a.bytes4, False)):
        if blocks:
            n_lines, at = n_bytes // BLOCK, pointer(blocks)
            lay_out(x, eight_bits, carray(at, (a.tokens, n_lines, BLOCK), int8),
                    carray(at, (a.tokens, n_lines, BLOCK // 4), float32),
                    carray(at, (a.tokens, n_lines, BLOCK // 4), int32))


@njit(cache=True, nogil=True)
def _product(matrix, row, t, a):
    codes, scales = matrix[CODES] + row * matrix[CODE_BYTES], matrix[SCALES] + row * matrix[SCALE_BYTES]
    if matrix[KIND] == 8:
        return row8(codes, scales, a.blocks8 + t * a.bytes8, a.columns // 64)
    if matrix[KIND] == 4:
        return row4(codes, scales, a.blocks4 + t * a.bytes4, a.columns // 128, a.columns // 64 % 2)
    return row32(codes, a.given + t * 4 * a.columns, a.columns // LANES)


@task
def _multiply(table):
    a = carray(pointer(table), 1, RECORD)[0]
    matrices = carray(pointer(a.matrices), (a.n_matrices, PIECE + 1), int64)
    out = carray(pointer(a.out), (a.tokens, a.out_row), float32)
    residual = carray(pointer(a.residual), (a.tokens, a.out_row), float32)
    piece = claim(table)
    while piece < a.n_pieces:
        at = 0
        while at + 1 < a.n_matrices and matrices[at + 1, PIECE] <= piece:
            at += 1
        matrix = matrices[at]
        first, bias = (piece - matrix[PIECE]) * ROWS, carray(pointer(matrix[BIAS]), matrix[N_ROWS], float32)
        for row in range(first, min(first + ROWS, matrix[N_ROWS])):
            column = matrix[FIRST] + row
            for t in range(a.tokens):
                found = _product(matrix, row, t, a)
                if matrix[BIAS]:
                    found += bias[row]
                if a.residual:
                    found = residual[t, column] + found
                out[t, column] = found
        piece = claim(table)


def _kind(codes: Tensor) -> int:
    return {torch.int8: 8, torch.uint8: 4}.get(codes.dtype, 32)


_known: WeakKeyDictionary[Matrices, tuple] = WeakKeyDictionary()    # what is told of matrices, as long as they live


def _table(matrices: Matrices) -> tuple[np.ndarray, int, frozenset[int]]:
    """The matrices' addresses, the number of pieces, and their kinds."""
    rows, first, piece = [], 0, 0
    for codes, scales, bias in matrices.parts:
        scale_bytes = 0 if scales is None else scales.stride(0) * 2
        rows.append((_kind(codes), len(codes), address(codes), codes.stride(0) * codes.element_size(), address(scales),
                     scale_bytes, address(bias), first, piece))
        first, piece = first + len(codes), piece - (-len(codes) // ROWS)
    return np.array(rows, np.int64).reshape(-1, PIECE + 1), piece, frozenset(row[KIND] for row in rows)


def takes(matrices: Matrices) -> bool:
    """Whether every matrix is one that is computed here."""
    n = matrices.columns
    return n % GROUP == 0 and all(
        (codes.dtype == torch.float32 and codes.shape[1] == n and codes.is_contiguous()) if scales is None else
        (scales.dtype == torch.float16 and scales.shape[1] * GROUP == n and codes.is_contiguous()
         and scales.is_contiguous()) for codes, scales, _ in matrices.parts)


def linears(x: Tensor, matrices: Matrices, norm: Tensor | None = None, epsilon: float = 0.0,
            residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.linear.linears."""
    known = _known.get(matrices)
    if known is None:
        known = _known[matrices] = _table(matrices) if takes(matrices) else ()
    if not known:
        return NotImplemented
    table, n_pieces, kinds = known
    tokens, n = x.shape
    given = x if norm is None else torch.empty_like(x)
    lines8, lines4 = (n // GROUP if 8 in kinds else 0), (-(-n // (2 * GROUP)) if 4 in kinds else 0)
    blocks8, blocks4 = (torch.empty(tokens, lines * BLOCK, dtype=torch.int8) for lines in (lines8, lines4))
    out = torch.empty(tokens, matrices.rows, dtype=torch.float32)
    packed = pack(RECORD, n_pieces, tokens=tokens, columns=n, x=address(x), norm=address(norm), given=address(given),
                  blocks8=address(blocks8), bytes8=lines8 * BLOCK, blocks4=address(blocks4), bytes4=lines4 * BLOCK,
                  matrices=table.ctypes.data, n_matrices=len(table), out=address(out), out_row=matrices.rows,
                  residual=address(residual), epsilon=epsilon)
    call(_prepare, packed)
    call(_multiply, packed, n_pieces, matrices.n_bytes)
    return out, given


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As kernels.trunk.linear.linear."""
    assert len(x) <= MOST_TOKENS and x.shape[1] == columns(codes), (x.shape, codes.shape)
    if not x.is_floating_point():
        return NotImplemented
    bias = None if bias is None else bias.detach().float().contiguous()
    found = linears(x.detach().float().contiguous(), Matrices(((codes.contiguous(), scales.contiguous(), bias),)))
    return found if found is NotImplemented else found[0].to(x.dtype)
