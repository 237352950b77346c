"""EEP's evolutionary search (arXiv 2407.00945): which experts a specialist keeps, then how they are mixed.

It needs losses alone, no gradients. A third of the rounds chooses among one-hot rows, beginning with what the counts
say and with chance: a child takes each layer's experts from two parents, and some are replaced. The rest lets both
matrices go apart from one-hot rows: some rows of the best get noise. A child takes the place of the worst of the
population where it loses less on the same examples. Every round draws from a seed of its own and is kept on the disk,
so a search that was killed goes on to the same end.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.core import UserError
from engine.disk import writing
from engine.quality.specialists.mixture import Mixture, masked

LEAST_EXAMPLES = 200    # a difference on fewer is chance
POPULATION = 8
REPLACED = 0.15         # of a child's experts, by others; EEP's rate
NOISY = 0.3             # of a child's rows
NOISE = 0.065           # standard deviation; EEP's
PRUNING = 1 / 3         # of the rounds; EEP: 40 of 200
Score = Callable[[Mixture], float]
Told = Callable[[int, int, float], None]  # (rounds done, rounds, the least loss so far)


@dataclass
class Population:
    """members with the loss of each, and how many rounds they have seen."""

    members: list[Mixture]
    losses: list[float]
    rounds: int = 0

    @property
    def best(self) -> Mixture:
        return self.members[int(np.argmin(self.losses))]

    def challenge(self, child: Mixture, found: float) -> None:
        worst = int(np.argmax(self.losses))
        if found < self.losses[worst]:
            self.members[worst], self.losses[worst] = child, found

    def save(self, path: Path) -> None:
        with writing(path), path.open("wb") as file:
            np.savez(file, experts=np.stack([member.experts.numpy() for member in self.members]),
                     router=np.stack([member.router.numpy() for member in self.members]),
                     losses=np.array(self.losses), rounds=np.int64(self.rounds))

    @staticmethod
    def load(path: Path) -> Population:
        """UserError for a file that is damaged."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                pairs = zip(torch.from_numpy(stored["experts"]), torch.from_numpy(stored["router"]), strict=True)
                return Population([Mixture(*pair) for pair in pairs], stored["losses"].tolist(), int(stored["rounds"]))
        except (OSError, ValueError, KeyError, AssertionError) as error:
            raise UserError(f"{path} is damaged; delete {path.parent} and start again.") from error


def search(starts: Sequence[np.ndarray], experts: int, rounds: int, score: Score, log: Path,
           tell: Told = lambda done, rounds, least: None) -> Mixture:
    """starts: kept experts [L, n] to begin with. score: the loss on the examples. log: of an interrupted search."""
    if log.is_file():
        population = Population.load(log)
    else:
        population = _first(starts, experts, score)
        population.save(log)
    pruning = round(rounds * PRUNING)
    while population.rounds < rounds:
        draw = torch.Generator().manual_seed(population.rounds + 1)
        child = _crossed(population, draw) if population.rounds < pruning else _noisy(population, draw)
        population.challenge(child, score(child))
        population.rounds += 1
        population.save(log)
        tell(population.rounds, rounds, min(population.losses))
    return population.best


def _first(starts: Sequence[np.ndarray], experts: int, score: Score) -> Population:
    layers, n = starts[0].shape
    draw = torch.Generator().manual_seed(0)
    while len(starts) < POPULATION:
        starts = [*starts, torch.stack([torch.randperm(experts, generator=draw)[:n] for _ in range(layers)]).numpy()]
    members = [masked(kept, experts) for kept in starts]
    return Population(members, [score(member) for member in members])


def _parent(population: Population, draw: torch.Generator) -> Mixture:
    """The better of two."""
    one, other = torch.randint(len(population.members), (2,), generator=draw).tolist()
    return population.members[one if population.losses[one] <= population.losses[other] else other]


def _crossed(population: Population, draw: torch.Generator) -> Mixture:
    """Each layer's experts from those of two parents, some replaced by others; none twice."""
    one, other = (_parent(population, draw).experts.argmax(2) for _ in range(2))
    experts, n = population.best.shape[2], one.shape[1]
    kept = []
    for mine, theirs in zip(one, other, strict=True):
        wish = torch.rand(experts, generator=draw)  # in 0..1: chance alone
        for parent in (mine, theirs):
            wish[parent] += (torch.rand(n, generator=draw) > REPLACED).float()  # what both have is likely to stay
        kept.append(wish.topk(n).indices.sort().values)
    return masked(torch.stack(kept).numpy(), experts)


def _noisy(population: Population, draw: torch.Generator) -> Mixture:
    parent = _parent(population, draw)

    def noisy(rows: torch.Tensor) -> torch.Tensor:
        chosen = torch.rand(rows.shape[:2], generator=draw) < NOISY
        return rows + NOISE * torch.randn(rows.shape, generator=draw) * chosen[..., None]
    return Mixture(noisy(parent.experts), noisy(parent.router))
