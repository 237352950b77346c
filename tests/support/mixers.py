"""A random gated delta-net's layer, and what it is given."""
from __future__ import annotations

import torch

from kernels.trunk.delta import Mixer


def random_mixer(key_heads: int, per: int, key_size: int, value_size: int, by_head: bool, width: int = 4,
                 seed: int = 0) -> Mixer:
    """per: heads of values a head of keys; width: of the convolution."""
    draw, heads = torch.Generator().manual_seed(seed), key_heads * per
    channels = 2 * key_heads * key_size + heads * value_size
    return Mixer(key_heads, heads, key_size, value_size, by_head, torch.randn(channels, width, generator=draw) / 2,
                 -4 * torch.rand(heads, generator=draw), torch.rand(heads, generator=draw),
                 torch.rand(value_size, generator=draw) + 0.5, 1e-6)


def random_step(mixer: Mixer, n_tokens: int, rows: int = 1, dtype: torch.dtype = torch.float32, seed: int = 1,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections, the columns of `rows` states and their matrices."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(n_tokens, mixer.width, generator=draw),
            torch.randn(rows, *mixer.convolution.shape, generator=draw).to(dtype),
            torch.randn(rows, mixer.value_heads, mixer.key_size, mixer.value_size, generator=draw))
