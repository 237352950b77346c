"""Cases for Triton's interpreter (run by test_interpreted.py): attention of a step, choice of experts, norms."""
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from kernels.gpu import linear as gpu_linear
from kernels.gpu.trunk import attend as gpu_attend
from kernels.gpu.trunk import choose as gpu_choose
from kernels.gpu.trunk import settle as gpu_settle
from kernels.gpu.trunk.last import counters
from kernels.layout import Layout
from kernels.trunk.attend import Heads, attend
from kernels.trunk.choose import Entrance, Reader, choose
from kernels.trunk.linear import Matrices
from kernels.trunk.route import Choice
from kernels.trunk.settle import settle, settled_linears
from tests.kernels.interpreter import backwards
from tests.support.random_experts import random_matrix, random_settling

CASES = [  # T, Q, C, D, norms, rows that are seen, cache, numbers of a head that turn, gated
    (1, 4, 2, 32, "head", 40, torch.float32, 32, False), (3, 4, 1, 12, "all", 7, torch.float32, 12, False),
    (4, 2, 2, 32, None, 0, torch.float32, 16, False), (2, 16, 2, 16, "head", 70, torch.bfloat16, 16, False),
    (3, 4, 2, 32, "head", 9, torch.float32, 8, True), (1, 2, 1, 24, None, 3, torch.float32, 24, True),
    (4, 8, 1, 136, "head", 5, torch.float32, 34, True)]
N = 80


@pytest.mark.parametrize("n_tokens, queries, cached, size, normed, position, dtype, turned, gated", CASES)
def test_attend(monkeypatch, n_tokens, queries, cached, size, normed, position, dtype, turned, gated):
    """The new rows go where they are told, and to nowhere else; what lies behind the position is never read."""
    monkeypatch.setattr(gpu_attend, "BLOCKS", 4)
    widths = {"head": (size, size), "all": (queries * size, cached * size), None: (0, 0)}[normed]
    norms = [torch.rand(width) + 0.5 if width else None for width in widths]
    heads = Heads(queries, cached, size, size ** -0.5, *norms, 1e-6, gated)
    projected, angles = torch.randn(n_tokens, heads.width), torch.randn(n_tokens, turned)
    turn = torch.stack((angles.cos(), angles.sin()))
    kept = torch.randn(2, 1, cached, N, size).to(dtype)
    kept[:, :, :, position:] = torch.nan
    for rows in (torch.arange(position, position + n_tokens), torch.full((n_tokens,), N - 1)[:1].expand(n_tokens)):
        rows, caches, made = rows.contiguous(), [kept.clone(), kept.clone()], []
        for function, (keys, values) in zip((attend.reference, gpu_attend.attend), caches, strict=True):
            made.append(function(projected, turn, keys, values, torch.tensor(position), heads, rows))
        exact = dtype == torch.float32
        torch.testing.assert_close(made[1], made[0], rtol=0, atol=1e-4 if exact else 1e-2)
        torch.testing.assert_close(caches[1], caches[0], rtol=0 if exact else 8e-3, atol=1e-5, equal_nan=True)


def test_which_split_ends_last_does_not_tell(monkeypatch):
    """Which joins the others; and its counter is zero again for whoever comes next."""
    monkeypatch.setattr(gpu_attend, "BLOCKS", 8)
    heads = Heads(4, 2, 32, 0.2, gated=True, sinks=torch.randn(4))
    projected, at = torch.randn(2, heads.width), torch.arange(71, 73)
    turn, kept, found = torch.randn(2, 2, 16), torch.randn(2, 1, 2, N, 32), []
    for order in (nullcontext, backwards):
        with order():
            found.append(gpu_attend.attend(projected, turn, *kept.clone(), at[0], heads, at))
        assert not counters(projected.device).any()
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], attend.reference(projected, turn, *kept, at[0], heads, at), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_tokens, position, window, rows, sunk, in_one", [
    (1, 3, 8, 12, True, False), (4, 37, 8, 11, True, False), (2, 8, 8, 11, False, True), (3, 70, 50, 80, True, True),
    (4, 0, 5, 8, False, False)])
