"""How exactly the chosen neurons are computed: rules that fetch less of what is missing. Opt-in, since they change what
is computed. They act on what a sparse level selected; what is near already is never made worse.

Tensors in, tensors out, of one shape whatever the values. Legend: T tokens, k routed, I neurons, K neurons chosen.
"""
from __future__ import annotations

import torch

from engine.policies.route import unimportance
from kernels.select import DOWN_ONLY, REFINED

Tensor = torch.Tensor
Chosen = tuple[Tensor, Tensor]  # neurons int32 [T, K] ascending, then -1; fidelity int8 [T, K]


def by_score(neurons: Tensor, fidelity: Tensor, weights: Tensor, near: Tensor, per_expert: int, low: float, skip: float,
             ) -> Chosen:
    """HOBBIT's ladder (arXiv 2411.01433) on records that are far: of an expert before which others have more than `low`
    of the token's weight only the down row is fetched, beyond `skip` nothing. near bool [T, K]; 1 and 1: no change."""
    before = _of_expert(unimportance(weights), neurons, per_expert)
    coarse = torch.where(~near & (before > low) & (fidelity == REFINED), DOWN_ONLY, fidelity)
    return without(neurons, coarse, ~near & (before > skip))


def within_bits(neurons: Tensor, fidelity: Tensor, weights: Tensor, near: Tensor, per_expert: int, average: float,
                bits: tuple[float, float]) -> Chosen:
    """D2MoE's budget (arXiv 2504.15299) on nested codes: far records are refined, the heaviest expert's first (its
    hottest bits first), as long as the mean over all far records stays at or below `average` bits a weight; the others
    come without the refinement. bits: of a record without and with it."""
    far = (neurons >= 0) & ~near
    wanted = far & (fidelity == REFINED)
    spare = far.sum(1, keepdim=True) * (average - bits[0])
    heat = torch.where(wanted, _of_expert(weights, neurons, per_expert), -1.0)
    order = heat.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1)
    paid = (rank + 1) * (bits[1] - bits[0]) <= spare
    return neurons, torch.where(wanted & ~paid, DOWN_ONLY, fidelity)


def stand_in(weights: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """ResMoE's base expert (arXiv 2503.06881) for what is far, the best expert excepted: weights [T, k] of the experts
    that are computed, and [T] of the base. near bool [T, k], of the picks."""
    best = torch.zeros_like(near).scatter(1, weights.argmax(1, keepdim=True), True)
    missing = ~near & ~best
    return torch.where(missing, 0.0, weights), torch.where(missing, weights, 0.0).sum(1)


def without(neurons: Tensor, fidelity: Tensor, left_out: Tensor) -> Chosen:
    """Some neurons fewer, in the order and with the filling that the kernels expect."""
    gone = torch.where(left_out, torch.iinfo(torch.int32).max, neurons)
    gone = torch.where(gone < 0, torch.iinfo(torch.int32).max, gone)
    ordered, at = gone.sort(dim=1, stable=True)
    there = ordered < torch.iinfo(torch.int32).max
    return torch.where(there, ordered, -1), torch.where(there, fidelity.gather(1, at), 0)


def heard(neurons: Tensor, fidelity: Tensor, weights: Tensor, per_expert: int) -> Chosen:
    """Without the neurons of experts of weight 0."""
    return without(neurons, fidelity, _of_expert(weights, neurons, per_expert) == 0)


def _of_expert(values: Tensor, neurons: Tensor, per_expert: int) -> Tensor:
    """[T, K]: of values [T, k] each neuron's expert's."""
    return values.gather(1, (neurons.clamp(min=0) // per_expert).long())


def coarser(name: str, numbers: tuple[float, ...], neurons: Tensor, fidelity: Tensor, weights: Tensor, near: Tensor,
            per_expert: int, bits: tuple[float, float]) -> Chosen:
    """A rule by its name (engine/policies/choice.py)."""
    if name == "score":
        return by_score(neurons, fidelity, weights, near, per_expert, *numbers)
    assert name == "bits", name
    return within_bits(neurons, fidelity, weights, near, per_expert, numbers[0], bits)
