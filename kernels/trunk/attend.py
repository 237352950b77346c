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
    heads at once; or None; of values [D] or None. gated: behind a head's query stand as many numbers again, its gate.
    window: how many tokens one sees, itself among them; 0: all. sinks [Q]: a score of each head's that takes its share
    and gives nothing. in_one: keys and values are projected once, and only then told apart by norms and rotation. held:
    the new rows stand in the cache already, and queries alone are given, as they are multiplied."""

    queries: int
    cached: int
    size: int
    scale: float
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    epsilon: float = 0.0
    gated: bool = False
    window: int = 0
    sinks: Tensor | None = None
    value_norm: Tensor | None = None
    in_one: bool = False
    held: bool = False

    @property
    def width(self) -> int:
        """Of a row of projections: queries, keys and values one behind the other."""
        if self.held:
            return self.queries * self.size
        return (self.queries * (1 + self.gated) + (2 - self.in_one) * self.cached) * self.size


@twin("kernels.gpu.trunk.attend", "kernels.cpu.trunk.attend")
def attend(projected: Tensor, turn: Tensor, keys: Tensor, values: Tensor, position: int | Tensor, heads: Heads,
           rows: Tensor | None = None) -> Tensor:
    """projected float32 [T, heads.width] -> [T, Q * D], times the gates' sigmoids where there are such.

    turn float32 [2, T, R]: cosines and sines of the tokens' positions, for the first R numbers of a head, whose halves
    turn against each other.
    keys, values float [1, C, N, D], any stride between heads: token t sees the rows of the positions before `position`,
    then the new ones up to its own, as the cache keeps them, and of both what is in its window. Row = position; they
    are written to rows position .. position + T - 1. With `rows` int64 [T] they are written where it says, the position
    is an int64 of the device, too, so that a recorded step goes on with both, and row = position modulo N - 1: in the
    last one nobody reads. Where that turns round, N >= window + T.
    Where the rows are held, projected is of the cache's type, as is what comes back, and turn is not asked for.
    """
    n, start, length = len(projected), int(position), keys.shape[2] - (rows is not None)
    at = torch.arange(start, start + n) if rows is None else rows
    if heads.held:
        q, gate = projected.float().view(n, -1, heads.size), None
        new = [kept[0, :, at] for kept in (keys, values)]
    else:
        q, gate, new = _entering(projected, turn, heads, keys.dtype)
    seen = torch.arange(max(0, start - length, start + 1 - heads.window if heads.window else 0), start + n)
    both = [torch.cat((kept[:, :, seen[:-n] % length], own[None]), 2).float()
            for kept, own in zip((keys, values), new, strict=True)]
    keys[0, :, at], values[0, :, at] = new
    own = torch.arange(start, start + n)[:, None]
    hidden = seen > own if not heads.window else (seen > own) | (seen <= own - heads.window)
    mask = torch.zeros(n, len(seen)).masked_fill(hidden, -torch.inf)
    if heads.sinks is not None:     # a key of zeros, whose score is the sink, and a value of zeros
        both = [F.pad(part, (0, 0, 0, 1)) for part in both]
        mask = torch.cat((mask.expand(heads.queries, -1, -1), heads.sinks.float()[:, None, None].expand(-1, n, 1)), -1)
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], *both, attn_mask=mask, scale=heads.scale,
                                         enable_gqa=True)
    out = out[0].transpose(0, 1).reshape(n, -1).to(projected.dtype)
    return out if gate is None else out * gate.sigmoid()


def _entering(projected: Tensor, turn: Tensor, heads: Heads, kept: torch.dtype) -> tuple[Tensor, Tensor | None, list]:
    """-> queries [T, Q, D], gates [T, Q * D], keys and values [C, T, D] as the cache keeps them."""
    q, k, v, gate = _parts(projected, heads)
    q, k, v = (_normed(part, norm, heads).view(len(projected), -1, heads.size) for part, norm in (
        (q, heads.query_norm), (k, heads.key_norm), (v, heads.value_norm)))
    return _turned(q, turn), gate, [part.transpose(0, 1).to(kept) for part in (_turned(k, turn), v)]


def _parts(projected: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """-> queries, keys, values and gates [T, heads * D]."""
    kept = heads.cached * heads.size
    q, *rest = projected.split((heads.width - (2 - heads.in_one) * kept, *[kept] * (2 - heads.in_one)), -1)
    if not heads.gated:
        return q, rest[0], rest[-1], None
    q, gate = (part.flatten(1) for part in q.unflatten(1, (heads.queries, 2, heads.size)).unbind(2))
    return q, rest[0], rest[-1], gate


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
