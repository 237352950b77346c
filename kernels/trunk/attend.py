"""Attention of a step: norms and rotation of queries and keys, the cache's new rows, softmax over what it holds.

Legend: T tokens of a step, Q query heads, C heads of the cache (Q a multiple of C), D of a head, N rows of the cache.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.dispatch import twin

Tensor = torch.Tensor


class Heads(NamedTuple):
    """How one layer attends. norms float32 of queries and keys: [D], over each head; [Q * D] and [C * D], over all
    heads at once; or None."""

    queries: int
    cached: int
    size: int
    scale: float
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    epsilon: float = 0.0


@twin(None, "kernels.cpu.trunk.attend")
def attend(projected: Tensor, turn: Tensor, keys: Tensor, values: Tensor, position: int, heads: Heads) -> Tensor:
    """projected float32 [T, (Q + 2C) * D], queries, keys and values one behind the other -> [T, Q * D].

    turn float32 [2, T, D]: cosines and sines of the tokens' positions, halves of a head turning against each other.
    keys, values float32 [1, C, N, D], any stride between heads: rows position .. position + T - 1 are written; token t
    sees those before it and its own.
    """
    n, size, (queries, cached) = len(projected), heads.size, (heads.queries, heads.cached)
    q, k, v = projected.split((queries * size, cached * size, cached * size), -1)
    q, k = (_turned(_normed(part, norm, heads).view(n, -1, size), turn)
            for part, norm in ((q, heads.query_norm), (k, heads.key_norm)))
    end = position + n
    keys[0, :, position:end], values[0, :, position:end] = k.transpose(0, 1), v.view(n, -1, size).transpose(0, 1)
    seen = torch.arange(end)[None] <= torch.arange(position, end)[:, None]
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys[:, :, :end], values[:, :, :end],
                                         attn_mask=seen, scale=heads.scale, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(n, -1)


def _normed(x: Tensor, norm: Tensor | None, heads: Heads) -> Tensor:
    """x [T, heads * D]"""
    if norm is None:
        return x
    grouped = x.unflatten(-1, (-1, norm.numel()))
    return (norm * (grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + heads.epsilon))).flatten(-2)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """x [T, heads, D]"""
    cosines, sines = turn[:, :, None]
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines
