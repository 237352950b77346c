"""An activation on its way into packed rows: 8 bits for scores, 16 bits for values, in the order of `rows.py`.

What is not a number stays so: a group that holds NaN or infinity gets the scale NaN.
"""
from __future__ import annotations

import torch
from numba import carray, njit

from kernels.activation import LARGEST, widened
from kernels.cpu.dots import DOTS
from kernels.cpu.rows import BLOCK8, BLOCK16, CODES, EVERY_BYTE, FLOATS, GROUPS, LINE, WORDS
from kernels.cpu.threads import Step, address, fields, pack, pointer, task
from kernels.cpu.vectors import FLOAT, INT8, INT32, LANES, Code, Value, in_vectors, joined, vector

Tensor = torch.Tensor



def in_steps(code: Code, x: Value, n: int, largest: int) -> tuple[Value, list[Value]]:
    """A group of n * 16 float32 at an address -> what one step is worth, in 16 lanes, and the group in whole steps,
    -largest..largest. Bits read as whole numbers order sizes, and put what is no number above all that is one."""
    lines = [code.load(x + i * LINE, FLOATS) for i in range(n)]
    top = code.constant(WORDS, 0)
    for line in lines:
        top = code.call("llvm.umax.v16i32", WORDS, top, line.as_type(WORDS) & 0x7FFFFFFF)
    size = code.call("llvm.vector.reduce.umax.v16i32", INT32, top).as_type(FLOAT)
    step = code.call("llvm.maxnum.f32", FLOAT, size, code.constant(FLOAT, 1e-20)) / largest + size * 0.0
    every = code.splat(step)
    return every, [code.rounded(line / every) for line in lines]


def halves_of(whole: list[Value]) -> tuple[list[Value], list[Value]]:
    """16-bit numbers -> signed high and low bytes: 256 * high + low is the number."""
    return [(part + 128).signed_shift(8).to_bytes() for part in whole], [part.to_bytes() for part in whole]


