"""Compensated codes: the recurrence against its definition, less error over inputs of every kind, no matrix too odd."""
from __future__ import annotations

import pytest
import torch

from engine.files.quantize import search
from engine.files.trunk import encode, stored_as
from engine.quality.compensate import DAMPING, factor, over_inputs, over_neurons
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
def test_no_more_error_over_an_experts_activations(kind):
    h, down = inputs(kind, width=ROWS), weight(ROWS, 256)
    found = values(*over_neurons(down, h.T @ h, GROUP))
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


def test_each_neuron_is_rounded_with_what_those_before_it_missed():
    """Against the definition (optimal brain quantisation): after each neuron the others move by what minimises the
    damped error, given by the inverse of the Hessian of those that are left."""
    h, down = inputs("correlated", width=40).double(), weight(40, 64).double()
    hessian = h.T @ h
    codes, scales = over_neurons(down, hessian, GROUP)
    damped = hessian / hessian.diagonal().mean() + DAMPING * torch.eye(len(hessian))
    scale, offset = (side.repeat_interleave(GROUP, 1) for side in scales.double().unbind(-1))

    def rounded(row: Tensor, i: int) -> Tensor:
        return ((row - offset[i]) / scale[i]).round().clamp(0, 15)
    left, wanted = down.clone(), torch.zeros_like(down)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    for step, i in enumerate(order.tolist()):
        wanted[i], rest = rounded(left[i], i), order[step:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        left[rest] -= inverse[:, :1] / inverse[0, 0] * (left[i] - (offset[i] + scale[i] * wanted[i]))
    for i in range(len(down)):                      # and each once more, against all others as they are
        error = offset + scale * wanted - down
        error[i] = 0
        wanted[i] = rounded(down[i] - damped[i] @ error / damped[i, i], i)
    assert torch.equal(wanted.to(torch.uint8), codes)
