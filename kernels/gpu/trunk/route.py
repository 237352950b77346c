"""What kernels/trunk/route.py does, inside the launch of the router (choose.py): one block has all of a token's
numbers."""
from __future__ import annotations

import triton
import triton.language as tl

from kernels.trunk.route import LEAST, Choice


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
def chosen(logits, correction, factors, ids, shares, n_experts, scaling, K: tl.constexpr, RENORMALISED: tl.constexpr,
           SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, FACTORS: tl.constexpr, GROUPS: tl.constexpr,
           KEPT: tl.constexpr, OF_GROUP: tl.constexpr, EXPERTS: tl.constexpr, PICKS: tl.constexpr, EACH: tl.constexpr,
           LEAST: tl.constexpr):
    """One token's numbers, read past the first cache -> its ids and shares [K]. EXPERTS, PICKS, EACH: the next powers
    of two. Of equals the first comes first."""
    expert, pick = tl.arange(0, EXPERTS), tl.arange(0, PICKS)
    there = expert < n_experts
    value = tl.load(logits + expert, mask=there, other=float("-inf"), cache_modifier=".cg")
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
    taken, picked = tl.zeros((PICKS,), tl.int32), tl.zeros((PICKS,), tl.float32)
    for i in tl.static_range(K):
        best = tl.argmax(order, axis=0, tie_break_left=True)
        taken = tl.where(pick == i, best, taken)
        picked = tl.where(pick == i, tl.sum(tl.where(expert == best, share, 0), axis=0), picked)
        order = tl.where(expert == best, float("-inf"), order)
    if RENORMALISED:
        total = tl.sum(picked, axis=0)
        if SIGMOID:
            total += LEAST
        picked = picked / total
    if FACTORS:
        picked *= tl.load(factors + taken)
    tl.store(ids + pick, taken.to(tl.int64), mask=pick < K)
    tl.store(shares + pick, picked * scaling, mask=pick < K)


def constants(choice: Choice, n_experts: int) -> dict[str, object]:
    """Of `chosen`."""
    return dict(K=choice.top_k, RENORMALISED=choice.renormalised, SIGMOID=choice.sigmoid,
                CORRECTED=choice.correction is not None, FACTORS=choice.factors is not None, KINDS=choice.groups,
                KEPT=choice.kept, OF_GROUP=choice.of_group, EXPERTS=triton.next_power_of_2(n_experts),
                PICKS=triton.next_power_of_2(choice.top_k), EACH=triton.next_power_of_2(choice.groups), LEAST=LEAST)
