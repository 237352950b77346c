"""Compiled twin of kernels/trunk/head.py: all rows by their upper plane, what is left by both planes.

The activation is laid out as for 4-bit codes (linear.py). Rows are scanned TOGETHER and computed one by one, but where
all are wanted; every row has the same bits either way. Of a row's reach the scales are read again, out of the cache.

Legend as there; a piece of work is ROWS rows.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, float32, njit

from kernels.cpu.dots import DOTS
from kernels.cpu.program import Program
from kernels.cpu.rows import FLOATS, LINE, WORDS
from kernels.cpu.threads import Step, address, claim, fields, pack, pointer, task
from kernels.cpu.trunk.linear import BLOCK, GROUP, NIBBLES, ROWS, TOGETHER, entering, high_and_low
from kernels.cpu.vectors import INT32, LANES, Code, Value, in_vectors, joined, totals, vector
from kernels.trunk.head import DEVIATIONS, MOST_BEST, REMAINDER
from kernels.trunk.linear import Matrices

Tensor = torch.Tensor

OTHERS = NIBBLES << 4 & 0xFFFFFFFF
OTHERS -= 1 << 32       # as a signed word
REACH = DEVIATIONS * REMAINDER
RECORD = fields("columns rows n_best given upper lower row_bytes scales scale_bytes blocks squares out reach",
                floats="limit")


def _over_lines(code: Code, n_lines: Value, n_rest: Value, add: object) -> None:
    """add(line, read, scale): of two groups a line, then of half a line where a group is left, behind which nothing
    may be read."""
    def read_half(place: Value) -> Value:
        half = vector(INT32, LANES // 2)
        return joined([code.load(place, half), code.constant(half, 0)])

    with code.loop(n_lines) as line:
        add(line, lambda place: code.load(place, WORDS),
            lambda place: code.halves(place, 2).pick([lane // 8 for lane in range(LANES)]))
    with code.loop(n_rest):
        add(n_lines, read_half, lambda place: code.halves(place, 1).pick([0] * LANES))


@in_vectors("void(i64, i64, i64, i64, i64, i64, i64, i64) 1")
def _scan(code: Code, n: int, upper: Value, row_bytes: Value, scales: Value, scale_bytes: Value, x: Value,
          n_lines: Value, n_rest: Value, out: Value) -> None:
    """n rows by their upper plane -> float32 [n]."""
    rows = [code.variable(code.constant(FLOATS, 0.0)) for _ in range(n)]

    def add(line: Value, read: object, scale_of: object) -> None:
        at = x + line * BLOCK
        even, odd = high_and_low(code, at), high_and_low(code, at + 2 * LINE)
        step, middle = code.load(at + 4 * LINE, FLOATS) * 16.0, code.load(at + 5 * LINE, FLOATS) * -120.5
        for row, total in enumerate(rows):
            place = upper + row_bytes * row + line * LINE
            code.prefetch(place + row_bytes * n)
            words, scale = read(place), scale_of(scales + scale_bytes * row + line * 4)
            whole = DOTS.of_halves(code, [(words & NIBBLES, *even), (words >> 4 & NIBBLES, *odd)])
            total.set(code.multiply_add(scale, code.multiply_add(step, whole.to_float(), middle), total.get()))

    _over_lines(code, n_lines, n_rest, add)
    code.store(totals([total.get() for total in rows]), out)


@in_vectors("void(i64, i64, i64, i64, i64, i64, i64, i64, i64) 1")
def _both(code: Code, n: int, upper: Value, lower: Value, row_bytes: Value, scales: Value, scale_bytes: Value,
          x: Value, n_lines: Value, n_rest: Value, out: Value) -> None:
    """n rows by both planes -> float32 [n]."""
    rows = [code.variable(code.constant(FLOATS, 0.0)) for _ in range(n)]

    def add(line: Value, read: object, scale_of: object) -> None:
        at = x + line * BLOCK
        even, odd = high_and_low(code, at), high_and_low(code, at + 2 * LINE)
        step, middle = code.load(at + 4 * LINE, FLOATS), code.load(at + 5 * LINE, FLOATS) * -128.0
        for row, total in enumerate(rows):
            places = [plane + row_bytes * row + line * LINE for plane in (upper, lower)]
            for place in places:
                code.prefetch(place + row_bytes * n)
            whole = _times(code, *map(read, places), even, odd)
            scale = scale_of(scales + scale_bytes * row + line * 4)
            total.set(code.multiply_add(scale, code.multiply_add(step, whole.to_float(), middle), total.get()))

    _over_lines(code, n_lines, n_rest, add)
    code.store(totals([total.get() for total in rows]), out)


def _times(code: Code, upper: Value, lower: Value, even: tuple[Value, Value], odd: tuple[Value, Value]) -> Value:
    """16 words of either plane times 16-bit activations, codes as 0..255."""
    if DOTS.takes_bytes:
        return DOTS.of_halves(code, [((upper & NIBBLES) << 4 | lower & NIBBLES, *even),
                                     (upper & OTHERS | lower >> 4 & NIBBLES, *odd)])
    high, low = (DOTS.of_halves(code, [(plane & NIBBLES, *even), (plane >> 4 & NIBBLES, *odd)])
                 for plane in (upper, lower))
    return (high << 4) + low


@in_vectors("f32(i64, i64, i64, i64)")
def _reach(code: Code, scales: Value, squares: Value, n_lines: Value, n_rest: Value) -> Value:
    """The sum of squared scales times `squares`, of 16 groups a line; of n_rest more all lanes count the same one."""
    total = code.variable(code.constant(FLOATS, 0.0))

    def add(scale: Value, square: Value) -> None:
        total.set(code.multiply_add(scale * scale, square, total.get()))

    with code.loop(n_lines) as line:
        add(code.halves(scales + line * 2 * LANES, LANES), code.load(squares + line * LINE, FLOATS))
    with code.loop(n_rest) as i:
        add(code.halves(scales + n_lines * 2 * LANES + i * 2, 1).pick([0] * LANES),
            code.load(squares + (n_lines + i) * LINE, FLOATS))
    return totals([total.get()]).only()


@task
def _measure(table):
    """squares: as `_reach` reads them, a group behind the last line in 16 equal parts."""
    a = carray(pointer(table), 1, RECORD)[0]
    given, groups = carray(pointer(a.given), a.columns, float32), a.columns // GROUP
    whole = groups // LANES * LANES
    squares = carray(pointer(a.squares), whole + (groups - whole) * LANES, float32)
    for group in range(groups):
        total = float32(0)
        for i in range(GROUP * group, GROUP * (group + 1)):
            total += given[i] * given[i]
        if group < whole:
            squares[group] = total
        else:
            first = whole + (group - whole) * LANES
            squares[first:first + LANES] = total / float32(LANES)


@njit(cache=True, nogil=True)
def _scan_some(a, row, n, out):
    _scan(a.upper + row * a.row_bytes, a.row_bytes, a.scales + row * a.scale_bytes, a.scale_bytes, a.blocks,
          a.columns // 128, a.columns // GROUP % 2, out, n)


@njit(cache=True, nogil=True)
def _compute_some(a, row, n, out):
    _both(a.upper + row * a.row_bytes, a.lower + row * a.row_bytes, a.row_bytes, a.scales + row * a.scale_bytes,
          a.scale_bytes, a.blocks, a.columns // 128, a.columns // GROUP % 2, out, n)


@task
def _scan_all(table):
    """Nothing where all rows are wanted."""
    a = carray(pointer(table), 1, RECORD)[0]
    reach, groups = carray(pointer(a.reach), a.rows, float32), a.columns // GROUP
    piece = claim(table)
    while piece < a.n_pieces and a.n_best:
        first = piece * ROWS
        last = min(first + ROWS, a.rows)
        together = first + (last - first) // TOGETHER * TOGETHER
        for row in range(first, together, TOGETHER):
            _scan_some(a, row, TOGETHER, a.out + 4 * row)
        for row in range(together, last):
            _scan_some(a, row, 1, a.out + 4 * row)
        for row in range(first, last):
            squared = _reach(a.scales + row * a.scale_bytes, a.squares, groups // LANES, groups % LANES)
            reach[row] = float32(REACH) * math.sqrt(squared)
        piece = claim(table)


@task
def _choose(table):
    """limit: what the n_best-th best row has at least; -inf where all are wanted, or none are numbers."""
    records = carray(pointer(table), 1, RECORD)
    a = records[0]
    scores, reach, n = carray(pointer(a.out), a.rows, float32), carray(pointer(a.reach), a.rows, float32), 0
    limit, best, kept = float32(-np.inf), a.n_best, np.empty(2 * MOST_BEST, np.float32)
    for row in range(a.rows if best else 0):
        least = scores[row] - reach[row]
        if least > limit:
            kept[n] = least
            n += 1
            if n == 2 * best:
                kept[:n].sort()
                kept[:best] = kept[best:n].copy()
                n, limit = best, kept[0]
    if best and n >= best:
        kept[:n].sort()
        limit = kept[n - best]
    records[0].limit = limit


@task
def _compute(table):
    a = carray(pointer(table), 1, RECORD)[0]
    out, reach = (carray(pointer(a.out), a.rows, float32), carray(pointer(a.reach), a.rows, float32))
    piece = claim(table)
    while piece < a.n_pieces:
        first = piece * ROWS
        last = min(first + ROWS, a.rows)
        together = first if a.n_best else first + (last - first) // TOGETHER * TOGETHER
        for row in range(first, together, TOGETHER):
            _compute_some(a, row, TOGETHER, a.out + 4 * row)
        for row in range(together, last):
            if not a.n_best or not (out[row] + reach[row] < a.limit):   # no number stays
                _compute_some(a, row, 1, a.out + 4 * row)
            else:
                out[row] = -np.inf
        piece = claim(table)


def takes(head: Matrices) -> bool:
    """Whether the head is one that is computed here."""
    codes, scales, bias = head.parts[0]
    return (head.is_nested and len(head.parts) == 1 and bias is None and codes.stride(2) == 1
            and scales.dtype == torch.float16 and scales.is_contiguous() and head.columns == GROUP * scales.shape[1])


def finding(x: Tensor, head: Matrices, out: Tensor, n_best: int = 0, norm: Tensor | None = None, epsilon: float = 0.0,
            given: Tensor | None = None) -> list[Step]:
    """The steps of `best_rows` for a head that `takes` takes, into out float32 [R]; given [1, K]: room for what a norm
    makes. n_best may be set later: it is in the record of all steps but the first."""
    codes, scales, _ = head.parts[0]
    (rows, n), groups = (len(codes), head.columns), scales.shape[1]
    enter, blocks = entering(x, n, norm, epsilon, given)
    squares = torch.empty(groups // LANES * LANES + groups % LANES * LANES, dtype=torch.float32)
    reach = torch.empty(rows, dtype=torch.float32)
    n_bytes = codes.nbytes // 2 + scales.nbytes
    packed = pack(RECORD, -(-rows // ROWS), n_bytes, columns=n, rows=rows, n_best=n_best,
                  given=address(x if norm is None else given), upper=address(codes[:, 0]),
                  lower=address(codes[:, 1]), row_bytes=codes.stride(0), scales=address(scales),
                  scale_bytes=2 * groups, blocks=address(blocks), squares=address(squares), out=address(out),
                  reach=address(reach), limit=0.0)
    alive = (x, head, out, norm, given, blocks, squares, reach)
    return [enter, Step(_measure, packed, alive, whole=True), Step(_scan_all, packed, alive),
            Step(_choose, packed, alive, whole=True), Step(_compute, packed, alive)]


def best_rows(x: Tensor, head: Matrices, n_best: int | Tensor, norm: Tensor | None = None, epsilon: float = 0.0,
              ) -> Tensor:
    """As kernels.trunk.head.best_rows; what a device would be told by a tensor is left to the reference."""
    if isinstance(n_best, Tensor) or not takes(head):
        return NotImplemented
    assert x.shape == (1, head.columns) and 0 <= n_best <= MOST_BEST, (x.shape, n_best)
    out, given = torch.empty(head.rows, dtype=torch.float32), None if norm is None else torch.empty_like(x)
    Program(finding(x.contiguous(), head, out, n_best, norm, epsilon, given)).run()
    return out
