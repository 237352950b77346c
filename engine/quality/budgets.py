"""How many neurons each layer keeps: the fewest bytes for a given loss, by equal marginal loss per byte.

Every layer brings two errors of its output, on a grid of budgets: what the neurons left out miss, and what those miss
that are computed from the sketch, with only their down row fetched. Dropped neurons miss in the same direction, coarse
ones at random, and the same square hurts far less then (0.1 to 0.2 of the loss, on the pilot model): so both kinds have
their own loss per error, measured, and so has every layer. With them the loss of a model is a sum, and a price per
byte decides each layer alone.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.experts.runtime import Runtime
from engine.quality.sparse_forward import LayerTrace
from kernels.layout import Layout

Tensor = torch.Tensor
Budgets = tuple[tuple[int, int], ...]  # (refined, down-only) neurons per layer
# Where the tables are sampled, as shares of a layer's k*I neurons.
SHARES = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.275, 0.3, 0.35, 0.4, 0.45, 0.5,
          0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)


def edges(n: int) -> list[int]:
    """The sampled numbers of neurons, from 0 to n."""
    return sorted({round(share * n) for share in SHARES})


@dataclass(frozen=True)
class LayerTable:
    """Mean squared output error per token, on the grid `edges` of S numbers of neurons.

    dropped float64 [S]: with the best edges[j] kept. coarse float64 [S, S]: of the neurons between edges[i] and
    edges[j] >= edges[i] when they are coarse. loss_per_dropped, loss_per_coarse: nats per unit of either.
    """

    edges: tuple[int, ...]
    dropped: Tensor
    coarse: Tensor
    loss_per_dropped: float = 1.0
    loss_per_coarse: float = 1.0

    @property
    def losses(self) -> Tensor:
        """Predicted loss in nats [S, S], refined by row, kept by column."""
        return self.loss_per_dropped * self.dropped[None] + self.loss_per_coarse * self.coarse

    def nearest(self, share: float) -> int:
        return min(self.edges, key=lambda n: abs(n - share * self.edges[-1]))

    def loss(self, refined: int, down_only: int) -> float:
        return float(self.losses[self.edges.index(refined), self.edges.index(refined + down_only)])

    def best(self, layout: Layout, price: float) -> tuple[int, int]:
        """The pair that minimises loss + price * bytes, with one neuron at least; price in nats per byte."""
        count = torch.tensor(self.edges, dtype=torch.float64)
        n_bytes = count[:, None] * (layout.record - layout.prefix) + count[None, :] * layout.prefix
        cost = self.losses + price * n_bytes
        cost = cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(-1), math.inf)
        cost[:, 0] = math.inf
        i, j = divmod(int(cost.argmin()), len(self.edges))
        return self.edges[i], self.edges[j] - self.edges[i]


def cheapest(tables: list[LayerTable], layout: Layout, loss: float) -> Budgets:
    """The allocation of the highest price whose predicted loss is at most `loss` (nats): bisection over the price."""
    low, high = -40.0, 10.0  # logarithm of nats per byte
    for _ in range(40):
        middle = (low + high) / 2
        budgets = tuple(table.best(layout, math.exp(middle)) for table in tables)
        predicted = sum(table.loss(*pair) for table, pair in zip(tables, budgets, strict=True))
        low, high = (middle, high) if predicted <= loss else (low, middle)
    return tuple(table.best(layout, math.exp(low)) for table in tables)


def record_bytes(budgets: Budgets, layout: Layout) -> int:
    """Bytes of records one token asks for, all layers together."""
    return sum(refined * layout.record + down_only * layout.prefix for refined, down_only in budgets)


class OutputErrors:
    """Squared output errors of every layer, summed over the tokens that were seen, for every pair of the grid."""

    def __init__(self, runtime: Runtime) -> None:
        self.edges = edges(runtime.top_k * runtime.far.neurons)
        self.dropped = torch.zeros(runtime.far.layers, len(self.edges), dtype=torch.float64)
        self.coarse = torch.zeros(runtime.far.layers, len(self.edges), len(self.edges), dtype=torch.float64)
        self.tokens = [0] * runtime.far.layers

    def see(self, seen: LayerTrace) -> None:
        """What each band of ranks adds to the output, and what is missed of it when it is coarse; then every pair."""
        dropped, coarse = self._bands(seen)                                  # [S-1, T, H]
        lost = _before(dropped.flip(0)).flip(0)                              # [S, T, H]: bands from j on are dropped
        missed = _before(coarse)                                             # bands before j are coarse
        self.dropped[seen.layer] += lost.square().sum((1, 2)).double().cpu()
        for i in range(len(self.edges)):
            error = (missed[i:] - missed[i]).square().sum((1, 2))
            self.coarse[seen.layer, i, i:] += error.double().cpu()
        self.tokens[seen.layer] += len(seen.ids)

    def _bands(self, seen: LayerTrace) -> tuple[Tensor, Tensor]:
        rank = seen.scores.argsort(dim=1, descending=True).argsort(dim=1)
        inner = torch.tensor(self.edges[1:-1], device=rank.device)
        band = torch.bucketize(rank, inner, right=True).view(seen.refined.shape)
        whole = seen.refined * seen.weights[..., None]
        missed = whole - seen.coarse * seen.weights[..., None]
        hidden = next(iter(seen.downs.values())).shape[1]
        out = torch.zeros(2, len(self.edges) - 1, len(seen.ids), hidden, device=rank.device)
        for e, down in seen.downs.items():
            token, place = (seen.ids == e).nonzero(as_tuple=True)
            for j in range(len(self.edges) - 1):
                there = band[token, place] == j
                out[0, j].index_add_(0, token, (whole[token, place] * there) @ down)
                out[1, j].index_add_(0, token, (missed[token, place] * there) @ down)
        return out[0], out[1]

    def tables(self) -> list[LayerTable]:
        return [LayerTable(tuple(self.edges), dropped / max(1, n), coarse / max(1, n))
                for dropped, coarse, n in zip(self.dropped, self.coarse, self.tokens, strict=True)]


def _before(bands: Tensor) -> Tensor:
    """[S-1, ...] -> [S, ...]: the sum of the bands before each edge."""
    return torch.cat((torch.zeros_like(bands[:1]), bands.cumsum(0)))