def test_attend_in_a_window(monkeypatch, n_tokens, position, window, rows, sunk, in_one):
    """What has left the window is never read, wherever the rows turned round."""
    monkeypatch.setattr(gpu_attend, "BLOCKS", 4)
    norms = [torch.rand(32) + 0.5 for _ in range(3)]
    heads = Heads(6, 2, 32, 0.2, *norms[:2], 1e-6, window=window, sinks=torch.randn(6) if sunk else None,
                  value_norm=norms[2] if in_one else None, in_one=in_one)
    projected, angles = torch.randn(n_tokens, heads.width), torch.randn(n_tokens, 32)
    turn, at = torch.stack((angles.cos(), angles.sin())), torch.arange(position, position + n_tokens) % rows
    kept = torch.full((2, 1, 2, rows + 1, 32), torch.nan)
    for before in range(max(0, position + 1 - window), position):
        kept[:, :, :, before % rows] = torch.randn(2, 1, 2, 32)
    made, caches = [], [kept.clone(), kept.clone()]
    for function, (keys, values) in zip((attend.reference, gpu_attend.attend), caches, strict=True):
        made.append(function(projected, turn, keys, values, torch.tensor(position), heads, at))
    assert made[0].isfinite().all()
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(caches[1], caches[0], rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("n_tokens, queries, cached, size, position, window, rows, dtype", [
    (1, 6, 2, 32, 37, 8, 11, torch.float32), (4, 3, 1, 12, 6, 0, 80, torch.bfloat16),
    (3, 8, 2, 136, 70, 50, 80, torch.bfloat16), (2, 4, 4, 32, 0, 0, 8, torch.float32)])
def test_attend_to_rows_that_are_held(monkeypatch, n_tokens, queries, cached, size, position, window, rows, dtype):
    """Those of the new tokens, too; nothing is written."""
    monkeypatch.setattr(gpu_attend, "BLOCKS", 4)
    heads = Heads(queries, cached, size, 0.2, window=window, sinks=torch.randn(queries) if window else None, held=True)
    query, at = torch.randn(n_tokens, queries * size).to(dtype), torch.arange(position, position + n_tokens) % rows
    kept = torch.full((2, 1, cached, rows + 1, size), torch.nan, dtype=dtype)
    for seen in range(max(0, position + 1 - window) if window else 0, position + n_tokens):
        kept[:, :, :, seen % rows] = torch.randn(2, 1, cached, size).to(dtype)
    before, turn, made = kept.clone(), torch.empty(2, n_tokens, 0), []
    for function in (attend.reference, gpu_attend.attend):
        made.append(function(query, turn, *kept, torch.tensor(position), heads, at))
    assert made[0].isfinite().all() and made[0].dtype == made[1].dtype == dtype
    near = dict(rtol=0, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-2, atol=2e-2)     # both are rounded
    torch.testing.assert_close(*made, **near)
    assert torch.equal(kept.nan_to_num(), before.nan_to_num())


def entrance_of(choice: Choice, n_experts: int, hidden: int, more: tuple = (), beside: tuple = ()) -> Entrance:
    """more, beside: (rows, bits) of what is read behind the router's norm and behind another one; 16 bits are none."""
    draw = torch.Generator().manual_seed(n_experts)

    def reader(parts: list[tuple]) -> Reader:
        return Reader(Matrices(tuple((*part, None) for part in parts)), torch.rand(hidden, generator=draw) + 0.5, 1e-6)

    def matrix(rows: int, bits: int) -> tuple:
        return random_matrix(rows, hidden, bits, rows) if bits < 16 else (
            torch.randn(rows, hidden, generator=draw).div(hidden ** 0.5).bfloat16(), None)
    router = reader([matrix(n_experts, 16), *(matrix(*each) for each in more)])
    return Entrance(router, n_experts, choice, reader([matrix(*each) for each in beside]) if beside else None)


def equal(found: tuple, expected: tuple) -> None:
    for one, other in zip(found, expected, strict=True):
        largest = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * largest if one.is_floating_point() else 0)


