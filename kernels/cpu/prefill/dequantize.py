"""Packed weights into float32 matrices for torch's own products: compiled twins of dequantize and dequantize_rows.

Codes come 16 at a time, in the order of their columns, as one vector of bytes; scale and offset are of their group.
"""
from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import carray, float32

from kernels.cpu.rows import CODES, EVERY_BYTE, LINE, WORDS, two_bits
from kernels.cpu.threads import address, claim, fields, pointer, run, task
from kernels.cpu.vectors import HALF, INT8, INT32, LANES, Code, Value, in_vectors, vector
from kernels.layout import Layout
from kernels.trunk.linear import joined

Tensor = torch.Tensor

ROWS = 32       # of a piece of work
GROUP = 64      # of a trunk matrix
BYTES = vector(INT8, 64)
WRITTEN = 12    # bytes that are written, about, for one that is read


def _write(code: Code, codes: Value, scale: Value, offset: Value | None, out: Value, signed: bool = False) -> None:
    """16 bytes -> 16 floats"""
    widen = code.builder.sext if signed else code.builder.zext
    values = Value(code, widen(codes.value, vector(INT32))).to_float()
    code.store(values * scale if offset is None else code.multiply_add(values, scale, offset), out)


def _every_lane(code: Code, address: Value) -> Value:
    half = code.load(address, HALF, 2)
    return code.splat(Value(code, code.builder.fpext(half.value, ir.FloatType())))


