"""Dot products of packed rows with an activation: 256 codes at a time, which are 64 bytes of a plane of 2-bit codes.

An activation is laid out for it (`activation.blocks`): for every 256 elements the bytes that meet the codes' four
shifts, in 8 bits or in 16 as a high and a low half, then 16 scales and 16 sums, one for each word of the plane.
Each lane adds scale * codes . x + offset * sum(x) of its words in float32, and the lanes are added at the end.
"""
from __future__ import annotations

from kernels.cpu.dots import DOTS
from kernels.cpu.vectors import FLOAT, INT32, LANES, Code, Value, in_vectors, vector

WORDS, FLOATS = vector(INT32), vector(FLOAT)
CODES = 256                             # of a block
LINE = 64                               # bytes: a block's words, and a cache line
BLOCK8, BLOCK16 = 6 * LINE, 10 * LINE   # bytes of an activation's block: codes, scales, sums
EVERY_BYTE = 0x01010101


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


@in_vectors("f32(i64, i64, i64, i64) 1")
def score_row(code: Code, group: int, plane: Value, pairs: Value, x: Value, n_blocks: Value) -> Value:
    """A row of 2-bit codes times 8-bit activations."""
    total = code.variable(code.constant(FLOATS, 0.0))
    with code.loop(n_blocks) as block:
        at, words = x + block * BLOCK8, code.load(plane + block * LINE, WORDS)
        sums = DOTS.zero(code)
        for shift in range(4):
            sums = DOTS.add(sums, two_bits(words, shift), code.load(at + shift * LINE, WORDS))
        step = pairs + block * (4 * CODES // group)
        total.set(add_block(code, total.get(), DOTS.sums(sums), step, at + 4 * LINE, group))
    return total.get().total()


def _sixteen_bits(code: Code, codes: list[Value], x: Value) -> Value:
    """Four times 16 words of codes times the block's 16-bit activations -> int32, below 2**24 each."""
    return DOTS.of_halves(code, [(words, code.load(x + shift * LINE, WORDS), code.load(x + (4 + shift) * LINE, WORDS))
                                 for shift, words in enumerate(codes)])


@in_vectors("f32(i64, i64, i64, i64) 1")
def coarse_row(code: Code, group: int, plane: Value, pairs: Value, x: Value, n_blocks: Value) -> Value:
    """A row of 2-bit codes times 16-bit activations."""
    total = code.variable(code.constant(FLOATS, 0.0))
    with code.loop(n_blocks) as block:
        at, words = x + block * BLOCK16, code.load(plane + block * LINE, WORDS)
        sums = _sixteen_bits(code, [two_bits(words, shift) for shift in range(4)], at)
        step = pairs + block * (4 * CODES // group)
        total.set(add_block(code, total.get(), sums, step, at + 8 * LINE, group))
    return total.get().total()


@in_vectors("f32(i64, i64, i64, i64, i64) 1")
def fine_row(code: Code, group: int, plane: Value, refine: Value, pairs: Value, x: Value, n_blocks: Value) -> Value:
    """A row of nested 4-bit codes, 4 * plane + refine, times 16-bit activations."""
    total = code.variable(code.constant(FLOATS, 0.0))
    with code.loop(n_blocks) as block:
        at = x + block * BLOCK16
        words, rest = code.load(plane + block * LINE, WORDS), code.load(refine + block * LINE, WORDS)
        codes = [two_bits(words, shift) << 2 | two_bits(rest, shift) for shift in range(4)]
        step = pairs + block * (4 * CODES // group)
        total.set(add_block(code, total.get(), _sixteen_bits(code, codes, at), step, at + 8 * LINE, group))
    return total.get().total()
