"""Trunk rows into float32 for torch's own products: compiled twin of dequantize_rows.

Codes come 16 at a time, in the order of their columns, as one vector of bytes; scale and offset are of their group.
"""
from __future__ import annotations

import torch
from llvmlite import ir
from numba import carray

from kernels.cpu.rows import LINE
from kernels.cpu.threads import address, claim, fields, pointer, run, task
from kernels.cpu.vectors import HALF, INT8, INT32, Code, Value, in_vectors, vector
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
