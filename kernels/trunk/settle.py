"""What a layer computed joins its residual behind norms of its own, and is normed for what reads it next."""
from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import twin
from kernels.trunk.linear import Matrices, linears

Tensor = torch.Tensor


class Settling(NamedTuple):
    """norm, and all that is like it, float [H]: of what joins. own: one for each of two summands, which are normed
    before they are added. scale float [1]: of the sum with the residual. then: of what is read next."""

    norm: Tensor
    epsilon: float
    own: tuple[Tensor, Tensor] | None = None
    scale: Tensor | None = None
    then: Tensor | None = None


@twin("kernels.gpu.trunk.settle", "kernels.cpu.trunk.settle")
def settle(residual: Tensor, added: Tensor, how: Settling, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """residual, added and, where `how.own` wants a second summand, beside: float32 [T, H], contiguous -> the sum
    float32 [T, H], and its norm by `how.then`, or itself. Norms are root-mean-square norms."""
    if how.own is not None:
        added, beside = (_normed(part, norm, how.epsilon) for part, norm in zip((added, beside), how.own, strict=True))
        added = added + beside
    found = residual + _normed(added, how.norm, how.epsilon)
    if how.scale is not None:
        found = found * how.scale.float()
    return found, found if how.then is None else _normed(found, how.then, how.epsilon)


@twin("kernels.gpu.trunk.settle")
def settled_linears(x: Tensor, matrices: Matrices, residual: Tensor, how: Settling) -> tuple[Tensor, Tensor]:
    """`settle` of residual and x @ weights.T + biases, without `how.own`; x float32 [T, K], residual [T, H]."""
    return settle(residual, linears(x, matrices)[0], how)


def _normed(x: Tensor, norm: Tensor, epsilon: float) -> Tensor:
    return norm.float() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))