@in_vectors("void(i64, i64, i64) 1", GROUPS)
def _quantize_group(code: Code, group: int, x: Value, codes: Value, scale: Value) -> None:
    every, whole = in_steps(code, x, group // LANES, 127)
    for i, part in enumerate(whole):
        code.store(part.to_bytes(), codes + i * LANES)
    code.store(every.parts(LANES)[0], scale, 4)


@njit("void(int64, int64, int64, int64, int64)", cache=True, nogil=True)
def _quantize(x, n_groups, group, codes, scales):
    for g in range(n_groups):
        _quantize_group(x + 4 * group * g, codes + group * g, scales + 4 * g, group)


def quantize_activation(x: Tensor, group: int, columns: int | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.activation.quantize_activation."""
    assert group in GROUPS, group
    x = widened(x.detach(), columns).float().contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(x.shape[0], x.shape[1] // group, dtype=torch.float32)
    _quantize(address(x), scales.numel(), group, address(codes), address(scales))
    return codes, scales


def _by_shift(words: list[Value]) -> list[Value]:
    """16 words of 16 bytes each -> for every shift its four bytes of each word, a line."""
    fours = [joined(words[at:at + 4]).as_type(WORDS) for at in range(0, LANES, 4)]
    return [joined([fours[at].pick([4 * i + shift for i in range(8)], fours[at + 1]) for at in (0, 2)])
            for shift in range(4)]


def _store_lines(code: Code, lines: list[Value], at: Value) -> None:
    for i, line in enumerate(lines):
        code.store(line, at + i * LINE)


@in_vectors("void(i64, i64, i64) 1", GROUPS)
def _enter8(code: Code, group: int, codes: Value, scales: Value, at: Value) -> None:
    """256 codes int8 and their groups' scales -> a block."""
    lines = _by_shift([code.load(codes + i * LANES, vector(INT8)) for i in range(LANES)])
    n, total = CODES // group, DOTS.zero(code)
    every = code.load(scales, vector(FLOAT, n), 4).pick([lane * n // LANES for lane in range(LANES)])
    for line in lines:
        total = DOTS.add(total, code.constant(WORDS, EVERY_BYTE), line)
    _store_lines(code, [*lines, every, every * DOTS.sums(total).to_float()], at)


@in_vectors("void(i64, i64) 1", GROUPS)
def _enter16(code: Code, group: int, x: Value, at: Value) -> None:
    """256 numbers float32 -> a block."""
    steps, words = [], []
    for first in range(0, CODES, group):
        every, whole = in_steps(code, x + 4 * first, group // LANES, LARGEST)
        steps.append(every.parts(CODES // group)[0])
        words += whole
    every, (high, low) = joined(steps), (_by_shift(half) for half in halves_of(words))
    sums = DOTS.of_halves(code, [(code.constant(WORDS, EVERY_BYTE), *pair) for pair in zip(high, low, strict=True)])
    _store_lines(code, [*high, *low, every, every * sums.to_float()], at)


@njit("void(int64, int64, int64, int64, int64)", cache=True, nogil=True)
def _lay_out8(codes, scales, group, n_blocks, blocks):
    for b in range(n_blocks):
        _enter8(codes + CODES * b, scales + 4 * (CODES // group) * b, blocks + BLOCK8 * b, group)


@njit("void(int64, int64, int64, int64)", cache=True, nogil=True)
def _lay_out16(x, group, n_blocks, blocks):
    for b in range(n_blocks):
        _enter16(x + 4 * CODES * b, blocks + BLOCK16 * b, group)


RECORD = fields("x groups group codes scales blocks8 blocks16")


@task
def _enter(table):
    """One activation as scores want it, where there is room for that, and as values do."""
    a = carray(pointer(table), 1, RECORD)[0]
    n_blocks = a.groups * a.group // CODES
    if a.codes:
        _quantize(a.x, a.groups, a.group, a.codes, a.scales)
        _lay_out8(a.codes, a.scales, a.group, n_blocks, a.blocks8)
    _lay_out16(a.x, a.group, n_blocks, a.blocks16)


def entering(x: Tensor, group: int, scored: bool) -> tuple[Step, Tensor | None, Tensor]:
    """What makes `blocks8` (None unless scored) and `blocks16` of x float32 [1, H], and both."""
    codes = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(1, x.shape[1] // group, dtype=torch.float32)
    eight, sixteen = _blocks(x, BLOCK8) if scored else None, _blocks(x, BLOCK16)
    record = pack(RECORD, 1, x=address(x), groups=scales.numel(), group=group, codes=address(codes) if scored else 0,
                  scales=address(scales), blocks8=address(eight), blocks16=address(sixteen))
    return Step(_enter, record, (x, codes, scales, eight, sixteen), whole=True), eight, sixteen


def blocks8(codes: Tensor, scales: Tensor) -> Tensor:
    """What `score_row` takes of a quantised activation: int8 [T, H/256 * BLOCK8]."""
    codes, scales = codes.contiguous(), scales.contiguous()
    blocks = _blocks(codes, BLOCK8)
    _lay_out8(address(codes), address(scales), codes.shape[1] // scales.shape[1], codes.numel() // CODES,
              address(blocks))
    return blocks


def blocks16(x: Tensor, group: int, columns: int) -> Tensor:
    """What `coarse_row` and `fine_row` take of an activation float32 [T, up to H]: int8 [T, H/256 * BLOCK16]."""
    x = widened(x.detach(), columns).contiguous()
    assert x.dtype == torch.float32, x.dtype
    blocks = _blocks(x, BLOCK16)
    _lay_out16(address(x), group, x.numel() // CODES, address(blocks))
    return blocks


def _blocks(values: Tensor, block_bytes: int) -> Tensor:
    tokens, width = values.shape
    return torch.empty(tokens, width // CODES * block_bytes, dtype=torch.int8)
