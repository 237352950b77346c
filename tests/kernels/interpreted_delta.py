"""Cases for Triton's interpreter (run by test_interpreted.py): a step of a gated delta-net, a shared expert's gate."""
from __future__ import annotations

import pytest
import torch

from kernels.gpu.trunk import delta as gpu_delta
from kernels.gpu.trunk import gated as gpu_gated
from kernels.trunk.delta import delta
from kernels.trunk.gated import gated
from tests.support.random_experts import random_mixer, random_step


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


@pytest.mark.parametrize("n_tokens, size", [(1, 40), (3, 300)])
def test_gated(n_tokens, size):
    rows = torch.randn(n_tokens, 7 + 1 + 2 * size)
    torch.testing.assert_close(gpu_gated.gated(rows[:, 7:]), gated.reference(rows[:, 7:]))
