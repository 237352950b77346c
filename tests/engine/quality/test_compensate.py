"""Compensated codes: the recurrence against its definition, less error over inputs of every kind, no matrix too odd."""
from __future__ import annotations

import pytest
import torch

from engine.files.quantize import fit, search
from engine.files.trunk import encode, stored_as
from engine.quality.compensate import BLOCKS, DAMPING, damp, factor, fitted, over_inputs, over_neurons
from kernels.trunk.linear import decode

GROUP, ROWS, COLUMNS = 64, 96, 192
Tensor = torch.Tensor


def inputs(kind: str, n: int = 600, width: int = COLUMNS) -> Tensor:
    """float32 [n, width]: what a matrix of that many columns meets."""
    draw = torch.Generator().manual_seed(3)
    if kind == "none":
        return torch.zeros(n, width)
    if kind == "constant":
        return torch.ones(n, width) * 0.7
    if kind == "rank one":
        return torch.randn(n, 1, generator=draw) * torch.randn(1, width, generator=draw)
    if kind == "few":
        return torch.randn(3, width, generator=draw)
    if kind == "dead columns":
        return torch.randn(n, width, generator=draw) * (torch.arange(width) % 3 == 0)
    if kind == "huge":
        return 1e4 * torch.randn(n, width, generator=draw) * torch.logspace(-3, 3, width)
    return torch.randn(n, 24, generator=draw) @ torch.randn(24, width, generator=draw) + 0.1  # correlated


def weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


def values(codes: Tensor, scales: Tensor) -> Tensor:
    grouped = codes.unflatten(1, (-1, GROUP)).float()
    return torch.addcmul(scales[..., 1:].float(), grouped, scales[..., :1].float()).flatten(1)


def plain(w: Tensor) -> Tensor:
    codes, scales = search(w.unflatten(1, (-1, GROUP)))
    return values(codes.flatten(1), scales)


KINDS = ("correlated", "rank one", "constant", "few", "dead columns", "huge", "none")


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_error_over_its_inputs_than_the_search_without_data(kind):
    x, w = inputs(kind), weight()
    found = values(*over_inputs(w, x.T @ x, GROUP))
    error, before = (float((x @ (matrix - w).T).norm()) for matrix in (found, plain(w)))
    assert torch.isfinite(found).all() and error <= before
    if kind == "correlated":
        assert error < 0.6 * before
    if kind == "none":                              # nothing is known: a rounding like any other
        assert (found - w).norm() <= 1.02 * (plain(w) - w).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_fitted_over_the_whole_hessian_errs_no_more_than_over_its_diagonal(kind):
    """Two bits of the codes that the compensation gave; beside it each group for itself, by its inputs' squares."""
    x, w = inputs(kind), weight()
    hessian = x.T @ x
    codes = over_inputs(w, hessian, GROUP)[0] >> 2
    importance = hessian.diagonal().clamp_min(1e-30).unflatten(0, (-1, GROUP))
    alone = fit(codes.unflatten(1, (-1, GROUP)).float(), w.unflatten(1, (-1, GROUP)),
                importance / importance.sum(1, keepdim=True))
    found, before = values(codes, fitted(codes, w, damp(hessian), GROUP)), values(codes, alone)
    error, was, whole = (float((x @ missed.T).square().sum()) for missed in (found - w, before - w, w))
    assert torch.isfinite(found).all() and error <= was + 1e-4 * whole      # which scales in float16 cannot say better
    if kind == "correlated":
        assert error < 0.8 * was
    if kind == "none":                              # nothing is known: a fit of the weights
        assert (found - w).norm() <= 1.001 * (before - w).norm()


