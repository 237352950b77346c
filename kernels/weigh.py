"""From the experts' sums to what a layer adds: the last step of kernels/apply.py and kernels/dense.py."""
from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Mixture(NamedTuple):
    """How a token's experts become one row.

    weights float32 [T, k]; hidden: columns that count, the others are padding; residual float32 [T, hidden], on top of
    which they come, or None; bias float32 [E, hidden] of down by expert and ids int [T, k] of the routed ones, or None.
    """

    weights: Tensor
    hidden: int
    residual: Tensor | None = None
    bias: Tensor | None = None
    ids: Tensor | None = None


def weigh(sums: Tensor, mixture: Mixture) -> Tensor:
    """sums float32 [T, k, padded H] -> [T, hidden]."""
    weights, hidden, residual, bias, ids = mixture
    y = sums[..., :hidden] if bias is None else sums[..., :hidden] + bias[ids.long()]
    out = (y * weights[..., None]).sum(1)
    return out if residual is None else residual + out


def weighed(sums: Tensor, mixture: Mixture | None = None) -> Tensor:
    """Sums that are there already, in place of a product that makes them."""
    return sums if mixture is None else weigh(sums, mixture)
