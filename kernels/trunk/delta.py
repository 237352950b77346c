"""A step of a gated delta-net (Yang et al., arXiv 2412.06464): convolution, norms, recurrence and gated norm.

A head keeps a matrix [Dk, Dv] instead of the keys and values of all tokens. Each token lets it decay, asks it for what
it holds under the token's key, and replaces a share of that by the token's value.

Legend: T tokens of a step; Hk heads of keys and queries, Hv of values (a multiple); Dk, Dv of a head; C = 2 Hk Dk +
Hv Dv channels of the convolution, W its width.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.dispatch import twin

Tensor = torch.Tensor
LEAST = 1e-6  # beneath the square root of a query's and a key's norm


class Mixer(NamedTuple):
    """How one layer mixes. by_head: its projections come as queries, keys, values and gates of one head of keys after
    the other, then shares and decays likewise; else each kind for all heads at once. Tensors float32: convolution
    [C, W] in the order of kinds; rate [Hv], minus the exponential of A_log; bias [Hv] of the decays; norm [Dv]."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    by_head: bool
    convolution: Tensor
    rate: Tensor
    bias: Tensor
    norm: Tensor
    epsilon: float

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_size + self.value_heads * self.value_size

    @property
    def width(self) -> int:
        """Of a row of projections."""
        return self.channels + self.value_heads * (self.value_size + 2)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers a head of keys: queries, keys, values, gates, shares, decays."""
        per = self.value_heads // self.key_heads
        return self.key_size, self.key_size, per * self.value_size, per * self.value_size, per, per

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Of each of these kinds: where it begins in a row of projections, and how far it is to the next head of
        keys."""
        found, first = [], 0
        for kinds in (self.sizes[:4], self.sizes[4:]):
            if self.by_head:
                found += [(first + sum(kinds[:i]), sum(kinds)) for i in range(len(kinds))]
            else:
                found += [(first + self.key_heads * sum(kinds[:i]), size) for i, size in enumerate(kinds)]
            first += self.key_heads * sum(kinds)
        return tuple(found)


@twin("kernels.gpu.trunk.delta", "kernels.cpu.trunk.delta")
def delta(projected: Tensor, columns: Tensor, state: Tensor, mixer: Mixer, row: Tensor | None = None) -> Tensor:
    """projected float32 [T, mixer.width] -> [T, Hv * Dv], normed and gated.

    columns float [R, C, W], the last ones that the convolution saw, and state float32 [R, Hv, Dk, Dv]: row 0 of each is
    read, and what they are after T tokens is written to row `row`, int64 [1], or to 0. New columns count as `columns`
    keeps them.
    """
    n_tokens, at = len(projected), slice(0, 1) if row is None else row
    q, k, v, z, b, a = _kinds(projected, mixer)
    seen = torch.cat((columns[0].T.float(), torch.cat((q, k, v), 1).to(columns.dtype).float()))
    mixed = F.silu(F.conv1d(seen.T[None], mixer.convolution[:, None], groups=mixer.channels)[0].T[-n_tokens:])
    columns[at] = seen[n_tokens:].T.to(columns.dtype)[None]
    q, k, v = mixed.split((q.shape[1], k.shape[1], v.shape[1]), 1)
    per = mixer.value_heads // mixer.key_heads
    q, k = (_unit(x.view(n_tokens, -1, mixer.key_size)).repeat_interleave(per, 1) for x in (q, k))
    v = v.reshape(n_tokens, -1, mixer.value_size)
    share, left = b.sigmoid(), (mixer.rate * F.softplus(a + mixer.bias)).exp()
    held, out = state[0].float(), torch.empty_like(v)
    for t in range(n_tokens):
        held = held * left[t, :, None, None]
        change = (v[t] - (held * k[t, ..., None]).sum(1)) * share[t, :, None]
        held = held + k[t, ..., None] * change[:, None]
        out[t] = (held * q[t, ..., None]).sum(1) * mixer.key_size ** -0.5
    state[at] = held[None]
    normed = mixer.norm * (out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + mixer.epsilon))
    return (normed.flatten(1) * F.silu(z)).contiguous()


def _kinds(projected: Tensor, mixer: Mixer) -> list[Tensor]:
    """Queries, keys, values, gates, shares and decays, [T, all heads] each."""
    heads = torch.arange(mixer.key_heads, device=projected.device)[:, None]
    return [projected[:, (first + stride * heads + torch.arange(size, device=projected.device)).flatten()]
            for (first, stride), size in zip(mixer.places, mixer.sizes, strict=True)]


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + LEAST)