def one_down(down: Tensor, hessian: Tensor, felt: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of one expert's down; felt None: all directions of its output alike."""
    felt = torch.eye(down.shape[1], dtype=down.dtype) if felt is None else felt
    return tuple(found[0] for found in over_neurons(down[None], hessian[None], felt, GROUP))


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_error_over_an_experts_activations(kind):
    h, down = inputs(kind, width=ROWS), weight(ROWS, 256)
    found = values(*one_down(down, h.T @ h))
    error, before = (float((h @ (matrix - down)).norm()) for matrix in (found, plain(down)))
    assert torch.isfinite(found).all() and error <= before
    if kind == "correlated":
        assert error < 0.6 * before
    if kind == "none":
        assert (found - down).norm() <= 1.02 * (plain(down) - down).norm()


def test_8_bits():
    x, w = inputs("correlated"), weight()
    stored = stored_as("w", *over_inputs(w, x.T @ x, GROUP, 8), 8)
    found, before = decode(*stored.values()), decode(*encode("w", w, 8).values())
    assert stored.keys() == encode("w", w, 8).keys()
    assert (x @ (found - w).T).norm() < 0.6 * (x @ (before - w).T).norm()


def test_4_bits_of_the_trunk_are_what_was_found():
    x, w = inputs("correlated"), weight()
    codes, scales = over_inputs(w, x.T @ x, GROUP, 4)
    assert torch.equal(decode(*stored_as("w", codes, scales, 4).values()), values(codes, scales))


@pytest.mark.parametrize("kind", ["correlated", "rank one", "dead columns"])
def test_factor_is_of_the_damped_inverse(kind):
    x = inputs(kind).double()
    hessian = x.T @ x
    upper = factor(hessian)
    damped = hessian / hessian.diagonal().mean() + DAMPING * torch.eye(len(hessian))
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(len(hessian), dtype=torch.float64))
    assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize("kind", ["correlated", "rank one", "none"])
def test_down_errs_where_an_answer_feels_it_least(kind):
    """Over activations and over what is felt of the output, whatever kind either is of."""
    h, g, down = inputs("correlated", width=ROWS), inputs(kind, width=256), weight(ROWS, 256)
    felt = g.T @ g
    found, alike = values(*one_down(down, h.T @ h, felt)), values(*one_down(down, h.T @ h))
    error, before = (float((h @ (matrix - down) @ g.T).norm()) for matrix in (found, plain(down)))
    assert torch.isfinite(found).all() and error <= before
    if kind == "correlated":
        assert error < 0.6 * float((h @ (alike - down) @ g.T).norm())


def test_experts_that_are_compensated_together_do_not_mix():
    downs, inside = torch.stack((weight(ROWS, 256), -3 * weight(ROWS, 256))), [inputs(k, width=ROWS) for k in KINDS[:2]]
    hessians = torch.stack([h.T @ h for h in inside])
    together = over_neurons(downs, hessians, torch.eye(256), GROUP)
    for e in range(2):
        assert torch.equal(together[0][e], one_down(downs[e], hessians[e])[0])


def test_each_block_of_neurons_makes_good_for_those_before_it():
    """Against the definition (optimal brain quantisation): after each block the others move by what minimises the
    damped error, given by the inverse of the Hessian of those that are left."""
    h, down = inputs("correlated", width=40), weight(40, 64)
    hessian, step = h.T @ h, -(-40 // BLOCKS)
    codes, _ = one_down(down, hessian)
    damped = hessian / hessian.diagonal().mean() + DAMPING * torch.eye(len(hessian))
    left, order = down.clone(), hessian.diagonal().argsort(descending=True, stable=True)
    for at in range(0, len(down), step):
        block, rest = order[at:at + step], order[at:]
        wanted, grids = over_inputs(left[block], torch.eye(64), GROUP)
        assert (wanted != codes[block]).float().mean() < 0.01       # a sum in another order may round to the other side
        inverse = torch.linalg.inv(damped[rest][:, rest])
        n = len(block)
        left[rest] -= inverse[:, :n] @ torch.linalg.solve(inverse[:n, :n], left[block] - values(wanted, grids))
