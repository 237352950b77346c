"""The gate of kernels/activation.py, compiled, 16 neurons at a time, and what is added before. NaN stays NaN in all of
its kinds."""
from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, float32, int64, njit

from kernels.activation import KINDS, Gate, NeuronBias
from kernels.cpu.rows import FLOATS, LINE
from kernels.cpu.threads import address, pointer
from kernels.cpu.vectors import LANES, Code, Value, in_vectors

Tensor = torch.Tensor
BIAS = ("gate_bias", "up_bias", "bias_ids")   # of a record
SILU, GELU, GELU_TANH, RELU, CLAMPED = (
    KINDS.index(kind) for kind in ("silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"))
SIGMOID = len(KINDS)    # of what is gated by a sigmoid alone
LOG2_E, LN2_HIGH, LN2_LOW = 1 / math.log(2), 0.693359375, -2.12194440e-4    # the two add up to ln 2
# e**r for |r| <= ln 2 / 2, r**7 first (Cephes, expf.c)
SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def kind_of(gate: Gate) -> int:
    return KINDS.index(gate.kind)


def bias_fields(bias: NeuronBias | None) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    """What has to stay alive, and a record's BIAS."""
    tables = () if bias is None else (bias.gate.contiguous(), bias.up.contiguous(), bias.ids.long().contiguous())
    return tables, dict(zip(BIAS, map(address, tables or (None,) * 3), strict=True))


@njit(cache=True, nogil=True)
def biases_of(a, pick, neurons):
    """Gate's and up's float32 [I] for one of a record's ids; without ids nothing that may be read."""
    at = 4 * neurons * carray(pointer(a.bias_ids + 8 * pick), 1, int64)[0] if a.bias_ids else 0
    return carray(pointer(a.gate_bias + at), neurons, float32), carray(pointer(a.up_bias + at), neurons, float32)


def exponential(code: Code, x: Value) -> Value:
    """e**x of 16 float32, to two units in the last place; beyond -87 and 88 that of these."""
    x = x.at_most(88.0).at_least(-87.0)
    steps = code.call("llvm.rint.v16f32", FLOATS, x * LOG2_E)
    rest = code.multiply_add(steps, code.constant(FLOATS, -LN2_HIGH), x)
    rest = code.multiply_add(steps, code.constant(FLOATS, -LN2_LOW), rest)
    found = code.constant(FLOATS, SERIES[0])
    for factor in SERIES[1:]:
        found = code.multiply_add(found, rest, code.constant(FLOATS, factor))
    found = code.multiply_add(found, rest * rest, rest) + 1.0
    return found * ((code.rounded(steps) + 127) << 23).as_type(FLOATS)


def _sigmoid(code: Code, x: Value) -> Value:
    return code.constant(FLOATS, 1.0) / (exponential(code, x * -1.0) + 1.0)


@in_vectors("void(i64, i64, i64, f32, f32) 1")
def _gated(code: Code, kind: int, gate: Value, up: Value, out: Value, alpha: Value, limit: Value) -> None:
    g, u = code.load(gate, FLOATS), code.load(up, FLOATS)
    if kind == SILU:
        found = g * _sigmoid(code, g) * u
    elif kind == GELU_TANH:
        inner = (g + g * g * g * 0.044715) * math.sqrt(2 / math.pi)
        found = g * _sigmoid(code, inner * 2.0) * u
    elif kind == RELU:
        found = g.at_least(0.0) * u
    else:
        most = code.splat(limit)
        g, u = g.at_most(most), u.at_most(most).at_least(most * -1.0)
        found = (u + 1.0) * g * _sigmoid(code, g * code.splat(alpha))
    code.store(found, out)


@njit(cache=True, nogil=True)
def gated(gate, up, out, kind, alpha, limit):
    """Addresses of float32 [16]; alpha and limit belong to clamped_swiglu."""
    if kind == SILU:
        _gated(gate, up, out, alpha, limit, SILU)
    elif kind == GELU_TANH:
        _gated(gate, up, out, alpha, limit, GELU_TANH)
    elif kind == RELU:
        _gated(gate, up, out, alpha, limit, RELU)
    elif kind == GELU:
        g, u, found = (carray(pointer(gate), LANES, float32), carray(pointer(up), LANES, float32),
                       carray(pointer(out), LANES, float32))
        for i in range(LANES):
            found[i] = float32(0.5) * g[i] * (float32(1) + math.erf(g[i] * float32(math.sqrt(0.5)))) * u[i]
    else:
        _gated(gate, up, out, alpha, limit, CLAMPED)


@in_vectors("void(i64, i64, i64) 1")
def _scale(code: Code, kind: int, gates: Value, values: Value, n_lines: Value) -> None:
    """In place: values float32 times silu(gates), or sigmoid(gates)."""
    with code.loop(n_lines) as line:
        gate = code.load(gates + line * LINE, FLOATS)
        share = _sigmoid(code, gate)
        found = code.load(values + line * LINE, FLOATS) * (gate * share if kind == SILU else share)
        code.store(found, values + line * LINE)


@njit(cache=True, nogil=True)
def scale(gates, values, n, is_silu):
    """Addresses of float32 [n], which may be the same: values *= silu(gates), or sigmoid(gates)."""
    whole, rest = n // LANES, n % LANES
    if rest:
        last = np.zeros((2, LANES), np.float32)
        ends = (carray(pointer(gates + whole * LINE), rest, float32),
                carray(pointer(values + whole * LINE), rest, float32))
        last[0, :rest], last[1, :rest] = ends[0], ends[1]
        if is_silu:
            _scale(last.ctypes.data, last.ctypes.data + LINE, 1, SILU)
        else:
            _scale(last.ctypes.data, last.ctypes.data + LINE, 1, SIGMOID)
        ends[1][:] = last[1, :rest]
    if is_silu:
        _scale(gates, values, whole, SILU)
    else:
        _scale(gates, values, whole, SIGMOID)
