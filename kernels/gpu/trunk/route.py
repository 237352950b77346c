"""Device version of kernels/trunk/route.py: a block a token, which holds all of its router's numbers."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.trunk.route import LEAST, Choice

Tensor = torch.Tensor


@triton.jit
def _kept(order, expert, size, GROUPS: tl.constexpr, KEPT: tl.constexpr, OF_GROUP: tl.constexpr, EACH: tl.constexpr):
    """Whether an expert is of the best groups of `size`; order: its number, -inf beyond the last. EACH: the next power
    of two to GROUPS."""
    group = tl.arange(0, EACH)
    score = tl.full((EACH,), float("-inf"), tl.float32)
    for i in tl.static_range(GROUPS):
        own = tl.where(expert // size == i, order, float("-inf"))
        total = tl.max(own, axis=0)
        if OF_GROUP == 2:
            best = tl.argmax(own, axis=0, tie_break_left=True)
            total += tl.max(tl.where(expert == best, float("-inf"), own), axis=0)
        score = tl.where(group == i, total, score)
    kept = expert < 0
    for _ in tl.static_range(KEPT):
        best = tl.argmax(score, axis=0, tie_break_left=True)
        kept = kept | (expert // size == best)
        score = tl.where(group == best, float("-inf"), score)
    return kept


@triton.jit
def _route(logits, correction, factors, ids, shares, n_experts, stride, scaling, K: tl.constexpr,
           RENORMALISED: tl.constexpr, SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, FACTORS: tl.constexpr,
           GROUPS: tl.constexpr, KEPT: tl.constexpr, OF_GROUP: tl.constexpr, EXPERTS: tl.constexpr,
           PICKS: tl.constexpr, EACH: tl.constexpr, LEAST: tl.constexpr):
    """Grid: T. EXPERTS, PICKS, EACH: the next powers of two. Of equals the first comes first."""
    token = tl.program_id(0)
    expert, pick = tl.arange(0, EXPERTS), tl.arange(0, PICKS)
    there = expert < n_experts
    value = tl.load(logits + token * stride + expert, mask=there, other=float("-inf"))
    if SIGMOID:
        share = tl.sigmoid(value)
    else:
        weight = tl.exp(value - tl.max(tl.where(value == value, value, float("-inf")), axis=0))
        share = weight / tl.sum(tl.where(there, weight, 0), axis=0)
    wanted = share
    if CORRECTED:
        wanted += tl.load(correction + expert, mask=there, other=0)
    # What is no number comes first; what is smaller than any stays ahead of what is taken.
    order = tl.where(wanted == wanted, tl.maximum(wanted, -3.4028234663852886e38), float("inf"))
    order = tl.where(there, order, float("-inf"))
    if GROUPS > 1:
        size = n_experts // GROUPS
        order = tl.where(_kept(order, expert, size, GROUPS, KEPT, OF_GROUP, EACH), order, float("-inf"))
    chosen, picked = tl.zeros((PICKS,), tl.int32), tl.zeros((PICKS,), tl.float32)
    for i in tl.static_range(K):
        best = tl.argmax(order, axis=0, tie_break_left=True)
        chosen = tl.where(pick == i, best, chosen)
        picked = tl.where(pick == i, tl.sum(tl.where(expert == best, share, 0), axis=0), picked)
        order = tl.where(expert == best, float("-inf"), order)
    if RENORMALISED:
        total = tl.sum(picked, axis=0)
        if SIGMOID:
            total += LEAST
        picked = picked / total
    if FACTORS:
        picked *= tl.load(factors + chosen)
    tl.store(ids + token * K + pick, chosen.to(tl.int64), mask=pick < K)
    tl.store(shares + token * K + pick, picked * scaling, mask=pick < K)


def route(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.route.route."""
    (n_tokens, n_experts), top_k = logits.shape, choice.top_k
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and top_k <= n_experts, (logits.shape, top_k)
    ids = torch.empty(n_tokens, top_k, dtype=torch.int64, device=logits.device)
    shares = torch.empty(n_tokens, top_k, dtype=torch.float32, device=logits.device)
    corrected, has_factors = choice.correction is not None, choice.factors is not None
    _route[(n_tokens,)](logits, choice.correction if corrected else logits, choice.factors if has_factors else logits,
                        ids, shares, n_experts, logits.stride(0), choice.scaling, K=top_k,
                        RENORMALISED=choice.renormalised, SIGMOID=choice.sigmoid, CORRECTED=corrected,
                        FACTORS=has_factors, GROUPS=choice.groups, KEPT=choice.kept, OF_GROUP=choice.of_group,
                        EXPERTS=triton.next_power_of_2(n_experts), PICKS=triton.next_power_of_2(top_k),
                        EACH=triton.next_power_of_2(choice.groups), LEAST=LEAST, num_warps=1)
    return ids, shares
