"""A window of tokens has one budget a layer: the best of what all want, by their shares of each token's total."""
from __future__ import annotations

import pytest
import torch

from engine.experts.window import chosen
from kernels.select import DOWN_ONLY, REFINED, select

K, N = 2, 6     # routed experts, neurons of each


@pytest.mark.parametrize("refined, total", [(0, 0), (3, 7), (10, 10), (5, 40)])
@pytest.mark.parametrize("ids", [[[3, 1], [1, 0], [5, 3], [3, 1]], [[0, 1], [2, 3]], [[4, 2]]])
def test_the_best_for_all_are_kept_and_each_token_gets_its_own(ids, refined, total):
    ids, total = torch.tensor(ids), min(total, len(ids) * K * N)
    refined = min(refined, total)
    draw = torch.Generator().manual_seed(3)
    scores = torch.rand(len(ids), K * N, generator=draw) * 10 ** torch.arange(len(ids))[:, None]
    scores[0, 4] = 0
    wanted: dict[tuple[int, int], float] = {}
    for row, experts in zip(scores / scores.sum(1, keepdim=True), ids.tolist(), strict=True):
        for at, share in enumerate(row.tolist()):
            wanted[experts[at // N], at % N] = wanted.get((experts[at // N], at % N), 0) + share
    best = sorted(wanted, key=wanted.get, reverse=True)[:total]
    neurons, fidelity = chosen(scores, ids, (refined, total), total, None)
    for experts, found, kinds in zip(ids.tolist(), neurons.tolist(), fidelity.tolist(), strict=True):
        expected = {experts.index(expert) * N + neuron: REFINED if place < refined else DOWN_ONLY
                    for place, (expert, neuron) in enumerate(best) if expert in experts}
        assert found == sorted(expected) + [-1] * (total - len(expected))
        assert kinds == [expected[at] for at in sorted(expected)] + [0] * (total - len(expected))
    if len(ids) == 1:
        assert torch.equal(neurons, select(scores, refined, total)[0])


def test_a_token_of_large_numbers_crowds_out_none():
    small = torch.rand(1, K * N, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1], [2, 3]])
    neurons, _ = chosen(torch.cat((small, 1e6 * small)), ids, (4, 8), 8, None)
    assert torch.equal(*neurons) and int((neurons[0] >= 0).sum()) == 4
