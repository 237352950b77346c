"""Device side of kernels/planes.py: dot products of packed codes, scale pairs, sums of blocks, device scalars.

Legend: W words of a plane (16 two-bit or 8 four-bit codes each), G groups, P words of a group. Activations are int8 in
natural order: four of them are one int32 word, and shift s of code word w meets activation word 4*w + s.
"""
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default changes in Triton 3.10

# The interpreter knows no inline assembly; every kernel is tested there with the plain expression of the same thing.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dp4a(codes, x, total):
    """total + the four products of the int8 quarters of two int32 words."""
    if INTERPRETED:
        for b in tl.static_range(4):
            total += ((codes << (24 - 8 * b)) >> 24) * ((x << (24 - 8 * b)) >> 24)
        return total
    return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32,
                                     is_pure=True, pack=1)


@triton.jit
def product(a, b):
    """a * b, rounded to float32 before anything is added: a compiler that joined both would round otherwise than
    torch."""
    if INTERPRETED:
        return a * b
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def x_words(x, at, FIRST: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr):
    """Activation words for the code words of GROUPS groups -> four int32 [GROUPS, WORDS], one for each shift.

    x int32 pointer to one token; FIRST group; WORDS code words of a group.
    """
    n: tl.constexpr = GROUPS * WORDS * 4
    words = tl.load(x + at + FIRST * WORDS * 4 + tl.arange(0, n)).reshape(GROUPS, WORDS, 2, 2)
    even, odd = words.split()
    s0, s2 = even.split()
    s1, s3 = odd.split()
    return s0, s1, s2, s3


@triton.jit
def dot2(words, s0, s1, s2, s3):
    """Words of 2-bit codes [R, G, P] times activation words [G, P] -> int32 [R, G]: one sum a group."""
    total = dp4a(words & 0x03030303, s0[None], tl.zeros_like(words))
    total = dp4a((words >> 2) & 0x03030303, s1[None], total)
    total = dp4a((words >> 4) & 0x03030303, s2[None], total)
    total = dp4a((words >> 6) & 0x03030303, s3[None], total)
    return tl.sum(total, axis=2)


@triton.jit
def sum_x(s0, s1, s2, s3):
    """Sum of the activations of each group: int32 [G, P] four times -> int32 [G]."""
    ones = tl.full(s0.shape, 0x01010101, tl.int32)
    total = dp4a(ones, s0, dp4a(ones, s1, dp4a(ones, s2, dp4a(ones, s3, tl.zeros_like(s0)))))
    return tl.sum(total, axis=1)


@triton.jit
def scale_offset(pair):
    """A word of two float16 -> scale, offset float32."""
    scale = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    offset = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, offset


@triton.jit
def _add_splits(partial, bias, out, width, SPLITS: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: blocks of the width W, rows. partial [rows, SPLITS, W] -> out [rows, W]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + (tl.program_id(1) * SPLITS + split) * width + at, mask=there, other=0)
    if BIASED:
        total += tl.load(bias + at, mask=there, other=0).to(tl.float32)
    tl.store(out + tl.program_id(1) * width + at, total.to(out.dtype.element_ty), mask=there)


def add_splits(partial: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """partial float32 [..., splits, W] -> out [..., W] in its dtype: the partial sums, always in the same order, and
    bias [W]."""
    width, n_rows = out.shape[-1], out.numel() // out.shape[-1]
    _add_splits[(triton.cdiv(width, 256), n_rows)](
        partial, partial if bias is None else bias, out, width, SPLITS=partial.shape[-2], BIASED=bias is not None,
        BLOCK=256, num_warps=1)


def groups_at_once(groups: int, limit: int) -> int:
    """Groups of a row that one step takes: the largest power of two that divides their number, at most limit."""
    return min(groups & -groups, limit)


def words_of(bytes_: Tensor) -> Tensor:
    """uint8 [..., P] -> the same memory as int32 [..., P/4]; rows must be whole 16-byte blocks."""
    assert bytes_.dtype == torch.uint8 and bytes_.stride(-1) == 1, (bytes_.dtype, bytes_.stride())
    assert bytes_.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in bytes_.stride()[:-1]), "16-byte alignment"
    return bytes_.view(torch.int32)


def device_value(value: int | Tensor, device: torch.device) -> Tensor:
    """An int, or the int32 tensor of one element that a captured graph reads it from -> the tensor."""
    if isinstance(value, Tensor):
        assert value.dtype == torch.int32 and value.numel() == 1, (value.dtype, value.shape)
        return value
    return torch.full((1,), value, dtype=torch.int32, device=device)
