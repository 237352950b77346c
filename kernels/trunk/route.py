"""From a router's numbers to the experts of a token and their shares.

Legend: T tokens, E experts, k routed.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import twin

Tensor = torch.Tensor
LEAST = 1e-20  # of a sum of sigmoids that shares are divided by


class Choice(NamedTuple):
    """How a layer's router chooses. A share is an expert's part of the softmax over all, or its number's sigmoid; the
    best k by share plus `correction` (float32 [E] or None) are taken, out of `kept` of `groups` groups of neighbours
    where there are several: those whose `of_group` best (1 or 2) are best together. Their shares, renormalised to a sum
    of one or not, come times `scaling`, and times an expert's own of `factors`, float32 [E]."""

    top_k: int
    renormalised: bool
    sigmoid: bool = False
    correction: Tensor | None = None
    groups: int = 1
    kept: int = 1
    of_group: int = 2
    scaling: float = 1.0
    factors: Tensor | None = None


@twin(None, "kernels.cpu.trunk.route")
def route(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """logits float32 [T, E], any stride between rows -> ids int64 [T, k], best first, and shares float32 [T, k]. What
    is not a number makes every share one that is none; of sigmoids its own, which comes first."""
    shares = logits.sigmoid() if choice.sigmoid else logits.softmax(-1)
    wanted = shares if choice.correction is None else shares + choice.correction
    if choice.groups > 1:
        grouped = wanted.unflatten(-1, (choice.groups, -1))
        kept = grouped.topk(choice.of_group).values.sum(-1).topk(choice.kept).indices
        left_out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, kept, False)
        wanted = grouped.masked_fill(left_out[..., None], float("-inf")).flatten(1)
    ids = wanted.topk(choice.top_k).indices
    shares = shares.gather(1, ids)
    if choice.renormalised:
        shares = shares / (shares.sum(-1, keepdim=True) + (LEAST if choice.sigmoid else 0))
    shares = shares * choice.scaling
    return ids, shares if choice.factors is None else shares * choice.factors[ids]
