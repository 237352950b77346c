"""What a specialist's experts are made of: each a sum of the model's own, and the router's rows likewise.

EEP's two matrices (arXiv 2407.00945), a pair for every layer: theta'_j = sum_i W_EM[j, i] theta_i for the experts, and
W_RM for the router. The paper mixes the router's probabilities; here W_RM mixes its rows, so that what comes out is an
ordinary router and the folder an ordinary folder. With one-hot rows both are the same: experts that are left out are
masked.

Legend: L layers, E experts of the model, n of the specialist.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from engine.policies.usage import Usage

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Mixture:
    """experts (W_EM), router (W_RM): float32 [L, n, E]."""

    experts: Tensor
    router: Tensor

    def __post_init__(self) -> None:
        assert self.experts.shape == self.router.shape and self.experts.dtype == self.router.dtype == torch.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.experts.shape)

    def single(self, layer: int, j: int) -> int | None:
        """The one expert of the model that j is, unchanged; None where it is mixed."""
        parts = self.experts[layer, j].nonzero()[:, 0].tolist()
        return parts[0] if len(parts) == 1 and self.experts[layer, j, parts[0]] == 1 else None


def identity(layers: int, experts: int) -> Mixture:
    """The model itself."""
    own = torch.eye(experts).repeat(layers, 1, 1)
    return Mixture(own, own)


def masked(kept: Iterable[Iterable[int]], experts: int) -> Mixture:
    """Only the experts `kept` of each layer [L, n]."""
    rows = torch.nn.functional.one_hot(torch.as_tensor(np.asarray(kept)).long(), experts).float()
    return Mixture(rows, rows)


def merged(usage: Usage, kept: np.ndarray, likeness: Tensor) -> Mixture:
    """Every expert that is left out joins the kept one that it is most like; each then is the mean of its group, by
    use (MEO's weighted sum of parameters, arXiv 2310.09832). The router keeps the rows of `kept`.

    kept int64 [L, n]; likeness float32 [L, E, E]: the higher, the more alike.
    """
    plain = masked(kept, usage.hard.shape[1])
    belongs = likeness.gather(2, torch.from_numpy(kept)[:, None].expand(-1, likeness.shape[1], -1)).argmax(2)  # [L, E]
    rows = torch.nn.functional.one_hot(belongs, kept.shape[1]).float().transpose(1, 2)
    rows = torch.maximum(rows * (1 - plain.router.sum(1, keepdim=True)), plain.router)
    weighed = rows * torch.from_numpy(usage.hard).float()[:, None]
    whole = weighed.sum(2, keepdim=True)
    return Mixture(torch.where(whole > 0, weighed / whole.clamp_min(1), plain.experts), plain.router)


def alike(routers: Iterable[Tensor]) -> Tensor:
    """float32 [L, E, E]: the cosine of the router's rows [E, H] of every layer: what is asked for together."""
    rows = torch.stack([torch.nn.functional.normalize(rows.float(), dim=1) for rows in routers])
    return rows @ rows.transpose(1, 2)
