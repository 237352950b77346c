"""Activations on their way into the expert kernels: int8 for scoring, and the gate that joins gate and up.

Scores only choose neurons, so one int8 number per activation is enough for them (one four-way dot product takes four
codes). Values are computed in float32 on the CPU and in 16-bit fixed point on a GPU.

A NaN or an infinity among the activations must end as "not numbers" and never as a number that looks like one. Codes
cannot hold it, so the scale does: such a group has a scale that is not finite (which of the two is left open) and codes
of 0, and 0 times that scale is NaN in whatever is summed. Every twin keeps to this, its gates and clamps let a NaN
through, a score is NaN then and is chosen like the largest.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.dispatch import twin

Tensor = torch.Tensor

LARGEST = 127 * 256 + 127       # of 16 bits, so that both halves fit in int8
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu")


@dataclass(frozen=True)
class Gate:
    """How gate and up become one product. `clamped_swiglu` (gpt-oss): clamp both, (up+1) * gate * sigmoid(alpha*gate).

    kind "other": only `function` knows; the CPU path can run it, the device kernels refuse it.
    """

    kind: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0
    function: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        assert (self.function is not None) if self.kind == "other" else self.kind in KINDS, self.kind

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up [...] -> product [...]."""
        if self.function is not None:
            return self.function(gate, up)
        if self.kind == "clamped_swiglu":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return (up + 1) * gate * torch.sigmoid(gate * self.alpha)
        act = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu,
               "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}[self.kind]
        return act(gate) * up


class FixedPoint(NamedTuple):
    """x is about (256 * high + low) * scale, group by group: what the device computes values with."""

    high: Tensor    # int8 [T, H]
    low: Tensor     # int8 [T, H]
    scale: Tensor   # float32 [T, G]
    sums: Tensor    # float32 [T, G], sum of x over the group


def widened(x: Tensor, columns: int | None) -> Tensor:
    """x [T, W] -> [T, columns], zeros behind its own; None: x itself."""
    return x if columns in (None, x.shape[1]) else F.pad(x, (0, columns - x.shape[1]))


class NeuronBias(NamedTuple):
    """Biases of gate and up, float32 [E, I] each, and the experts that are computed, int [..]: read where they lie."""

    gate: Tensor
    up: Tensor
    ids: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Those of `ids`, float32 [.., I] each."""
        return self.gate[self.ids.long()], self.up[self.ids.long()]


@twin("kernels.gpu.activation", "kernels.cpu.activation")
def quantize_activation(x: Tensor, group: int, columns: int | None = None) -> tuple[Tensor, Tensor]:
    """float [T, H] -> codes int8 [T, H] and scales float32 [T, H/group]: x is about codes * scale, group by group.

    A group that holds a NaN or an infinity: codes 0, and a scale that is not finite. columns: H, where x has fewer;
    what it lacks is zeros.
    """
    grouped = widened(x, columns).float().unflatten(1, (-1, group))
    scale = grouped.abs().amax(-1).clamp_min(1e-20) / 127
    codes = (grouped / scale[..., None]).round().clamp(-127, 127).nan_to_num(0)
    return codes.to(torch.int8).flatten(1), scale


@twin("kernels.gpu.activation")
def quantize(x: Tensor, group: int, columns: int | None = None) -> tuple[Tensor, ...]:
    """float [T, H], read once -> codes and scales, as of `quantize_activation`, then the four of FixedPoint."""
    x = widened(x, columns)
    grouped = x.float().unflatten(1, (-1, group))
    scale = grouped.abs().amax(-1).clamp_min(1e-20) / LARGEST
    code = (grouped * scale.reciprocal()[..., None]).round().clamp(-LARGEST, LARGEST).nan_to_num(0).int()
    high = (code + 128) >> 8
    return (*quantize_activation.reference(x, group), high.to(torch.int8).flatten(1),
            (code - high * 256).to(torch.int8).flatten(1), scale, code.sum(-1) * scale)
