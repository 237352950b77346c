"""Whole experts for many tokens under the interpreter: decoded, and multiplied as they are packed."""
from __future__ import annotations

import pytest
import torch

from kernels.activation import KINDS, Gate
from kernels.dense import dequantize, multiply_tile
from kernels.gpu import grouped as gpu_grouped
from kernels.layout import Layout, default_group_size
from tests.support.random_experts import random_bias, random_blobs

ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("hidden,neurons,n", [(256, 12, 3), (2880, 8, 2), (1088, 5, 1),
                                              *(pytest.param(hidden, 16, 2, marks=pytest.mark.slow)
                                                for hidden in (2048, 4096, 5120))])
def test_dequantize(hidden, neurons, n, dtype):
    layout = Layout(hidden, neurons, default_group_size(hidden))
    blobs = random_blobs(n, layout, torch.Generator().manual_seed(hidden))
    made = []
    for function in (dequantize.reference, gpu_grouped.dequantize):
        gate_up = torch.full((n, 2 * neurons, hidden), torch.nan, dtype=dtype)
        down = torch.full((n, neurons, hidden), torch.nan, dtype=dtype)
        function(blobs, gate_up, down, layout)
        made.append((gate_up, down))
    for expected, found in zip(*made, strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=1e-6)


def routed(counts: tuple[int, ...], n_tokens: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of each row, any, and the ends of each expert's rows."""
    tokens = torch.randint(0, n_tokens, (sum(counts),), generator=draw)
    return tokens, torch.tensor(counts).cumsum(0).int()


SLOW_SHAPES = ((2816, 30, (1, 5), False, "gelu_tanh"), (2048, 70, (2, 0, 17), False, "silu"),
               (4096, 20, (3, 1), True, "relu"), (5120, 16, (2,), False, "gelu"),
               (2880, 45, (0, 1, 17, 70), True, "clamped_swiglu"))


@pytest.mark.parametrize("hidden,neurons,counts,biased,kind", [
    (256, 40, (0, 1, 17, 150, 0), False, "silu"), (192, 33, (3, 65), True, "clamped_swiglu"),
    (2880, 24, (1, 17), True, "clamped_swiglu"), *((256, 12, (5,), False, kind) for kind in KINDS),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SLOW_SHAPES)])
def test_grouped(hidden, neurons, counts, biased, kind):
    """Numbers within what 16-bit floats round, of rows whose sizes are ten thousand times apart."""
    draw = torch.Generator().manual_seed(hidden + neurons)
    layout, n_tokens = Layout(hidden, neurons, default_group_size(hidden)), 40
    blobs = random_blobs(len(counts), layout, draw)
    x = torch.randn(n_tokens, hidden, generator=draw) * torch.logspace(-2, 2, n_tokens)[:, None]
    bias = random_bias((len(counts),), neurons, draw, biased)
    given = *routed(counts, n_tokens, draw), blobs, layout, Gate(kind), bias
    expected, found = (run(x, *given) for run in (multiply_tile.reference, gpu_grouped.multiply_tile))
    assert found.shape == expected.shape == (sum(counts), hidden) and expected.isfinite().all()
    largest = expected.abs().amax(1, keepdim=True).clamp_min(1e-9)
    assert ((found - expected).abs() / largest).max() < 6e-3
    assert ((found - expected) / largest).square().mean().sqrt() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grouped_in_16_bits(dtype):
    draw, layout = torch.Generator().manual_seed(1), Layout(256, 40, 128)
    x, given = torch.randn(9, 256, generator=draw).to(dtype), (*routed((4, 9), 9, draw), random_blobs(2, layout, draw))
    expected, found = (run(x, *given, layout, Gate()) for run in (multiply_tile.reference, gpu_grouped.multiply_tile))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2 * ROUNDING[dtype], atol=4e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_of_what_is_no_number(bad, kind):
    """The row that has it ends as not numbers, the others stay."""
    draw, layout = torch.Generator().manual_seed(2), Layout(256, 40, 64)
    x = torch.randn(3, 256, generator=draw)
    x[1, 70] = bad
    tokens, ends = torch.arange(3), torch.tensor([3], dtype=torch.int32)
    for run in (multiply_tile.reference, gpu_grouped.multiply_tile):
        found = run(x, tokens, ends, random_blobs(1, layout, draw), layout, Gate(kind))
        assert found[1].isnan().any() and found[[0, 2]].isfinite().all()


def test_grouped_does_not_depend_on_its_neighbours():
    """A row's bits are the same whoever is beside it: a chunk may be cut anywhere, a tile may hold any experts."""
    draw, layout = torch.Generator().manual_seed(3), Layout(256, 40, 64)
    x, blobs = torch.randn(90, 256, generator=draw), random_blobs(2, layout, draw)
    tokens, ends = torch.arange(90), torch.tensor([5, 90], dtype=torch.int32)
    together = gpu_grouped.multiply_tile(x, tokens, ends, blobs, layout, Gate())
    ends = torch.tensor([20], dtype=torch.int32)
    alone = gpu_grouped.multiply_tile(x[70:], torch.arange(20), ends, blobs[1:], layout, Gate())
    assert torch.equal(together[70:], alone)
