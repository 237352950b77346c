"""Device version of the gate in kernels/activation.py: how gate and up become one product, and what is added to both
before."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import KINDS, Gate, NeuronBias

Tensor = torch.Tensor

SILU = tl.constexpr(KINDS.index("silu"))
GELU = tl.constexpr(KINDS.index("gelu"))
GELU_TANH = tl.constexpr(KINDS.index("gelu_tanh"))
RELU = tl.constexpr(KINDS.index("relu"))
NAN = tl.constexpr(tl.PropagateNan.ALL)  # a maximum or minimum with NaN is otherwise the other number


def check_gate(gate: Gate) -> None:
    assert gate.kind in KINDS, f"the device kernels do not know the gate {gate.kind!r}; run this model on the CPU path"


def kind_of(gate: Gate) -> int:
    return KINDS.index(gate.kind)


def bias_tables(bias: NeuronBias | None, picks: tuple[int, ...], neurons: int, none: Tensor) -> tuple[Tensor, ...]:
    """Gate's, up's and the ids, whose shape is `picks`, for a kernel; none: for what there is not."""
    if bias is None:
        return none, none, none
    for table in bias[:2]:
        assert table.dtype == torch.float32 and table.is_contiguous() and table.shape[1] == neurons, table.shape
    assert bias.ids.shape == picks and bias.ids.is_contiguous() and not bias.ids.is_floating_point(), bias.ids.shape
    return bias


@triton.jit
def biased(gate, up, gate_bias, up_bias, ids, index, valid, NEURONS: tl.constexpr):
    """Neurons `index` [R] of a token's routed experts `ids` [k]."""
    at = tl.load(ids + index // NEURONS, mask=valid, other=0) * NEURONS + index % NEURONS
    return gate + tl.load(gate_bias + at, mask=valid, other=0), up + tl.load(up_bias + at, mask=valid, other=0)


@triton.jit
def gated(gate, up, alpha, limit, KIND: tl.constexpr):
    """gate, up float32 of one shape -> their product; alpha and limit belong to clamped_swiglu."""
    if KIND == SILU:
        return gate * tl.sigmoid(gate) * up
    if KIND == GELU:
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    if KIND == GELU_TANH:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2 * inner) * up
    if KIND == RELU:
        return tl.maximum(gate, 0, propagate_nan=NAN) * up
    gate = tl.minimum(gate, limit, propagate_nan=NAN)
    up = tl.minimum(tl.maximum(up, -limit, propagate_nan=NAN), limit, propagate_nan=NAN)
    return (up + 1) * gate * tl.sigmoid(gate * alpha)
