"""Compressed experts, trunk matrices, delta-nets, latent attention of random numbers, without the quantiser."""
from __future__ import annotations

import random

import torch

from kernels.activation import NeuronBias
from kernels.layout import Layout
from kernels.planes import Nested, record_rows, sketch_rows
from kernels.trunk.delta import Mixer
from kernels.trunk.latent import Latent
from kernels.trunk.linear import Matrices
from kernels.trunk.settle import Settling

Tensor = torch.Tensor


def random_nested(rows: int, layout: Layout, generator: torch.Generator) -> Nested:
    """Values of about the size of a real layer's: their sum over hidden is of order 1 for a normal activation."""
    codes = torch.randint(0, 16, (rows, layout.padded), dtype=torch.uint8, generator=generator)
    codes[:, layout.hidden:] = 0

    def pairs(top: int) -> Tensor:
        scale = (0.5 + torch.rand(rows, layout.groups, generator=generator)) / top / layout.hidden ** 0.5
        offset = -scale * top * (0.4 + 0.2 * torch.rand(rows, layout.groups, generator=generator))
        both = torch.stack((scale, offset), dim=-1)
        both[:, layout.hidden // layout.group:] = 0
        return both.half()

    return Nested(codes, pairs(3), pairs(15))


def random_expert(layout: Layout, generator: torch.Generator) -> tuple[Nested, Nested, Nested]:
    """gate, up, down of one expert."""
    gate, up, down = (random_nested(layout.neurons, layout, generator) for _ in range(3))
    return gate, up, down


def blob_of(gate: Nested, up: Nested, down: Nested, layout: Layout) -> Tensor:
    """uint8 [blob_bytes]: sketch rows, then records."""
    sketch = sketch_rows(gate, up, layout).flatten()
    sketch = torch.nn.functional.pad(sketch, (0, layout.sketch_bytes - len(sketch)))
    return torch.cat((sketch, record_rows(gate, up, down, layout).flatten()))


def random_blobs(n: int, layout: Layout, generator: torch.Generator) -> Tensor:
    """uint8 [n, blob_bytes]."""
    return torch.stack([blob_of(*random_expert(layout, generator), layout) for _ in range(n)])


def random_bias(picks: tuple[int, ...], neurons: int, generator: torch.Generator, is_there: bool = True,
                ) -> NeuronBias | None:
    """Of picks out of five experts."""
    if not is_there:
        return None
    return NeuronBias(*torch.randn(2, 5, neurons, generator=generator), torch.randint(5, picks, generator=generator))


def random_matrix(rows: int, columns: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """codes, scales of a trunk matrix in the order of kernels/trunk/linear.py, groups of 64."""
    generator = torch.Generator().manual_seed(seed)
    scales = (0.5 + torch.rand(rows, columns // 64, generator=generator)) / 2 ** (bits - 1) / columns ** 0.5
    if bits == 8:
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
        return codes, scales.half()
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    return codes, torch.stack((scales, -scales * (6 + 3 * torch.rand(scales.shape, generator=generator))), -1).half()


SEEDS = (0, 2, 4, 5, 7)     # every hidden size


def random_shape(seed: int) -> tuple[int, int, int, int]:
    """-> hidden, neurons, routed experts and tokens of a case: sizes of real models, and not too many of them."""
    draw = random.Random(seed)
    hidden, k = draw.choice((256, 2048, 2880, 4096, 5120)), draw.randint(1, 10)
    neurons = draw.randint(512, max(512, min(14_336, 4096 // k)))
    return hidden, neurons, k, draw.randint(1, max(1, min(4, 16_000_000 // (hidden * k * neurons))))


def random_mixer(key_heads: int, per: int, key_size: int, value_size: int, by_head: bool, width: int = 4,
                 seed: int = 0) -> Mixer:
    """per: heads of values a head of keys; width: of the convolution."""
    draw, heads = torch.Generator().manual_seed(seed), key_heads * per
    channels = 2 * key_heads * key_size + heads * value_size
    return Mixer(key_heads, heads, key_size, value_size, by_head, torch.randn(channels, width, generator=draw) / 2,
                 -4 * torch.rand(heads, generator=draw), torch.rand(heads, generator=draw),
                 torch.rand(value_size, generator=draw) + 0.5, 1e-6)


def random_step(mixer: Mixer, n_tokens: int, rows: int = 1, dtype: torch.dtype = torch.float32, seed: int = 1,
                ) -> tuple[Tensor, Tensor, Tensor]:
    """Projections, the columns of `rows` states and their matrices."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(n_tokens, mixer.width, generator=draw),
            torch.randn(rows, *mixer.convolution.shape, generator=draw).to(dtype),
            torch.randn(rows, mixer.value_heads, mixer.key_size, mixer.value_size, generator=draw))


def random_latent(heads: int, rank: int, still: int, turning: int, values: int, bits: int, neighbours: bool = False,
                  cached: bool = False, seed: int = 0) -> Latent:
    """bits of the expanding matrix: 8, 4, or more for plain numbers."""
    draw, n_rows = torch.Generator().manual_seed(seed), heads * (still + values)
    codes, scales = (random_matrix(n_rows, rank, bits, seed) if bits <= 8 else
                     (torch.randn(n_rows, rank, generator=draw) / rank ** 0.5, None))
    norm = torch.rand(rank, generator=draw) + 0.5
    return Latent(heads, rank, still, turning, values, (still + turning) ** -0.5, norm, 1e-6,
                  Matrices(((codes, scales, None),)), neighbours, cached)


def random_settling(n_tokens: int, hidden: int, two: bool, then: bool, seed: int = 0) -> tuple:
    """What `settle` is given: a second summand and a scale, or neither; what is read next, or nothing."""
    draw = torch.Generator().manual_seed(seed)
    residual, added, beside = torch.randn(3, n_tokens, hidden, generator=draw)
    norms = torch.rand(4, hidden, generator=draw) + 0.5
    own, scale = ((norms[1], norms[2]), torch.rand(1, generator=draw)) if two else (None, None)
    how = Settling(norms[0], 1e-6, own, scale, norms[3] if then else None)
    return residual, added, how, beside if two else None
