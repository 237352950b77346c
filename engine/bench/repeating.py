"""Made-up router picks with a given repeat rate, in place of a made-up router's: only for synthetic models.

A random router picks by chance and a cache would look worse than it is. Here every pick of the token before stays with
probability `repeat`, else another expert takes its place. The list lies on the device and its position is a tensor, so
a recorded step follows it as well.
"""
from __future__ import annotations

import numpy as np
import torch

from engine.experts.host import LayerExperts, Runtime

Tensor = torch.Tensor
N_TOKENS = 1024  # then the list begins again


def picks(layers: int, experts: int, top_k: int, repeat: float, n_tokens: int = N_TOKENS, seed: int = 0) -> Tensor:
    """int64 [N, L, k]: different experts within a row. repeat: share of a token's picks that the last one had."""
    draw = np.random.default_rng(seed)
    found = np.empty((n_tokens, layers, top_k), np.int64)
    found[0] = draw.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)[:, :top_k]
    for token in range(1, n_tokens):
        stays = draw.random((layers, top_k)) < repeat
        for layer in range(layers):
            last = found[token - 1, layer]
            others = np.setdiff1d(np.arange(experts), last)
            new = draw.choice(others, top_k, replace=len(others) < top_k)
            found[token, layer] = np.where(stays[layer] | (len(others) < top_k), last, new)
    return torch.from_numpy(found)


def follow(runtime: Runtime, repeat: float, position: Tensor | None = None, seed: int = 0) -> None:
    """From now on decode steps of one token take their experts from such a list; the router's weights stay.

    position: a tensor that somebody else counts, such as the cache's; without one every step counts.
    """
    far, forward = runtime.far, runtime.forward
    table = picks(far.layers, far.experts, runtime.top_k, repeat, seed=seed).to(runtime.device)
    at = torch.zeros((), dtype=torch.int64, device=runtime.device) if position is None else position

    def following(layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if len(x) == 1 and runtime.phase != "prefill":
            if layer.index == 0 and position is None:
                at.add_(1)
            ids = table[:, layer.index].index_select(0, at[None] % len(table)).to(ids.device)
        return forward(layer, x, ids, weights)
    runtime.forward = following
