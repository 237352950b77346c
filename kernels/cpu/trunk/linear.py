"""Compiled twin of kernels/trunk/linear.py: each row of codes is read once for all tokens, and its codes stay codes.

A code of 8 bits is read as code + 128; where a processor's dot product takes no more than 4 bits, as two of them. The
activation is in 16-bit fixed point. A line of codes is 64 columns at 8 bits and 128 at 4; what an activation has
beside it is laid out by `lay_out`: high and low bytes that meet the codes, at 4 bits those that meet the upper halves,
then 16 scales and 16 sums. TOGETHER rows share what is loaded of the activation, and ask for the lines of the next
ones: without that the processor stops at every page.

Legend as there; a piece of work is ROWS rows.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import carray, float32, int8, int64, njit

from kernels.activation import LARGEST
from kernels.cpu.activation import halves_of, in_steps
from kernels.cpu.dots import DOTS
from kernels.cpu.rows import EVERY_BYTE, FLOATS, LINE, WORDS
from kernels.cpu.threads import Step, address, call, claim, fields, pack, pointer, task
from kernels.cpu.vectors import INT32, LANES, Code, Value, Variable, in_vectors, joined, totals, vector
from kernels.trunk.linear import MOST_TOKENS, Matrices, columns

Tensor = torch.Tensor

ROWS = 32
TOGETHER = 4        # rows
GROUP = 64
BLOCK = 6 * LINE    # bytes of an activation beside a line of codes: four times bytes, scales, sums
NIBBLES = 15 * EVERY_BYTE
PLUS_128 = (128 * EVERY_BYTE) - 2**32   # the sign of each byte turned


def high_and_low(code: Code, x: Value) -> tuple[Value, Value]:
    """High and low bytes, which lie a line apart."""
    return code.load(x, WORDS), code.load(x + LINE, WORDS)


@in_vectors("void(i64, i64, i64, i64, i64, i64, i64) 1")
def rows8(code: Code, n: int, codes: Value, code_bytes: Value, scales: Value, scale_bytes: Value, x: Value,
          n_lines: Value, out: Value) -> None:
    """n rows of 8-bit codes times an activation -> float32 [n]; a line is one group."""
    rows = [code.variable(code.constant(FLOATS, 0.0)) for _ in range(n)]
    with code.loop(n_lines) as line:
        at = x + line * BLOCK
        halves, step, less = high_and_low(code, at), code.load(at + 4 * LINE, FLOATS), code.load(at + 5 * LINE, WORDS)
        for row, total in enumerate(rows):
            place = codes + code_bytes * row + line * LINE
            code.prefetch(place + code_bytes * n)
            words = code.load(place, WORDS) ^ PLUS_128
            scale = code.halves(scales + scale_bytes * row + line * 2, 1).pick([0] * LANES)
            whole = _bytes_times(code, words, halves) - less
            total.set(code.multiply_add(scale * step, whole.to_float(), total.get()))
    _store(code, rows, out)


def _bytes_times(code: Code, words: Value, halves: tuple[Value, Value]) -> Value:
    """16 words of codes 0..255 times 16-bit activations."""
    if DOTS.takes_bytes:
        return DOTS.of_halves(code, [(words, *halves)])
    high, low = (DOTS.of_halves(code, [(part & NIBBLES, *halves)]) for part in (words >> 4, words))
    return (high << 4) + low


def _store(code: Code, lines: list[Variable], out: Value) -> None:
    code.store(totals([line.get() for line in lines]), out)


@in_vectors("void(i64, i64, i64, i64, i64, i64, i64, i64) 1")
def rows4(code: Code, n: int, codes: Value, code_bytes: Value, pairs: Value, pair_bytes: Value, x: Value,
          n_lines: Value, n_rest: Value, out: Value) -> None:
    """n rows of 4-bit codes times an activation -> float32 [n]; a line is two groups, and n_rest is 1 where one group
    is left."""
    rows = [code.variable(code.constant(FLOATS, 0.0)) for _ in range(n)]

    def add(line: Value, read: Callable[[Value, Value], tuple[Value, Value]]) -> None:
        at = x + line * BLOCK
        even, odd, step, sums = high_and_low(code, at), high_and_low(code, at + 2 * LINE), *(
            code.load(at + part * LINE, FLOATS) for part in (4, 5))
        for row, total in enumerate(rows):
            place = codes + code_bytes * row + line * LINE
            code.prefetch(place + code_bytes * n)
            words, both = read(place, pairs + pair_bytes * row + line * 8)
            whole = DOTS.of_halves(code, [(words & NIBBLES, *even), (words >> 4 & NIBBLES, *odd)])
            scale, offset = (both.pick([2 * (lane // 8) + i for lane in range(LANES)]) for i in range(2))
            found = code.multiply_add(scale * step, whole.to_float(), total.get())
            total.set(code.multiply_add(offset, sums, found))

    def read_half(place: Value, pair: Value) -> tuple[Value, Value]:
        """What lies behind a row may be nobody's."""
        half, both = vector(INT32, LANES // 2), code.halves(pair, 2)
        return joined([code.load(place, half), code.constant(half, 0)]), joined([both, both])

    with code.loop(n_lines) as line:
        add(line, lambda place, pair: (code.load(place, WORDS), code.halves(pair, 4)))
    with code.loop(n_rest):
        add(n_lines, read_half)
    _store(code, rows, out)


@in_vectors("void(i64, i64, i64, i64, i64) 1")
def rows32(code: Code, n: int, weights: Value, row_bytes: Value, x: Value, n_lines: Value, out: Value) -> None:
    """n rows of float32 times an activation of the same kind -> float32 [n]; a line is 16 columns."""
    rows = [code.variable(code.constant(FLOATS, 0.0)) for _ in range(n)]
    with code.loop(n_lines) as line:
        given = code.load(x + line * LINE, FLOATS)
        for row, total in enumerate(rows):
            place = weights + row_bytes * row + line * LINE
            code.prefetch(place + row_bytes * n)
            total.set(code.multiply_add(code.load(place, FLOATS), given, total.get()))
    _store(code, rows, out)


@in_vectors("void(i64, i64)")
def _enter8(code: Code, x: Value, at: Value) -> None:
    """64 numbers -> a line's activation at `at`."""
    every, whole = in_steps(code, x, GROUP // LANES, LARGEST)
    high, low = (joined(half).as_type(WORDS) for half in halves_of(whole))
    sums = DOTS.of_halves(code, [(code.constant(WORDS, EVERY_BYTE), high, low)]) << 7   # 128 of each code are no weight
    for i, part in ((0, high), (1, low), (4, every), (5, sums)):
        code.store(part, at + i * LINE)


@in_vectors("void(i64, i64)")
def _enter4(code: Code, x: Value, at: Value) -> None:
    """64 numbers -> half a line's activation at `at`."""
    half, terms = vector(INT32, LANES // 2), []
    every, whole = in_steps(code, x, GROUP // LANES, LARGEST)
    for odd in range(2):
        order = list(range(odd, 2 * LANES, 2))
        columns = [first.pick(order, second) for first, second in (whole[:2], whole[2:])]
        halves = [joined(parts).as_type(half) for parts in halves_of(columns)]
        for i, part in enumerate(halves):
            code.store(part, at + (2 * odd + i) * LINE)
        terms.append((code.constant(WORDS, EVERY_BYTE), *(joined([part, code.constant(half, 0)]) for part in halves)))
    sums = DOTS.of_halves(code, terms).to_float() * every
    for i, part in ((4, every), (5, sums)):
        code.store(part.parts(2)[0], at + i * LINE)


@njit(cache=True, nogil=True)
def lay_out(x, columns, eight_bits, blocks):
    """x float32 [columns] -> what the rows take of it. Addresses."""
    for group in range(columns // GROUP):
        at = x + 4 * GROUP * group
        if eight_bits:
            _enter8(at, blocks + group * BLOCK)
        else:
            _enter4(at, blocks + group // 2 * BLOCK + group % 2 * (LINE // 2))


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
    given = a.given if a.norm else a.x
    for blocks, n_bytes, eight_bits in ((a.blocks8, a.bytes8, True), (a.blocks4, a.bytes4, False)):
        for t in range(a.tokens if blocks else 0):
            row = blocks + t * n_bytes
            if not eight_bits:      # half a line may be nobody's
                carray(pointer(row + n_bytes - BLOCK), BLOCK, int8)[:] = 0
            lay_out(given + 4 * t * a.columns, a.columns, eight_bits, row)


@njit(cache=True, nogil=True)
def _products(matrix, row, t, a, n, out):
    """n rows from `row` on times token t -> float32 [n] at an address; n is compiled in."""
    codes, scales = matrix[CODES] + row * matrix[CODE_BYTES], matrix[SCALES] + row * matrix[SCALE_BYTES]
    if matrix[KIND] == 8:
        rows8(codes, matrix[CODE_BYTES], scales, matrix[SCALE_BYTES], a.blocks8 + t * a.bytes8, a.columns // 64, out, n)
    elif matrix[KIND] == 4:
        rows4(codes, matrix[CODE_BYTES], scales, matrix[SCALE_BYTES], a.blocks4 + t * a.bytes4, a.columns // 128,
              a.columns // 64 % 2, out, n)
    else:
        rows32(codes, matrix[CODE_BYTES], a.given + t * 4 * a.columns, a.columns // LANES, out, n)


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
        first = (piece - matrix[PIECE]) * ROWS
        last, column = min(first + ROWS, matrix[N_ROWS]), matrix[FIRST]
        bias = carray(pointer(matrix[BIAS]), matrix[N_ROWS], float32)
        together = first + (last - first) // TOGETHER * TOGETHER
        for row in range(first, together, TOGETHER):
            for t in range(a.tokens):
                _products(matrix, row, t, a, TOGETHER, a.out + 4 * (t * a.out_row + column + row))
        for row in range(together, last):
            for t in range(a.tokens):
                _products(matrix, row, t, a, 1, a.out + 4 * (t * a.out_row + column + row))
        for t in range(a.tokens):
            for row in range(first, last):
                found = out[t, column + row]
                if matrix[BIAS]:
                    found += bias[row]
                if a.residual:
                    found = residual[t, column + row] + found
                out[t, column + row] = found
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
    return n % GROUP == 0 and not matrices.is_nested and all(
        (codes.dtype == torch.float32 and codes.shape[1] == n and codes.is_contiguous()) if scales is None else
        (scales.dtype == torch.float16 and scales.shape[1] * GROUP == n and codes.is_contiguous()
         and scales.is_contiguous()) for codes, scales, _ in matrices.parts)


def linears(x: Tensor, matrices: Matrices, norm: Tensor | None = None, epsilon: float = 0.0,
            residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.linear.linears."""
    if not _told(matrices):
        return NotImplemented
    given = x if norm is None else torch.empty_like(x)
    out = torch.empty(len(x), matrices.rows, dtype=torch.float32)
    for step in multiplying(x, matrices, out, norm, epsilon, residual, given):
        call(step)
    return out, given


def _told(matrices: Matrices) -> tuple:
    """As `_table`, made once; () for what is not computed here."""
    known = _known.get(matrices)
    if known is None:
        known = _known[matrices] = _table(matrices) if takes(matrices) else ()
    return known


def multiplying(x: Tensor, matrices: Matrices, out: Tensor, norm: Tensor | None = None, epsilon: float = 0.0,
                residual: Tensor | None = None, given: Tensor | None = None) -> list[Step]:
    """The steps of `linears` for matrices that `takes` takes, from x float32 [T, K] into out; given [T, K]: room for
    what a norm makes."""
    table, n_pieces, kinds = _told(matrices)
    tokens, n = x.shape
    given = x if norm is None else given
    lines8, lines4 = (n // GROUP if 8 in kinds else 0), (-(-n // (2 * GROUP)) if 4 in kinds else 0)
    blocks8, blocks4 = (torch.empty(tokens, lines * BLOCK, dtype=torch.int8) for lines in (lines8, lines4))
    packed = pack(RECORD, n_pieces, matrices.n_bytes, tokens=tokens, columns=n, x=address(x), norm=address(norm),
                  given=address(given), blocks8=address(blocks8), bytes8=lines8 * BLOCK, blocks4=address(blocks4),
                  bytes4=lines4 * BLOCK, matrices=table.ctypes.data, n_matrices=len(table), out=address(out),
                  out_row=matrices.rows, residual=address(residual), epsilon=epsilon)
    alive = (x, matrices, out, norm, residual, given, blocks8, blocks4, table)
    return [Step(_prepare, packed, alive, whole=True), Step(_multiply, packed, alive)]


def entering(x: Tensor, n: int, norm: Tensor | None, epsilon: float, given: Tensor | None) -> tuple[Step, Tensor]:
    """The step that brings x float32 [1, n], or its norm, into the order of 4-bit codes, and where it lies then."""
    lines = -(-n // (2 * GROUP))
    blocks = torch.empty(lines * BLOCK, dtype=torch.int8)
    packed = pack(RECORD, 1, 0, tokens=1, columns=n, x=address(x), norm=address(norm), given=address(given), blocks8=0,
                  bytes8=0, blocks4=address(blocks), bytes4=lines * BLOCK, matrices=0, n_matrices=0, out=0, out_row=0,
                  residual=0, epsilon=epsilon)
    return Step(_prepare, packed, (x, norm, given, blocks), whole=True), blocks


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As kernels.trunk.linear.linear."""
    assert len(x) <= MOST_TOKENS and x.shape[1] == columns(codes), (x.shape, codes.shape)
    if not x.is_floating_point():
        return NotImplemented
    bias = None if bias is None else bias.detach().float().contiguous()
    found = linears(x.detach().float().contiguous(), Matrices(((codes.contiguous(), scales.contiguous(), bias),)))
    return found if found is NotImplemented else found[0].to(x.dtype)
