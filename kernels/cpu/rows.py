"""Dot products of packed rows with an activation: 256 codes at a time, which are 64 bytes of a plane of 2-bit codes.

An activation is laid out for it (`activation.blocks`): for every 256 elements the bytes that meet the codes' four
shifts, in 8 bits or in 16 as a high and a low half, then 16 scales and 16 sums, one for each word of the plane.
Each lane adds scale * codes . x + offset * sum(x) of its words in float32; a row leaves its 16 lanes in a line, and the
lines of 16 rows are added up together (`add_lines`). Gate and up, whose rows lie one behind the other, share what is
loaded of the activation.
"""
from __future__ import annotations

from collections.abc import Callable

from kernels.cpu.dots import DOTS
from kernels.cpu.vectors import FLOAT, INT32, LANES, Code, Value, in_vectors, totals, vector

WORDS, FLOATS = vector(INT32), vector(FLOAT)
CODES = 256                             # of a block
LINE = 64                               # bytes: a block's words, and a cache line
BLOCK8, BLOCK16 = 6 * LINE, 10 * LINE   # bytes of an activation's block: codes, scales, sums
EVERY_BYTE = 0x01010101
GROUPS = (64, 128)                      # codes that share a scale
AT_ONCE = 8 if DOTS.parts == 1 else 4   # tokens that share a code's register: as many sums as there are registers for


