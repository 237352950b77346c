"""Device version of kernels/trunk/route.py: a block a token, which holds all of its router's numbers."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor


@triton.jit
def _route(logits, ids, shares, n_experts, stride, K: tl.constexpr, RENORMALISED: tl.constexpr, EXPERTS: tl.constexpr,
           PICKS: tl.constexpr):
    """Grid: T. EXPERTS, PICKS: the next powers of two. Of equals the first comes first."""
    token = tl.program_id(0)
    expert, pick = tl.arange(0, EXPERTS), tl.arange(0, PICKS)
    there = expert < n_experts
    value = tl.load(logits + token * stride + expert, mask=there, other=float("-inf"))
    # What is no number comes first; what is smaller than any stays ahead of what is taken.
    order = tl.where(value == value, tl.maximum(value, -3.4028234663852886e38), float("inf"))
    order = tl.where(there, order, float("-inf"))
    largest = tl.max(order, axis=0)
    weight = tl.exp(value - largest)
    total = tl.sum(tl.where(there, weight, 0), axis=0)
    chosen, picked = tl.zeros((PICKS,), tl.int32), tl.zeros((PICKS,), tl.float32)
    for i in tl.static_range(K):
        best = tl.argmax(order, axis=0, tie_break_left=True)
        share = tl.sum(tl.where(expert == best, weight, 0), axis=0) / total
        chosen = tl.where(pick == i, best, chosen)
        picked = tl.where(pick == i, share, picked)
        order = tl.where(expert == best, float("-inf"), order)
    if RENORMALISED:
        picked = picked / tl.sum(picked, axis=0)
    tl.store(ids + token * K + pick, chosen.to(tl.int64), mask=pick < K)
    tl.store(shares + token * K + pick, picked, mask=pick < K)


def route(logits: Tensor, top_k: int, renormalised: bool) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.route.route."""
    n_tokens, n_experts = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and top_k <= n_experts, (logits.shape, top_k)
    ids = torch.empty(n_tokens, top_k, dtype=torch.int64, device=logits.device)
    shares = torch.empty(n_tokens, top_k, dtype=torch.float32, device=logits.device)
    _route[(n_tokens,)](logits, ids, shares, n_experts, logits.stride(0), K=top_k, RENORMALISED=renormalised,
                        EXPERTS=triton.next_power_of_2(n_experts), PICKS=triton.next_power_of_2(top_k), num_warps=1)
    return ids, shares
