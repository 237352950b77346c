"""Which experts count: rules that let what is near weigh in. Opt-in, since they change what is computed: the end of an
answer written under one says so (`Event.lossy`). Weights always come from the model's own router.

An expert of weight exactly 0 is left out: nothing of it is fetched (engine/experts/runtime.py). All is tensors in,
tensors out, of one shape whatever the values, so that a recorded step can hold a rule.

Legend: T tokens, E experts, k routed.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from engine.core import UserError

Tensor = torch.Tensor
Picks = tuple[Tensor, Tensor]  # ids int64 [T, k], weights float32 [T, k]
RENORMALISED = 1e-3            # how near the sums of weights have to be to each other for a router that renormalises
FAR_BELOW = 1e6                # more than any two logits differ by
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid,
    "square root of softplus": lambda logits: torch.nn.functional.softplus(logits).sqrt()}


class Weights:
    """A router's weights for other experts than its own choice, told from what it says: which function of the logits
    they are proportional to, and whether they sum to one number."""

    def __init__(self, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        """logits [n, E], ids and weights [n, k] of a few tokens. UserError where no known function fits."""
        for name, kind in KINDS.items():
            share = kind(logits.double()).gather(1, ids.long())
            ratio = weights.double() / share.clamp_min(1e-12)
            if bool(((ratio / ratio.mean(1, keepdim=True) - 1).abs() < 1e-3).all()):
                self.kind, sums = name, weights.double().sum(1)
                self.sums_to = float(sums.mean()) if float(sums.std(unbiased=False)) < RENORMALISED else 0.0
                self.scale = float(ratio.mean())
                return
        raise UserError("The router of this model weighs experts in a way that this program does not know; choose "
                        "a policy without a route.")

    def of(self, logits: Tensor, ids: Tensor) -> Tensor:
        """float32 [T, k]"""
        share = KINDS[self.kind](logits.float()).gather(1, ids)
        return share * self.sums_to / share.sum(1, keepdim=True) if self.sums_to else share * self.scale


def prefer_near(logits: Tensor, ids: Tensor, weights: Tensor, near: Tensor, reweigh: Callable[[Tensor, Tensor], Tensor],
                margin: float, kept: int = 1) -> Picks:
    """Cache-conditional experts (arXiv 2412.00099): logits of what is near, and of the `kept` best, rise by margin
    times this token's max - min of the logits before the k best are taken (the paper: the mean over tokens). margin 0
    changes nothing; infinite, nothing far is chosen behind the `kept` best while k are near. near bool [T, E].
    """
    if margin == 0:
        return ids, weights
    best = ids.long().gather(1, weights.topk(min(kept, ids.shape[1]), dim=1).indices)
    favoured, logits = near.scatter(1, best, True), logits.double()
    if margin == float("inf"):
        ranked = torch.where(favoured, logits, logits - FAR_BELOW)
    else:
        ranked = logits + margin * (logits.amax(1) - logits.amin(1))[:, None] * favoured
    chosen = ranked.topk(ids.shape[1], dim=1).indices
    same = (chosen.sort(1).values == ids.long().sort(1).values).all(1, keepdim=True)
    return torch.where(same, ids.long(), chosen), torch.where(same, weights, reweigh(logits, chosen))


def near_only(logits: Tensor, ids: Tensor, weights: Tensor, near: Tensor, reweigh: Callable[[Tensor, Tensor], Tensor],
              sums_to: float) -> Picks:
    """eMoE's fallback (arXiv 2503.06823): the best of what is near; where fewer than k are, the others get weight 0,
    and so nothing far is ever fetched."""
    chosen, given = prefer_near(logits, ids, weights, near, reweigh, float("inf"), kept=0)
    return chosen, _without(given, ~near.gather(1, chosen.long()), sums_to)


def drop_below(weights: Tensor, threshold: float, sums_to: float) -> Tensor:
    """AdapMoE's gate (arXiv 2408.10284): every expert behind the best whose share of the token's weight is below
    `threshold` gets weight 0, and where the router renormalises the others get what it had. threshold 0: no change."""
    share = weights / weights.sum(1, keepdim=True)
    best = torch.zeros_like(share, dtype=torch.bool).scatter(1, share.argmax(1, keepdim=True), True)
    return _without(weights, (share < threshold) & ~best, sums_to)


def skip_missing(weights: Tensor, near: Tensor, beyond: float, sums_to: float) -> Tensor:
    """HOBBIT's skip (arXiv 2411.01433): a missing expert before which others already have a share `beyond` of the
    token's weight gets weight 0. near bool [T, k], of the picks; beyond 1: no change."""
    return _without(weights, ~near & (unimportance(weights) > beyond), sums_to)


def unimportance(weights: Tensor) -> Tensor:
    """Share of the token's weight on the experts that weigh more, 0 for the best: float32 [T, k]."""
    share = weights / weights.sum(1, keepdim=True)
    here, other = weights[:, :, None], weights[:, None, :]
    earlier = torch.ones(2 * weights.shape[1:], device=weights.device).tril(-1).bool()
    return (((other > here) | (other == here) & earlier) * share[:, None, :]).sum(-1)


def _without(weights: Tensor, dropped: Tensor, sums_to: float) -> Tensor:
    left = torch.where(dropped, 0.0, weights)
    if not sums_to:
        return left
    sums = left.sum(1, keepdim=True).clamp_min(1e-12)
    return torch.where(dropped.any(1, keepdim=True), left * sums_to / sums, weights)


def routed(name: str, numbers: tuple[float, ...], logits: Tensor, ids: Tensor, weights: Tensor, near: Tensor,
           weigh: Weights) -> Picks:
    """A rule by its name (engine/policies/choice.py). near bool [T, E]."""
    if name == "near":
        return prefer_near(logits, ids, weights, near, weigh.of, numbers[0], int(numbers[1]))
    if name == "near-only":
        return near_only(logits, ids, weights, near, weigh.of, weigh.sums_to)
    if name == "drop":
        return ids, drop_below(weights, numbers[0], weigh.sums_to)
    assert name == "skip", name
    return ids, skip_missing(weights, near.gather(1, ids), numbers[0], weigh.sums_to)


def left_out(ids: Tensor, weights: Tensor, chosen: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Of one layer's token, [1, k] each -> the share of the router's weight on experts that are not computed, and how
    many of those that are the router did not choose."""
    counts = (ids[0, :, None] == chosen[0]) & (given[0] != 0)
    lost = torch.where(counts.any(1), 0.0, weights[0]).sum() / weights[0].sum()
    return lost, ((given[0] != 0) & ~counts.any(0)).sum()
