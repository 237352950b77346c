"""The compiled product of the trunk equals its reference: 8 and 4 bits, a last half line, types, what is no number."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs numba, which compiles this function")

from kernels.cpu import threads
from kernels.cpu.trunk import linear as cpu_linear
from kernels.trunk.linear import linear

Tensor = torch.Tensor


def matrix(rows: int, columns: int, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random codes and scales in the order of the file."""
    draw = torch.Generator().manual_seed(seed)
    scale = (0.5 + torch.rand(rows, columns // 64, generator=draw)) / columns ** 0.5
    if bits == 8:
        return torch.randint(-127, 128, (rows, columns), generator=draw).to(torch.int8), (scale / 64).half()
    pairs = torch.stack((scale / 5, -scale * 1.5), -1)
    return torch.randint(0, 256, (rows, columns // 2), generator=draw).to(torch.uint8), pairs.half()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 100), groups=st.sampled_from((1, 2, 3, 5, 32, 45, 64)), bits=st.sampled_from((8, 4)),
       tokens=st.integers(1, 4), dtype=st.sampled_from((torch.float32, torch.bfloat16)), biased=st.booleans(),
       seed=st.integers(0, 99))
def test_linear(rows, groups, bits, tokens, dtype, biased, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 64 * groups, generator=draw).to(dtype)
    bias = torch.randn(rows, generator=draw) if biased else None
    arguments = (x, *matrix(rows, 64 * groups, bits, seed), bias)
    found, expected = cpu_linear.linear(*arguments), linear.reference(*arguments)
    assert found.dtype == dtype and found.shape == (tokens, rows)
    exact = 1e-2 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(found, expected, rtol=exact, atol=exact / 5 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_stays_none(bits, value):
    x = torch.ones(2, 192)
    x[1, 150] = value
    found = cpu_linear.linear(x, *matrix(40, 192, bits, 0))
    assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_any_number_of_threads_makes_the_same_bits(bits, monkeypatch):
    monkeypatch.setattr(threads, "GRAIN", 1)
    x, before, found = torch.randn(3, 320), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(cpu_linear.linear(x, *matrix(300, 320, bits, 0)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