def scale_and_offset(code: Code, pairs: Value, group: int) -> tuple[Value, Value]:
    """(scale, offset) of a block's two or four groups, for each of its 16 words."""
    n = CODES // group
    both = code.halves(pairs, 2 * n)
    order = [2 * (lane * n // LANES) for lane in range(LANES)]
    return both.pick(order), both.pick([at + 1 for at in order])


def add_block(code: Code, total: Value, sums: Value, pairs: Value, x: Value, group: int) -> Value:
    """total + the block's share, lane by lane. sums: whole numbers; x: address of the block's scales."""
    scale, offset = scale_and_offset(code, pairs, group)
    total = code.multiply_add(scale * code.load(x, FLOATS), sums.to_float(), total)
    return code.multiply_add(offset, code.load(x + LINE, FLOATS), total)


def two_bits(plane: Value, shift: int) -> Value:
    return plane >> 2 * shift & 3 * EVERY_BYTE


@in_vectors("void(i64, i64)")
def ask_for(code: Code, address: Value, n_bytes: Value) -> None:
    """Bytes that are needed soon, into the second cache. Any address will do."""
    with code.loop(n_bytes + (LINE - 1) >> 6) as line:
        code.prefetch(address + line * LINE)


@in_vectors("void(i64, i64)")
def add_lines(code: Code, lines: Value, out: Value) -> None:
    """The sums of 16 lines, float32 [16]."""
    code.store(totals([code.load(lines + i * LINE, FLOATS) for i in range(LANES)]), out)


def _rows(code: Code, group: int, n: int, x: Value, sizes: tuple[int, int], n_blocks: Value, codes: Callable,
          pairs: tuple[Value, Value], out: tuple[Value, Value]) -> None:
    """n rows of n_blocks, whose scales and offsets begin at (the first, and bytes to the next), into lines at the same.
    codes(row, block): four vectors of codes, which meet the four lines, or the four pairs of them, of the activation.
    sizes: bytes of an activation's block, and lines of it before its scales."""
    sums = [code.variable(code.constant(FLOATS, 0.0)) for _ in range(n)]
    block_bytes, n_lines = sizes
    with code.loop(n_blocks) as block:
        at = x + block * block_bytes
        lines = [code.load(at + i * LINE, WORDS) for i in range(n_lines)]
        for row, total in enumerate(sums):
            if n_lines == 4:
                found = DOTS.zero(code)
                for words, line in zip(codes(row, block), lines, strict=True):
                    found = DOTS.add(found, words, line)
                found = DOTS.sums(found)
            else:
                found = DOTS.of_halves(code, list(zip(codes(row, block), lines[:4], lines[4:], strict=True)))
            step = pairs[0] + pairs[1] * row + block * (4 * CODES // group)
            total.set(add_block(code, total.get(), found, step, at + n_lines * LINE, group))
    for row, total in enumerate(sums):
        code.store(total.get(), out[0] + out[1] * row)


SIZES8, SIZES16 = (BLOCK8, 4), (BLOCK16, 8)


def _coarse(code: Code, plane: Value, n_blocks: Value) -> Callable:
    """Rows of 2-bit codes, one behind the other."""
    def codes(row: int, block: Value) -> list[Value]:
        words = code.load(plane + n_blocks * (row * LINE) + block * LINE, WORDS)
        return [two_bits(words, shift) for shift in range(4)]
    return codes


def _fine(code: Code, plane: Value, refine: Value, n_blocks: Value) -> Callable:
    """Of nested 4-bit codes, 4 * plane + refine."""
    def codes(row: int, block: Value) -> list[Value]:
        words, rest = (code.load(at + n_blocks * (row * LINE) + block * LINE, WORDS) for at in (plane, refine))
        return [two_bits(words, shift) << 2 | two_bits(rest, shift) for shift in range(4)]
    return codes


@in_vectors("void(i64, i64, i64, i64, i64, i64, i64) 2", GROUPS)
def score_rows(code: Code, group: int, n: int, plane: Value, pairs: Value, pair_bytes: Value, x: Value, n_blocks: Value,
               out: Value, out_bytes: Value) -> None:
    """n rows of 2-bit codes times 8-bit activations."""
    _rows(code, group, n, x, SIZES8, n_blocks, _coarse(code, plane, n_blocks), (pairs, pair_bytes), (out, out_bytes))


@in_vectors("void(i64, i64, i64, i64, i64, i64, i64) 2", GROUPS)
def coarse_rows(code: Code, group: int, n: int, plane: Value, pairs: Value, pair_bytes: Value, x: Value,
                n_blocks: Value, out: Value, out_bytes: Value) -> None:
    """n rows of 2-bit codes times 16-bit activations."""
    _rows(code, group, n, x, SIZES16, n_blocks, _coarse(code, plane, n_blocks), (pairs, pair_bytes), (out, out_bytes))


@in_vectors("void(i64, i64, i64, i64, i64, i64, i64, i64) 2", GROUPS)
def fine_rows(code: Code, group: int, n: int, plane: Value, refine: Value, pairs: Value, pair_bytes: Value, x: Value,
              n_blocks: Value, out: Value, out_bytes: Value) -> None:
    """n rows of nested 4-bit codes times 16-bit activations."""
    codes = _fine(code, plane, refine, n_blocks)
    _rows(code, group, n, x, SIZES16, n_blocks, codes, (pairs, pair_bytes), (out, out_bytes))


@in_vectors("void(i64, i64, i64, i64, i64, i64, i64, i64) 2", GROUPS, (1, 2, AT_ONCE))
def fine_tokens(code: Code, group: int, n: int, plane: Value, refine: Value, pairs: Value, x: Value, x_bytes: Value,
                n_blocks: Value, out: Value, out_bytes: Value) -> None:
    """One row of nested 4-bit codes times n 16-bit activations; each one's sum is that of `fine_rows`."""
    codes, sums = _fine(code, plane, refine, n_blocks), [code.variable(code.constant(FLOATS, 0.0)) for _ in range(n)]
    with code.loop(n_blocks) as block:
        words, step = codes(0, block), pairs + block * (4 * CODES // group)
        for token, total in enumerate(sums):
            at = x + x_bytes * token + block * BLOCK16
            lines = [code.load(at + i * LINE, WORDS) for i in range(8)]
            found = DOTS.of_halves(code, list(zip(words, lines[:4], lines[4:], strict=True)))
            total.set(add_block(code, total.get(), found, step, at + 8 * LINE, group))
    for token, total in enumerate(sums):
        code.store(total.get(), out + out_bytes * token)
