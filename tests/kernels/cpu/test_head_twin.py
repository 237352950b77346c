"""The best rows of a nested head: the same as its reference finds, with the bits of the whole head, the best among
them; what was split is joined again."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs numba, which compiles this function")

from kernels.cpu.trunk import head as cpu_head
from kernels.trunk.head import DEVIATIONS, best_rows, scanned, split
from kernels.trunk.linear import Matrices, columns, decode, dequantize_rows, joined
from tests.kernels.cpu.test_linear_twin import matrix

Tensor = torch.Tensor
groups, seeds = st.sampled_from((1, 2, 3, 17, 32, 45)), st.integers(0, 99)


def nested(rows: int, n_columns: int, seed: int) -> tuple[Tensor, Matrices]:
    """8-bit codes, and the head of them."""
    codes, scales = matrix(rows, n_columns, 8, seed)
    return codes, Matrices(((split(codes), scales, None),))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), groups, st.integers(1, 256), st.booleans(), seeds)
def test_the_best_are_among_those_computed(rows, groups, n_best, is_normed, seed):
    draw, (_, head) = torch.Generator().manual_seed(seed), nested(rows, 64 * groups, seed)
    x = torch.randn(1, 64 * groups, generator=draw)
    rest = (torch.rand(64 * groups, generator=draw), 1e-6) if is_normed else ()
    expected, whole, found = best_rows.reference(x, head, 0, *rest), *(cpu_head.best_rows(x, head, n, *rest)
                                                                      for n in (0, n_best))
    torch.testing.assert_close(whole, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))
    there = found.isfinite()
    assert torch.equal(found[there], whole[there]) and int(there.sum()) >= min(rows, n_best)
    least = whole.topk(min(rows, n_best)).values[-1]
    assert bool(there[whole >= least].all())


def test_few_rows_are_computed_where_one_stands_out():
    """Of 20,000 rows of 2,048 columns: the one that the token is like, and of the 20 best less than a tenth."""
    draw, rows = torch.Generator().manual_seed(0), torch.randn(20_000, 2048, generator=torch.Generator().manual_seed(1))
    scales = (rows.unflatten(1, (-1, 64)).abs().amax(-1) / 127).half()
    codes = (rows.unflatten(1, (-1, 64)) / scales[..., None].float()).round().clamp(-127, 127).to(torch.int8).flatten(1)
    head, x = Matrices(((split(codes), scales, None),)), torch.randn(1, 2048, generator=draw) + 0.3 * rows[777]
    assert best_rows(x, head, 1).isfinite().nonzero().flatten().tolist() == [777]
    assert int(best_rows(x, head, 20).isfinite().sum()) < 2000


def test_what_the_upper_plane_leaves_out_is_within_its_reach():
    codes, head = nested(3000, 256, 0)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    scores, reach = scanned(x, *head.parts[0][:2])
    off = (scores - best_rows.reference(x, head, 0)).abs()
    deviations = off / reach * DEVIATIONS
    assert float(deviations.max()) < 5 and 0.9 < float(deviations.square().mean().sqrt()) < 1.1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), groups, seeds)
def test_split_codes_are_the_same_codes(rows, groups, seed):
    codes, head = nested(rows, 64 * groups, seed)
    planes, scales, _ = head.parts[0]
    assert planes.shape == (rows, 2, 32 * groups) and columns(planes) == head.columns == 64 * groups
    assert torch.equal(joined(planes), codes) and torch.equal(decode(planes, scales), decode(codes, scales))
    out = torch.empty(rows, 64 * groups)
    dequantize_rows(planes, scales, out)
    assert torch.equal(out, decode(codes, scales))


def test_a_token_that_is_no_number_finds_no_row():
    _, head = nested(50, 64, 0)
    assert not best_rows(torch.full((1, 64), torch.nan), head, 3).isfinite().any()