@pytest.mark.parametrize("n_tokens, n_experts, choice, more, beside", [
    (3, 128, Choice(8, True), (), ()), (1, 5, Choice(5, True), (), ()), (1, 5, Choice(5, False), (), ()),
    (4, 32, Choice(3, True, True, torch.rand(32), 4, 2, 2, 2.5), ((32, 4), (32, 4)), ()),
    (2, 12, Choice(2, False, True, torch.rand(12)), ((48, 8), (32, 4)), ()),
    (3, 60, Choice(6, False, False, None, 3, 2, 1, 16.0), (), ()), (2, 6, Choice(2, True, True), (), ()),
    (1, 16, Choice(2, True), ((1, 16), (32, 4), (32, 4)), ()),
    (3, 20, Choice(4, True, factors=torch.rand(20)), (), ((32, 4), (16, 4)))])
def test_choose(monkeypatch, n_tokens, n_experts, choice, more, beside):
    """In any order of the blocks; what the experts are given made here, or before; quantised and padded, or not."""
    monkeypatch.setattr(gpu_linear, "BLOCKS", 8)
    entrance, layout = entrance_of(choice, n_experts, 192, more, beside), Layout(192, 16, 64)
    x, made = torch.randn(n_tokens, 192), torch.randn(n_tokens, 192)
    for rest, order in (((None,), nullcontext), ((layout,), backwards), ((layout, made), nullcontext)):
        expected = choose.reference(x, entrance, *rest)
        with order():
            found = gpu_choose.choose(x, entrance, *rest)
        assert not counters(x.device).any() and len(found) == len(expected) == (4 if rest[0] is None else 10)
        equal(found[:4], expected[:4])
        if rest[0] is not None:     # a code may be the next one, where it is nearly as near
            codes, scales, high, low, scale, sums = found[4:]
            theirs, their_scales, their_high, their_low, their_scale, their_sums = expected[4:]
            assert (codes.int() - theirs.int()).abs().max() <= 1
            assert (256 * (high.int() - their_high.int()) + low.int() - their_low.int()).abs().max() <= 2
            equal((scales, scale, sums), (their_scales, their_scale, their_sums))


def test_what_is_no_number_makes_no_share():
    wanted = torch.tensor([[1.0, torch.nan, 2.0], [-torch.inf, -torch.inf, 0.5], [1.0, 1.0, 1.0]])
    x, found = torch.eye(1, 64), []
    for numbers in wanted:
        router = torch.zeros(3, 64)
        router[:, 0] = numbers / 8
        reader = Reader(Matrices(((router, None, None),)), torch.ones(64), 0.0)     # the norm makes eight of one
        found.append([gpu_choose.choose(x, Entrance(reader, 3, choice))[2:] for choice in (Choice(2, True), Choice(
            2, True, True))])
    (ids, shares), (sigmoids, theirs) = zip(*[part[0] for part in found], strict=True), zip(
        *[part[1] for part in found], strict=True)
    assert shares[0].isnan().all()
    assert ids[1].tolist() == [[2, 0]] and shares[1].tolist() == [[1, 0]]
    assert ids[2].tolist() == [[0, 1]] and shares[2].tolist() == [[0.5, 0.5]]
    assert sigmoids[0][0, 0] == 1 and theirs[0].isnan().all()
    assert sigmoids[1].tolist() == [[2, 0]] and theirs[1].tolist() == [[1, 0]]


@pytest.mark.parametrize("n_tokens, hidden, two, then", [(1, 100, True, False), (4, 64, False, True),
                                                         (2, 70, True, True), (1, 16, False, False)])
def test_settle(n_tokens, hidden, two, then):
    given = random_settling(n_tokens, hidden, two, then)
    for found, expected in zip(gpu_settle.settle(*given), settle.reference(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_tokens, then, bits", [(1, True, 4), (3, False, 8)])
def test_settled_linears(monkeypatch, n_tokens, then, bits):
    monkeypatch.setattr(gpu_linear, "BLOCKS", 8)
    residual, _, how, _ = random_settling(n_tokens, 70, False, then)
    given = torch.randn(n_tokens, 128), Matrices(((*random_matrix(70, 128, bits), None),)), residual, how
    with backwards():
        found = gpu_settle.settled_linears(*given)
    equal(found, settled_linears.reference(*given))
