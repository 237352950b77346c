"""Compiled twin of kernels/linear.py: each row of codes is read once for all tokens, and its codes stay codes.

A code of 8 bits counts as two of 4 bits, (code + 128) // 16 and (code + 128) % 16, so that the same dot product serves
both; the activation is in 16-bit fixed point. A line of codes is 64 columns at 8 bits and 128 at 4; what an activation
has beside it is laid out by `_lay_out`: high and low bytes that meet the codes, at 4 bits those that meet the upper
halves, then 16 scales and 16 sums.

Legend as there; a piece of work is ROWS rows.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, float32, njit

from kernels.cpu.activation import LARGEST, scale_of
from kernels.cpu.dots import DOTS
from kernels.cpu.rows import EVERY_BYTE, FLOATS, LINE, WORDS
from kernels.cpu.threads import address, claim, fields, pointer, run, task
from kernels.cpu.vectors import INT32, LANES, Code, Value, in_vectors, joined, vector
from kernels.linear import MOST_TOKENS, columns

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


@njit("void(float32[:,::1], boolean, int8[:,:,::1], float32[:,:,::1], int32[:,:,::1])", cache=True, nogil=True)
def _lay_out(x, eight_bits, blocks, floats, ints):
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


RECORD = fields("tokens rows columns eight_bits codes code_bytes scales scale_bytes x x_bytes out")


@task
def _linear(table):
    a = carray(pointer(table), 1, RECORD)[0]
    out = carray(pointer(a.out), (a.tokens, a.rows), float32)
    piece = claim(table)
    while piece < a.n_pieces:
        for row in range(piece * ROWS, min(piece * ROWS + ROWS, a.rows)):
            codes, scales = a.codes + row * a.code_bytes, a.scales + row * a.scale_bytes
            for t in range(a.tokens):
                x = a.x + t * a.x_bytes
                if a.eight_bits:
                    out[t, row] = row8(codes, scales, x, a.columns // 64)
                else:
                    out[t, row] = row4(codes, scales, x, a.columns // 128, a.columns // 64 % 2)
        piece = claim(table)


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As kernels.linear.linear."""
    tokens, n = x.shape
    if n % GROUP or scales.shape[1] * GROUP != n or scales.dtype != torch.float16 or not x.is_floating_point():
        return NotImplemented
    assert len(x) <= MOST_TOKENS and n == columns(codes), (x.shape, codes.shape)
    codes, scales, eight_bits = codes.contiguous(), scales.contiguous(), codes.dtype == torch.int8
    blocks = np.empty((tokens, -(-n // (GROUP if eight_bits else 2 * GROUP)), BLOCK), np.int8)
    values = x.detach().float().contiguous().numpy()
    _lay_out(values, eight_bits, blocks, blocks.view(np.float32), blocks.view(np.int32))
    out = torch.empty(tokens, len(codes))
    run(_linear, RECORD, -(-len(codes) // ROWS), codes.nbytes, tokens=tokens, rows=len(codes), columns=n,
        eight_bits=eight_bits, codes=address(codes), code_bytes=codes.stride(0), scales=address(scales),
        scale_bytes=scales[0].numel() * 2 if len(scales) else 0, x=blocks.ctypes.data, x_bytes=blocks[0].nbytes,
        out=address(out))
    return (out if bias is None else out + bias.detach().float()).to(x.dtype)
