"""What the experts of a layer have in common: ResMoE's barycenter (arXiv 2503.06881), and whether there is any.

An expert's neurons have no order, so each expert is first turned so that its neurons lie beside the ones of the centre
that they are most like; the centre is the mean of all, and so on. The paper pairs them by optimal transport, here each
pair is taken that nothing else would be better for: where there is a common part the pairs are plain, and where there
is none no pairing finds it. A model whose experts were copied from one and trained on has it; one that was trained as a
mixture has not.

Legend: N experts of a layer, I neurons, D numbers of a neuron (gate, up and down).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
ROUNDS = 3
MOST_LEFT = 0.9  # of what experts without anything in common leave; above, a base expert is noise


@dataclass(frozen=True)
class Common:
    """base float32 [I, D]: the centre. left: energy of what it does not explain over all energy, 0..1; of N experts
    that have nothing in common 1 - 1/N is left."""

    base: Tensor
    left: float
    experts: int

    @property
    def unexplained(self) -> float:
        """`left` as a share of what experts without a common part leave: 0 for copies, 1 for none."""
        return self.left / (1 - 1 / self.experts)

    @property
    def is_there(self) -> bool:
        return self.unexplained <= MOST_LEFT


def common_part(neurons: Callable[[int], Tensor], n: int) -> Common:
    """neurons(e): the neurons of expert e, float32 [I, D]; asked for several times. n: experts, two or more."""
    centre = neurons(0)
    for _ in range(ROUNDS):
        total, energy = torch.zeros_like(centre), 0.0
        for e in range(n):
            own = neurons(e)
            total += own[paired(centre, own)]
            energy += float(own.double().square().sum())
        centre = total / n
    explained = n * float(centre.double().square().sum()) / energy  # of a mean: what is left is the rest
    return Common(centre, 1 - explained, n)


def paired(centre: Tensor, own: Tensor) -> Tensor:
    """int64 [I]: for every neuron of the centre [I, D] one of `own` [I, D], each once. Pairs that like each other best
    go first, then those of what remains."""
    alike = 2 * centre @ own.T - own.square().sum(1)  # less the centre's own length: the nearest first
    found = torch.full((len(centre),), -1, dtype=torch.int64)
    while (free := (found < 0).nonzero()[:, 0]).numel():
        rest = torch.ones(len(own), dtype=torch.bool)
        rest[found[found >= 0]] = False
        others = rest.nonzero()[:, 0]
        open_pairs = alike[free][:, others] - centre[free].square().sum(1, keepdim=True)
        best, back = open_pairs.argmax(1), open_pairs.argmax(0)
        mutual = back[best] == torch.arange(len(free))
        found[free[mutual]] = others[best[mutual]]
    return found
