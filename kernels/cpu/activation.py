"""An activation on its way into packed rows: 8 bits for scores, 16 bits for values, in the order of `rows.py`.

What is not a number stays so: a group that holds NaN or infinity gets the scale NaN.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numba import njit

from kernels.cpu.rows import BLOCK8, BLOCK16, CODES, FLOATS, LINE, WORDS
from kernels.cpu.vectors import FLOAT, INT32, Code, Value, in_vectors

Tensor = torch.Tensor

LARGEST = 127 * 256 + 127   # so that both halves fit in int8


@njit(cache=True, nogil=True)
def scale_of(x, largest):
    """float32 [n] -> what one step of its codes is worth."""
    top = np.float32(1e-20)
    for value in x:
        size = abs(value)
        if not size <= top:
            top = size
            if not math.isfinite(size):
                return np.float32(math.nan)
    return top / np.float32(largest)


@in_vectors("f32(i64, i64) 1")
def step_of(code: Code, largest: int, x: Value, n_lines: Value) -> Value:
    """As `scale_of`, of 16 * n_lines numbers at an address. Read as whole ones, what is no number is the largest."""
    top = code.variable(code.constant(WORDS, 0))
    with code.loop(n_lines) as line:
        size = code.load(x + line * LINE, WORDS) & 0x7FFFFFFF
        top.set(code.call("llvm.umax.v16i32", WORDS, top.get(), size))
    size = code.call("llvm.vector.reduce.umax.v16i32", INT32, top.get()).as_type(FLOAT)
    return code.call("llvm.maxnum.f32", FLOAT, size, code.constant(FLOAT, 1e-20)) / largest + size * 0.0


def in_halves(code: Code, x: Value, every: Value, n: int) -> list[Value]:
    """n vectors of float32 at an address, in whole steps of `every`: below 2**15 -> int32."""
    return [code.rounded(code.load(x + i * LINE, FLOATS) / every) for i in range(n)]


def high_bytes(whole: Value) -> Value:
    """So that 256 * high + low is the number, both signed."""
    return (whole + 128).signed_shift(8).to_bytes()


@njit("void(float32[:,::1], int64, int8[:,::1], float32[:,::1])", cache=True, nogil=True)
def _quantize(x, group, codes, scales):
    for t in range(len(x)):
        for g in range(scales.shape[1]):
            first = g * group
            scale = scale_of(x[t, first:first + group], 127)
            scales[t, g] = scale
            for at in range(first, first + group):
                code = np.rint(x[t, at] / scale)
                codes[t, at] = np.int8(min(max(code, -127), 127)) if math.isfinite(code) else 0


def quantize_activation(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """As kernels.activation.quantize_activation."""
    x = x.detach().float().contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(x.shape[0], x.shape[1] // group, dtype=torch.float32)
    _quantize(x.numpy(), group, codes.numpy(), scales.numpy())
    return codes, scales


@njit("void(int8[:,::1], float32[:,::1], int8[:,:,::1], float32[:,:,::1])", cache=True, nogil=True)
def _lay_out8(codes, scales, blocks, floats):
    """codes int8 [T, H], scales [T, G] -> blocks int8 [T, B, BLOCK8], which floats views as float32."""
    group = codes.shape[1] // scales.shape[1]
    for t in range(len(codes)):
        for word in range(codes.shape[1] // 16):
            block, lane, total = word // 16, word % 16, 0
            for i in range(16):
                code = codes[t, 16 * word + i]
                blocks[t, block, i // 4 * LINE + 4 * lane + i % 4] = code
                total += code
            scale = scales[t, 16 * word // group]
            floats[t, block, LINE + lane] = scale
            floats[t, block, LINE + 16 + lane] = scale * total


def blocks8(codes: Tensor, scales: Tensor) -> Tensor:
    """What `score_row` takes of a quantised activation: int8 [T, H/256 * BLOCK8]."""
    return _blocks(BLOCK8, _lay_out8, codes.contiguous(), scales.contiguous().numpy())


@njit("void(float32[:,::1], int64, int8[:,:,::1], float32[:,:,::1])", cache=True, nogil=True)
def _lay_out16(x, group, blocks, floats):
    """x float32 [T, H] -> blocks int8 [T, B, BLOCK16], which floats views as float32."""
    for t in range(len(x)):
        for g in range(x.shape[1] // group):
            scale = scale_of(x[t, g * group:(g + 1) * group], LARGEST)
            usable = math.isfinite(scale)
            for word in range(g * group // 16, (g + 1) * group // 16):
                block, lane, total = word // 16, word % 16, 0
                for i in range(16):
                    code = np.int32(np.rint(x[t, 16 * word + i] / scale)) if usable else np.int32(0)
                    high, at = (code + 128) >> 8, i // 4 * LINE + 4 * lane + i % 4
                    blocks[t, block, at] = high
                    blocks[t, block, 4 * LINE + at] = code - high * 256
                    total += code
                floats[t, block, 2 * LINE + lane] = scale
                floats[t, block, 2 * LINE + 16 + lane] = scale * total


def blocks16(x: Tensor, group: int) -> Tensor:
    """What `coarse_row` and `fine_row` take of an activation float32 [T, H]: int8 [T, H/256 * BLOCK16]."""
    return _blocks(BLOCK16, _lay_out16, x.contiguous(), group)


def _blocks(block_bytes: int, lay_out: Callable, values: Tensor, scales: np.ndarray | int) -> Tensor:
    tokens, n_blocks = len(values), values.shape[1] // CODES
    blocks = torch.empty(tokens, n_blocks * block_bytes, dtype=torch.int8)
    shaped = blocks.numpy().reshape(tokens, n_blocks, block_bytes)
    lay_out(values.detach().numpy(), scales, shaped, shaped.view(np.float32))
    return blocks
