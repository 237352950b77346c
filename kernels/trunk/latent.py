"""Latent attention of a step (DeepSeek-V2, arXiv 2405.04434): the cache holds one short row a token, for all heads.

A head's keys and values are that row times the head's part of one matrix, and beside its keys one turned key is shared
by all. Nothing is expanded here: a query goes through its head's part the other way and meets the rows as they are, and
what it finds of them goes through the values' part at the end. So what a token reads grows by one row a token.

Legend: T tokens of a step, Q heads, N rows of the cache, R numbers of a row, P of a turned key.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import twin
from kernels.trunk.linear import Matrices, decode

Tensor = torch.Tensor


class Latent(NamedTuple):
    """How one layer attends. A head's query: `still` numbers that meet the expanded keys, then P that turn; `values`:
    numbers of a head's output. norm float [R], of new rows. expand: one matrix [Q * (still + values), R], a head's keys
    and then its values. Of what turns, pairs are neighbours as projected, or halves; as cached likewise."""

    heads: int
    rank: int
    still: int
    turning: int
    values: int
    scale: float
    norm: Tensor
    epsilon: float
    expand: Matrices
    neighbours: bool = False
    cached_neighbours: bool = False


@twin("kernels.gpu.trunk.latent", "kernels.cpu.trunk.latent")
def attend_latent(query: Tensor, new: Tensor, turn: Tensor, rows: Tensor, keys: Tensor, position: int | Tensor,
                  latent: Latent, places: Tensor | None = None) -> Tensor:
    """query float32 [T, Q * (still + P)], new float32 [T, R + P], both contiguous -> [T, Q * values].

    turn float32 [2, T, P/2 or more]: cosines and sines of the tokens' positions.
    rows float [1, 1, N, R], keys float [1, 1, N, P]: token t sees 0 .. position - 1, then the new ones up to its own,
    as the cache keeps them. They are written to position .. position + T - 1, or to `places` int64 [T]: then the
    position is an int64 of the device, too, so that a recorded step goes on with both.
    """
    n, start = len(query), int(position)
    at = torch.arange(start, start + n) if places is None else places
    still, turning = query.view(n, latent.heads, -1).split((latent.still, latent.turning), -1)
    row, key = new.split((latent.rank, latent.turning), -1)
    row = latent.norm * (row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + latent.epsilon))
    turning, key = _turned(turning, turn, latent), _turned(key[:, None], turn, latent)[:, 0]
    seen_rows, seen_keys = (torch.cat((kept[0, 0, :start], own.to(kept.dtype))).float()
                            for kept, own in ((rows, row), (keys, key)))
    rows[0, 0, at], keys[0, 0, at] = row.to(rows.dtype), key.to(keys.dtype)
    codes, scales, _ = latent.expand.parts[0]
    matrix = (codes.float() if scales is None else decode(codes, scales)).view(latent.heads, -1, latent.rank)
    to_keys, to_values = matrix.split((latent.still, latent.values), 1)
    scores = torch.einsum("tqs,qsr,nr->tqn", still, to_keys, seen_rows)
    scores = (scores + torch.einsum("tqp,np->tqn", turning, seen_keys)) * latent.scale
    unseen = torch.arange(start + n)[None] > torch.arange(start, start + n)[:, None]
    shares = scores.masked_fill(unseen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("tqn,nr,qvr->tqv", shares, seen_rows, to_values).flatten(1)


def _turned(x: Tensor, turn: Tensor, latent: Latent) -> Tensor:
    """x [T, heads, P]"""
    half = latent.turning // 2
    cosines, sines = turn[:, :, None, :half]
    a, b = x.unflatten(-1, (half, 2)).unbind(-1) if latent.neighbours else x.split(half, -1)
    both = a * cosines - b * sines, b * cosines + a * sines
    return torch.stack(both, -1).flatten(-2) if latent.cached_neighbours else torch.cat(both, -1)
