"""What stands in front of a layer's experts, in one: norm, router, choice, what else reads the same activation, and the
activation as the experts are given it.

Legend: T tokens, H hidden, E experts, k routed, R rows of what is read beside the router.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.activation import quantize
from kernels.dispatch import twin
from kernels.layout import Layout
from kernels.trunk.linear import Matrices, linears
from kernels.trunk.route import Choice, route

Tensor = torch.Tensor


class Reader(NamedTuple):
    """Matrices behind a root-mean-square norm [H]."""

    matrices: Matrices
    norm: Tensor
    epsilon: float


class Entrance(NamedTuple):
    """router: a matrix of E rows, and behind it what else reads behind the same norm; beside: what reads behind another
    one."""

    router: Reader
    n_experts: int
    choice: Choice
    beside: Reader | None = None


@twin("kernels.gpu.trunk.choose")
def choose(x: Tensor, entrance: Entrance, layout: Layout | None = None, given: Tensor | None = None,
           ) -> tuple[Tensor, ...]:
    """x float32 [T, H] -> rows [T, R] of what is read beside; the experts' activation [T, H], which is `given` where
    there is such, else behind the router's norm; ids int64 [T, k] and shares float32 [T, k], as of `route`; and with a
    layout of experts the activation, padded to its columns, as `quantize` makes it."""
    router, n_experts, choice, beside = entrance
    found, normed = linears(x, *router)
    normed = normed if given is None else given
    rest = found[:, n_experts:]
    if beside is not None:
        more, _ = linears(x, *beside)
        rest = torch.cat((rest, more), 1) if rest.shape[1] else more
    ids, shares = route(found[:, :n_experts], choice)
    if layout is None:
        return rest, normed, ids, shares
    return rest, normed, ids, shares, *quantize(normed, layout.group, layout.padded)
