"""Cases for Triton's interpreter (run by test_interpreted.py): delta-nets, shared experts, latent attention."""
from __future__ import annotations

import pytest
import torch

from kernels.gpu.trunk import delta as gpu_delta
from kernels.gpu.trunk import gated as gpu_gated
from kernels.gpu.trunk import latent as gpu_latent
from kernels.trunk.delta import delta
from kernels.trunk.gated import gated
from kernels.trunk.latent import attend_latent
from tests.support.random_experts import random_latent, random_mixer, random_step


@pytest.mark.parametrize("shape, by_head, n_tokens, dtype", [
    ((2, 2, 16, 32), False, 1, torch.float32), ((3, 1, 12, 20), True, 4, torch.float16),
    ((1, 4, 8, 8), True, 3, torch.float32)])
def test_delta(monkeypatch, shape, by_head, n_tokens, dtype):
    """Written to row 0 it goes on from there; written to row 1, which nobody reads, row 0 stays as it is."""
    monkeypatch.setattr(gpu_delta, "CHANNELS", 64)
    mixer = random_mixer(*shape, by_head)
    projected, *states = random_step(mixer, n_tokens, 2, dtype)
    for row in (torch.tensor([0]), torch.tensor([1])):
        made = [[function(projected, *own, mixer, row), *own] for function, own in
                ((run, [state.clone() for state in states]) for run in (gpu_delta.delta, delta.reference))]
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


@pytest.mark.parametrize("n_tokens, size, kind", [(1, 40, "silu"), (3, 300, "gelu_tanh")])
def test_gated(n_tokens, size, kind):
    rows = torch.randn(n_tokens, 7 + 1 + 2 * size)
    for own in (rows[:, 7:], rows[:, 8:]):      # with its logit, and without
        torch.testing.assert_close(gpu_gated.gated(own, kind), gated.reference(own, kind))


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