def _zipped(first: Value, second: Value) -> list[Value]:
    """Two vectors of words, word by word -> two vectors."""
    order = [lane // 2 + LANES * (lane % 2) for lane in range(2 * LANES)]
    return [first.pick(order[at:at + LANES], second) for at in (0, LANES)]


def _in_fours(words: list[Value]) -> list[Value]:
    """Vectors of words whose bytes are codes -> vectors of 16 codes as the columns follow each other."""
    return [part for line in words for part in line.as_type(BYTES).parts(4)]


def _write_block(code: Code, words: list[Value], pairs: Value, group: int, out: Value) -> None:
    chunks = _in_fours(words)
    for first in range(0, len(chunks), group // LANES):
        pair = pairs + first * LANES // group * 4
        scale, offset = _every_lane(code, pair), _every_lane(code, pair + 2)
        for i, chunk in enumerate(chunks[first:first + group // LANES]):
            _write(code, chunk, scale, offset, out + (first + i) * LINE)


@in_vectors("void(i64, i64, i64, i64, i64) 1")
def _nested(code: Code, group: int, plane: Value, refine: Value, pairs: Value, out: Value, n_blocks: Value) -> None:
    """A row of 4 * plane + refine; 256 codes at a time."""
    with code.loop(n_blocks) as block:
        words, rest = (code.load(at + block * LINE, WORDS) for at in (plane, refine))
        codes = [two_bits(words, shift) << 2 | two_bits(rest, shift) for shift in range(4)]
        even, odd = (_zipped(codes[at], codes[at + 2]) for at in (0, 1))
        ordered = [line for pair in zip(even, odd, strict=True) for line in _zipped(*pair)]
        _write_block(code, ordered, pairs + block * (4 * CODES // group), group, out + block * (4 * CODES))


@in_vectors("void(i64, i64, i64, i64) 1")
def _down(code: Code, group: int, plane: Value, pairs: Value, out: Value, n_blocks: Value) -> None:
    """A row of 4-bit words; 128 codes at a time."""
    with code.loop(n_blocks) as block:
        words = code.load(plane + block * LINE, WORDS)
        ordered = _zipped(words & 15 * EVERY_BYTE, words >> 4 & 15 * EVERY_BYTE)
        _write_block(code, ordered, pairs + block * (4 * 128 // group), group, out + block * (4 * 128))


@in_vectors("void(i64, i64, i64, i64)")
def _trunk8(code: Code, codes: Value, scales: Value, out: Value, n_groups: Value) -> None:
    with code.loop(n_groups) as group:
        scale, chunks = _every_lane(code, scales + group * 2), code.load(codes + group * GROUP, BYTES).parts(4)
        for i, chunk in enumerate(chunks):
            _write(code, chunk, scale, None, out + group * (4 * GROUP) + i * LINE, signed=True)


@in_vectors("void(i64, i64, i64, i64)")
def _trunk4(code: Code, codes: Value, pairs: Value, out: Value, n_groups: Value) -> None:
    half = vector(INT8, GROUP // 2)
    order = [lane // 2 + GROUP // 2 * (lane % 2) for lane in range(GROUP)]
    with code.loop(n_groups) as group:
        both, pair = code.load(codes + group * (GROUP // 2), half), pairs + group * 4
        scale, offset = _every_lane(code, pair), _every_lane(code, pair + 2)
        for i, chunk in enumerate((both & 15).pick(order, both >> 4).parts(4)):
            _write(code, chunk, scale, offset, out + group * (4 * GROUP) + i * LINE)


ROWS_RECORD = fields("rows columns eight_bits codes code_bytes scales scale_bytes out")


@task
def _rows(table):
    a = carray(pointer(table), 1, ROWS_RECORD)[0]
    piece = claim(table)
    while piece < a.n_pieces:
        for row in range(piece * ROWS, min(piece * ROWS + ROWS, a.rows)):
            codes, scales = a.codes + row * a.code_bytes, a.scales + row * a.scale_bytes
            out = a.out + row * 4 * a.columns
            if a.eight_bits:
                _trunk8(codes, scales, out, a.columns // GROUP)
            else:
                _trunk4(codes, scales, out, a.columns // GROUP)
        piece = claim(table)


def dequantize_rows(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """As kernels.trunk.linear.dequantize_rows."""
    rows, n = out.shape
    if n % GROUP or scales.shape[1] * GROUP != n or not (out.dtype == torch.float32 and scales.dtype == torch.float16):
        return NotImplemented
    assert out.is_contiguous() and len(codes) == rows, (out.stride(), codes.shape)
    codes, scales = joined(codes).contiguous(), scales.contiguous()
    run(_rows, ROWS_RECORD, -(-rows // ROWS), WRITTEN * codes.nbytes, rows=rows, columns=n,
        eight_bits=codes.dtype == torch.int8, codes=address(codes), code_bytes=codes.stride(0),
        scales=address(scales), scale_bytes=2 * scales[0].numel() if rows else 0, out=address(out))
    return None


EXPERTS_RECORD = fields("blobs blob_bytes neurons hidden padded plane2 scales group sketch_row sketch_bytes record "
                        "record_scales_at refine_at gate_up down")


@task
def _experts(table):
    a = carray(pointer(table), 1, EXPERTS_RECORD)[0]
    row = np.empty(a.padded, np.float32)
    per_expert = (a.neurons + ROWS - 1) // ROWS
    piece = claim(table)
    while piece < a.n_pieces:
        expert, first = piece // per_expert, piece % per_expert * ROWS
        blob, row_bytes = a.blobs + expert * a.blob_bytes, 4 * a.hidden
        for neuron in range(first, min(first + ROWS, a.neurons)):
            sketch, record = blob + neuron * a.sketch_row, blob + a.sketch_bytes + neuron * a.record
            for which in range(3):
                at = (2 * expert * a.neurons + which * a.neurons + neuron) * row_bytes + a.gate_up
                if which == 2:
                    at = (expert * a.neurons + neuron) * row_bytes + a.down
                out = at if a.padded == a.hidden else row.ctypes.data
                pairs = record + a.record_scales_at + ((1 + which) % 3) * a.scales
                if which == 2:
                    if a.group == 128:
                        _down(record, pairs, out, a.padded // 128, 128)
                    else:
                        _down(record, pairs, out, a.padded // 128, 64)
                else:
                    plane, refine = sketch + which * a.plane2, record + a.refine_at + which * a.plane2
                    if a.group == 128:
                        _nested(plane, refine, pairs, out, a.padded // CODES, 128)
                    else:
                        _nested(plane, refine, pairs, out, a.padded // CODES, 64)
                if a.padded != a.hidden:
                    carray(pointer(at), a.hidden, float32)[:] = row[:a.hidden]
        piece = claim(table)


SIZES = ("neurons", "hidden", "padded", "plane2", "scales", "group", "sketch_row", "sketch_bytes", "record",
         "record_scales_at", "refine_at")


def dequantize(blobs: Tensor, gate_up: Tensor, down: Tensor, layout: Layout) -> None:
    """As kernels.dense.dequantize."""
    if gate_up.dtype != torch.float32 or down.dtype != torch.float32:
        return NotImplemented
    assert gate_up.is_contiguous() and down.is_contiguous() and blobs.stride(1) == 1, (gate_up.stride(), blobs.stride())
    n = len(blobs)
    run(_experts, EXPERTS_RECORD, n * -(-layout.neurons // ROWS), WRITTEN * n * layout.blob_bytes,
        **{name: getattr(layout, name) for name in SIZES}, blobs=address(blobs), blob_bytes=blobs.stride(0),
        gate_up=address(gate_up), down=address(down))
    return None
