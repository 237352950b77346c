"""What a fused step is made of equals its references: products behind a norm, attention over a cache, the router."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs numba, which compiles these functions")

from kernels.cpu import threads
from kernels.cpu.trunk import attend as cpu_attend
from kernels.cpu.trunk import delta as cpu_delta
from kernels.cpu.trunk import gated as cpu_gated
from kernels.cpu.trunk import latent as cpu_latent
from kernels.cpu.trunk import linear as cpu_linear
from kernels.cpu.trunk import route as cpu_route
from kernels.cpu.trunk import settle as cpu_settle
from kernels.trunk.attend import Heads, attend
from kernels.trunk.delta import delta
from kernels.trunk.gated import gated
from kernels.trunk.latent import attend_latent
from kernels.trunk.linear import Matrices, linears
from kernels.trunk.route import Choice, route
from kernels.trunk.settle import settle
from tests.kernels.cpu.test_linear_twin import matrix
from tests.support.random_experts import random_latent, random_mixer, random_settling, random_step

Tensor = torch.Tensor
tries = settings(max_examples=30, deadline=None)
tokens, seeds = st.integers(1, 4), st.integers(0, 99)


def mixed(columns: int, kinds: list[int], seed: int) -> Matrices:
    """Matrices of 8 and 4 bits and of float32 numbers (32), every second with a bias."""
    draw, parts = torch.Generator().manual_seed(seed), []
    for i, kind in enumerate(kinds):
        rows = 20 + 23 * i
        weight = matrix(rows, columns, kind, seed + i) if kind < 32 else (
            torch.randn(rows, columns, generator=draw) / columns ** 0.5, None)
        parts.append((*weight, torch.randn(rows, generator=draw) if i % 2 else None))
    return Matrices(tuple(parts))


@tries
@given(tokens, st.sampled_from((64, 192, 256, 2880)), st.lists(st.sampled_from((4, 8, 32)), min_size=1, max_size=4),
       st.booleans(), st.booleans(), seeds)
def test_linears(tokens, columns, kinds, is_normed, has_residual, seed):
    draw, matrices = torch.Generator().manual_seed(seed), mixed(columns, kinds, seed)
    x = torch.randn(tokens, columns, generator=draw)
    norm = torch.rand(columns, generator=draw) if is_normed else None
    residual = torch.randn(tokens, matrices.rows, generator=draw) if has_residual else None
    arguments = (x, matrices, norm, 1e-6, residual)
    for found, expected in zip(cpu_linear.linears(*arguments), linears.reference(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


def test_what_is_not_computed_here_is_left_to_the_reference():
    narrow = Matrices(((torch.ones(3, 40), None, None),))
    assert cpu_linear.linears(torch.ones(1, 40), narrow) is NotImplemented
    assert torch.equal(linears(torch.ones(1, 40), narrow)[0], torch.full((1, 3), 40.0))


@tries
@given(tokens, st.sampled_from(((1, 16), (2, 32), (4, 128))), st.sampled_from((1, 3, 8)),
       st.sampled_from(("none", "each", "all")), st.integers(0, 40), st.sampled_from((1, 2, 4)), st.booleans(), seeds)
def test_attend(tokens, shape, per, normed, position, of_turned, is_gated, seed):
    (cached, size), draw = shape, torch.Generator().manual_seed(seed)
    norms = {"none": (), "each": (size, size), "all": (per * cached * size, cached * size)}[normed]
    heads = Heads(per * cached, cached, size, size ** -0.5, *(torch.rand(n, generator=draw) for n in norms),
                  gated=is_gated, **({"epsilon": 1e-6} if norms else {}))
    projected = torch.randn(tokens, heads.width, generator=draw)
    turn = torch.randn(2, tokens, size // of_turned, generator=draw)
    cache = torch.randn(2, 1, cached, position + tokens + 3, size, generator=draw)
    given, theirs = cache.clone(), cache.clone()
    found = cpu_attend.attend(projected.clone(), turn, *given, position, heads)
    torch.testing.assert_close(found, attend.reference(projected, turn, *theirs, position, heads), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given, theirs, rtol=1e-5, atol=1e-6)
    changed = (given != cache).any(-1).any(0)[0, 0].nonzero().flatten().tolist()
    assert changed == list(range(position, position + tokens))


@tries
@given(tokens, st.sampled_from((1, 3, 8)), st.integers(0, 70), st.sampled_from((0, 1, 8, 33)), st.booleans(),
       st.booleans(), seeds)
def test_attend_in_a_window(tokens, per, position, window, sunk, in_one, seed):
    """With sinks, and with keys and values in one; what has left the window is not read."""
    draw, size = torch.Generator().manual_seed(seed), 32
    norms, cached = torch.rand(3, size, generator=draw), 2
    heads = Heads(per * cached, cached, size, size ** -0.5, norms[0], norms[1], 1e-6, window=window, in_one=in_one,
                  sinks=torch.randn(per * cached, generator=draw) if sunk else None,
                  value_norm=norms[2] if in_one else None)
    projected = torch.randn(tokens, heads.width, generator=draw)
    turn = torch.randn(2, tokens, size, generator=draw)
    cache = torch.randn(2, 1, cached, position + tokens, size, generator=draw)
    if window:
        cache[..., :max(0, position + 1 - window), :] = torch.nan
    given, theirs = cache.clone(), cache.clone()
    found = cpu_attend.attend(projected.clone(), turn, *given, position, heads)
    expected = attend.reference(projected, turn, *theirs, position, heads)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@tries
@given(tokens, st.sampled_from(((1, 2, 16, 16), (2, 2, 12, 20), (3, 1, 8, 40))), st.booleans(), seeds)
def test_delta(tokens, shape, by_head, seed):
    mixer = random_mixer(*shape, by_head, seed=seed)
    projected, *states = random_step(mixer, tokens, seed=seed + 1)
    found, expected = ([function(projected, *own, mixer), *own] for function, own in
                       ((run, [state.clone() for state in states]) for run in (cpu_delta.delta, delta.reference)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@tries
@given(tokens, st.sampled_from((1, 16, 37, 512)), st.booleans(), seeds)
def test_gated(tokens, size, has_logit, seed):
    rows = 5 * torch.randn(tokens, 7 + has_logit + 2 * size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(cpu_gated.gated(rows[:, 7:]), gated.reference(rows[:, 7:]), rtol=1e-5, atol=1e-6)


@tries
@given(tokens, st.sampled_from(((1, 64, 16, 16), (9, 128, 24, 40))), st.sampled_from((4, 8, 32)), st.integers(0, 40),
       st.sampled_from(((False, False), (True, False), (True, True))), seeds)
def test_attend_latent(tokens, shape, bits, position, pairs, seed):
    (heads, rank, still, values), draw = shape, torch.Generator().manual_seed(seed)
    latent = random_latent(heads, rank, still, 16, values, bits, *pairs, seed)
    given = [torch.randn(size, generator=draw) for size in ((tokens, heads * (still + 16)), (tokens, rank + 16),
                                                            (2, tokens, 16))]
    kept = [torch.randn(1, 1, position + tokens + 3, size, generator=draw) for size in (rank, 16)]
    caches = [[rows.clone() for rows in kept] for _ in range(2)]
    found, expected = (run(*given, *cache, position, latent) for run, cache in zip(
        (cpu_latent.attend_latent, attend_latent.reference), caches, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-5)
    for mine, theirs, before in zip(*caches, kept, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        changed = (mine != before).any(-1)[0, 0].nonzero().flatten().tolist()
        assert changed == list(range(position, position + tokens))


@tries
@given(tokens, st.sampled_from((2, 8, 128)), st.integers(1, 8), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from(((1, 1, 2), (2, 1, 1), (4, 2, 2))), seeds)
def test_route(tokens, experts, top_k, renormalised, sigmoid, corrected, groups, seed):
    draw = torch.Generator().manual_seed(seed)
    logits, correction = torch.randn(tokens, experts, generator=draw), torch.rand(experts, generator=draw)
    if groups[0] * groups[2] > experts:
        groups = 1, 1, 2
    of_kept = experts // groups[0] * groups[1]
    choice = Choice(min(top_k, of_kept), renormalised, sigmoid, correction if corrected else None, *groups, 2.5,
                    None if corrected else correction)
    (ids, shares), expected = (run(logits, choice) for run in (cpu_route.route, route.reference))
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(shares, expected[1])


@tries
@given(tokens, st.sampled_from((16, 100, 2816)), st.booleans(), st.booleans(), seeds)
def test_settle(tokens, hidden, two, then, seed):
    given = random_settling(tokens, hidden, two, then, seed)
    for found, expected in zip(cpu_settle.settle(*given), settle.reference(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(value):
    x = torch.ones(2, 64)
    x[1, 50] = value
    found, _ = cpu_linear.linears(x, mixed(64, [4, 8, 32], 0), torch.ones(64), 1e-6)
    assert found[0].isfinite().all() and found[1].isnan().all()
    for sigmoid in (False, True):
        _, shares = cpu_route.route(found[1:, :8].contiguous(), Choice(2, True, sigmoid))
        assert shares.isnan().all()
    cache = torch.zeros(2, 1, 1, 8, 16)
    projected = torch.full((1, 48), value)
    out = cpu_attend.attend(projected, torch.ones(2, 1, 16), *cache, 3, Heads(1, 1, 16, 0.25))
    assert out.isnan().all()


def test_any_number_of_threads_makes_the_same_bits(monkeypatch):
    monkeypatch.setattr(threads, "GRAIN", 1)
    before, found, draw = torch.get_num_threads(), [], torch.Generator().manual_seed(0)
    x, matrices, heads = torch.randn(3, 256, generator=draw), mixed(256, [4, 8, 32], 0), Heads(8, 4, 16, 0.25)
    projected, turn, cache = (torch.randn(shape, generator=draw)
                              for shape in ((3, 256), (2, 3, 16), (2, 1, 4, 40, 16)))
    mixer = random_mixer(3, 2, 16, 16, True)
    entering, *states = random_step(mixer, 3)
    latent = random_latent(20, 64, 16, 16, 16, 8)
    looking = [torch.randn(shape, generator=draw) for shape in ((3, 640), (3, 80), (2, 3, 16))]
    kept = [torch.randn(1, 1, 40, size, generator=draw) for size in (64, 16)]
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append((cpu_linear.linears(x, matrices, torch.ones(256), 1e-6)[0],
                          cpu_attend.attend(projected.clone(), turn, *cache.clone(), 30, heads),
                          cpu_delta.delta(entering, *(state.clone() for state in states), mixer),
                          cpu_latent.attend_latent(*looking, *(rows.clone() for rows in kept), 30, latent)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
