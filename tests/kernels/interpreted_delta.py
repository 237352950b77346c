"""Cases for Triton's interpreter (run by test_interpreted.py): delta-nets, shared experts, latent attention."""
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from kernels.gpu import linear as gpu_linear
from kernels.gpu.trunk import delta as gpu_delta
from kernels.gpu.trunk import latent as gpu_latent
from kernels.gpu.trunk.last import counters
from kernels.trunk.delta import delta
from kernels.trunk.gated import gated_linears
from kernels.trunk.latent import attend_latent
from kernels.trunk.linear import Matrices
from tests.kernels.interpreter import backwards
from tests.support.random_experts import random_latent, random_matrix, random_mixer, random_step


@pytest.mark.parametrize("shape, by_head, n_tokens, dtype", [
    ((2, 2, 16, 32), False, 1, torch.float32), ((3, 1, 12, 20), True, 4, torch.float16),
    ((1, 4, 8, 8), True, 3, torch.float32)])
def test_delta(shape, by_head, n_tokens, dtype):
    """Written to row 0 it goes on from there; written to row 1, which nobody reads, row 0 stays as it is. In whichever
    order the blocks run."""
    mixer = random_mixer(*shape, by_head)
    projected, *states = random_step(mixer, n_tokens, 2, dtype)
    for place, order in ((0, nullcontext), (0, backwards), (1, backwards)):
        row = torch.tensor([place])
        with order():
            made = [[function(projected, *own, mixer, row), *own] for function, own in
                    ((run, [state.clone() for state in states]) for run in (gpu_delta.delta, delta.reference))]
        assert not counters(projected.device).any()
        for found, expected in zip(*made, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for state, before in zip(made[0][1:], states, strict=True):
            assert torch.equal(state[1 - row], before[1 - row]) and not torch.equal(state[row], before[row])


def test_what_is_no_number_stays_in_its_head():
    mixer = random_mixer(2, 1, 8, 8, False)
    projected, *states = random_step(mixer, 2)
    projected[1, 0] = torch.nan                                   # of the first head's query
    out = gpu_delta.delta(projected, *states, mixer)
    assert out[1, :8].isnan().all() and not out[1, 8:].isnan().any() and not out[0].isnan().any()


@pytest.mark.parametrize("n_tokens, size, kind, bits", [(1, 64, "silu", 4), (3, 320, "gelu_tanh", 8)])
def test_gated_linears(n_tokens, size, kind, bits):
    rows, residual = torch.randn(n_tokens, 7 + 1 + 2 * size), torch.randn(n_tokens, 48)
    back = Matrices(((*random_matrix(48, size, bits), None),))
    for own in (rows[:, 7:], rows[:, 8:]):      # with its logit, and without
        expected = gated_linears.reference(own, back, residual, kind)
        found = gpu_linear.gated_linears(own, back, residual, kind)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


N = 80     # rows of a cache
LATENT = [  # T, heads, R, still, P, values, bits of the matrix, pairs before and after, rows that are seen, cache
    (1, 4, 64, 16, 16, 16, 8, True, False, 40, torch.float32), (3, 6, 128, 24, 8, 40, 4, True, True, 0, torch.float32),
    (4, 5, 192, 33, 32, 20, 4, False, False, 7, torch.bfloat16),
    (2, 2, 40, 8, 4, 8, 16, True, False, 70, torch.float32)]


@pytest.mark.parametrize("n_tokens, heads, rank, still, turning, values, bits, first, cached, position, dtype", LATENT)
def test_attend_latent(monkeypatch, n_tokens, heads, rank, still, turning, values, bits, first, cached, position,
                       dtype):
    """The new rows go where they are told, and to nowhere else; what lies behind the position is never read."""
    monkeypatch.setattr(gpu_latent, "BLOCKS", 8)
    latent = random_latent(heads, rank, still, turning, values, bits, first, cached)
    query, new = torch.randn(n_tokens, heads * (still + turning)), torch.randn(n_tokens, rank + turning)
    angles = torch.randn(n_tokens, turning)
    turn = torch.stack((angles.cos(), angles.sin()))
    kept = [torch.randn(1, 1, N, width).to(dtype) for width in (rank, turning)]
    for part in kept:
        part[:, :, position:] = torch.nan
    for places in (torch.arange(position, position + n_tokens), torch.full((n_tokens,), N - 1)[:1].expand(n_tokens)):
        places, caches, made = places.contiguous(), [[part.clone() for part in kept] for _ in range(2)], []
        for function, cache in zip((attend_latent.reference, gpu_latent.attend_latent), caches, strict=True):
            made.append(function(query, new, turn, *cache, torch.tensor(position), latent, places))
        exact = dtype == torch.float32
        torch.testing.assert_close(made[1], made[0], rtol=0, atol=1e-4 if exact else 2e-2)
        for mine, theirs in zip(caches[1], caches[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0 if exact else 8e-3, atol=1e-5, equal_nan=True)
