"""From a router's numbers to the experts of a token: softmax over all, the best k, and their shares."""
from __future__ import annotations

import torch

from kernels.dispatch import twin

Tensor = torch.Tensor


@twin("kernels.gpu.trunk.route", "kernels.cpu.trunk.route")
def route(logits: Tensor, top_k: int, renormalised: bool) -> tuple[Tensor, Tensor]:
    """logits float32 [T, E], any stride between rows -> ids int64 [T, k], best first, and shares float32 [T, k] of the
    softmax over all experts, or, renormalised, of its best k. What is not a number comes first and makes every share
    one that is none."""
    shares, ids = logits.softmax(-1).topk(top_k)
    return ids, shares / shares.sum(-1, keepdim=True) if renormalised else shares
