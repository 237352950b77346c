"""Device version of kernels/weigh.py: one launch, the experts in the order of their picks."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

BLOCK = 256


@triton.jit
def _weigh(sums, weights, out, n_routed, padded, hidden, BLOCK: tl.constexpr):
    """Grid: blocks of H, T."""
    token = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for routed in range(n_routed):
        pick = token * n_routed + routed
        total += tl.load(weights + pick) * tl.load(sums + pick * padded + at, mask=there, other=0)
    tl.store(out + token * hidden + at, total, mask=there)


def weigh(sums: Tensor, weights: Tensor, hidden: int) -> Tensor:
    """As kernels.weigh.weigh."""
    n_tokens, n_routed, padded = sums.shape
    assert sums.is_contiguous() and weights.is_contiguous() and weights.shape == (n_tokens, n_routed)
    out = torch.empty(n_tokens, hidden, dtype=torch.float32, device=sums.device)
    _weigh[(triton.cdiv(hidden, BLOCK), n_tokens)](sums, weights, out, n_routed, padded, hidden, BLOCK=BLOCK,
                                                   num_warps=2)
    return out
