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
    heads at once; or None. gated: behind a head's query stand as many numbers again, its gate."""

    queries: int
    cached: int
    size: int
    scale: float
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    epsilon: float = 0.0
    gated: bool = False

    @property
    def width(self) -> int:
        """Of a row of projections: queries, keys and values one behind the other."""
        return (self.queries * (1 + self.gated) + 2 * self.cached) * self.size


@twin("kernels.gpu.trunk.attend", "kernels.cpu.trunk.attend")
def attend(projected: Tensor, turn: Tensor, keys: Tensor, values: Tensor, position: int | Tensor, heads: Heads,
           rows: Tensor | None = None) -> Tensor:
    """projected float32 [T, heads.width] -> [T, Q * D], times the gates' sigmoids where there are such.

    turn float32 [2, T, R]: cosines and sines of the tokens' positions, for the first R numbers of a head, whose halves
    turn against each other.
    keys, values float [1, C, N, D], any stride between heads: token t sees rows 0 .. position - 1, then the new ones
    up to its own, as the cache keeps them. They are written to rows position .. position + T - 1, or where `rows` int64
    [T] says: then the position is an int64 of the device, too, so that a recorded step goes on with both.
    """
    n, size, (queries, cached) = len(projected), heads.size, (heads.queries, heads.cached)
    q, k, v = projected.split((heads.width - 2 * cached * size, cached * size, cached * size), -1)
    gate = None
    if heads.gated:
        q, gate = (part.flatten(1) for part in q.unflatten(1, (queries, 2, size)).unbind(2))
    q, k = (_turned(_normed(part, norm, heads).view(n, -1, size), turn)
            for part, norm in ((q, heads.query_norm), (k, heads.key_norm)))
    start = int(position)
    at = torch.arange(start, start + n) if rows is None else rows
    new = [part.transpose(0, 1).to(keys.dtype) for part in (k, v.view(n, -1, size))]
    both = [torch.cat((kept[:, :, :start], own[None]), 2).float()
            for kept, own in zip((keys, values), new, strict=True)]
    keys[0, :, at], values[0, :, at] = new
    seen = torch.arange(start + n)[None] <= torch.arange(start, start + n)[:, None]
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], *both, attn_mask=seen, scale=heads.scale,
                                         enable_gqa=True)
    out = out[0].transpose(0, 1).reshape(n, -1)
    return out if gate is None else out * gate.sigmoid()


def _normed(x: Tensor, norm: Tensor | None, heads: Heads) -> Tensor:
    """x [T, heads * D]"""
    if norm is None:
        return x
    grouped = x.unflatten(-1, (-1, norm.numel()))
    return (norm * (grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + heads.epsilon))).flatten(-2)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """x [T, heads, D]"""
    cosines, sines = turn[:, :, None]
    turning, still = x[..., :turn.shape[-1]], x[..., turn.shape[-1]:]
    first, second = turning.chunk(2, -1)
    return torch.cat((turning * cosines + torch.cat((-second, first), -1) * sines, still), -1)
