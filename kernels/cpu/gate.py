"""The gate of kernels/activation.py, compiled: how gate and up become one product. NaN stays NaN in all of them."""
from __future__ import annotations

import math

from numba import float32, njit

from kernels.activation import KINDS, Gate

SILU, GELU, GELU_TANH, RELU = (KINDS.index(kind) for kind in ("silu", "gelu", "gelu_tanh", "relu"))


def kind_of(gate: Gate) -> int:
    return KINDS.index(gate.kind)


@njit(cache=True, nogil=True)
def _sigmoid(x):
    return float32(1) / (float32(1) + math.exp(-x))


@njit(cache=True, nogil=True)
def gated(gate, up, kind, alpha, limit):
    """float32 all; alpha and limit belong to clamped_swiglu."""
    if kind == SILU:
        return gate * _sigmoid(gate) * up
    if kind == GELU:
        return float32(0.5) * gate * (float32(1) + math.erf(gate * float32(math.sqrt(0.5)))) * up
    if kind == GELU_TANH:
        inner = float32(math.sqrt(2 / math.pi)) * (gate + float32(0.044715) * gate * gate * gate)
        return gate * _sigmoid(float32(2) * inner) * up
    if kind == RELU:
        return (float32(0) if gate < 0 else gate) * up
    gate = limit if gate > limit else gate
    up = limit if up > limit else -limit if up < -limit else up
    return (up + float32(1)) * gate * _sigmoid(gate * alpha)
