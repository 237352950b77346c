"""Device version of kernels/weigh.py: one launch that adds the parts of every expert's sum, in order, and the experts
in the order of their picks."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.weigh import Mixture

Tensor = torch.Tensor

BLOCK = 256


@triton.jit
def _weigh(parts, weights, residual, bias, ids, out, n_routed, padded, hidden, SPLITS: tl.constexpr,
           ADDED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: blocks of H, T. parts [T, k, SPLITS, padded]."""
    token = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for routed in range(n_routed):
        pick = token * n_routed + routed
        summed = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            summed += tl.load(parts + (pick * SPLITS + split) * padded + at, mask=there, other=0)
        if BIASED:
            summed += tl.load(bias + tl.load(ids + pick) * hidden + at, mask=there, other=0)
        total += tl.load(weights + pick) * summed
    if ADDED:
        total = tl.load(residual + token * hidden + at, mask=there, other=0) + total
    tl.store(out + token * hidden + at, total, mask=there)


def weigh(parts: Tensor, mixture: Mixture) -> Tensor:
    """As kernels.weigh.weigh, of parts float32 [T, k, S, padded H] that add up to the sums."""
    (n_tokens, n_routed, splits, padded), (weights, hidden, residual, bias, ids) = parts.shape, mixture
    assert parts.is_contiguous() and weights.is_contiguous() and weights.shape == (n_tokens, n_routed)
    assert residual is None or residual.is_contiguous() and residual.shape == (n_tokens, hidden), residual.shape
    assert residual is None or residual.dtype == torch.float32
    assert bias is None or bias.is_contiguous() and bias.shape[1] == hidden and ids.is_contiguous(), bias.shape
    out = torch.empty(n_tokens, hidden, dtype=torch.float32, device=parts.device)
    _weigh[(triton.cdiv(hidden, BLOCK), n_tokens)](
        parts, weights, out if residual is None else residual, out if bias is None else bias,
        out if bias is None else ids, out, n_routed, padded, hidden, SPLITS=splits, ADDED=residual is not None,
        BIASED=bias is not None, BLOCK=BLOCK, num_warps=2)
    return out
