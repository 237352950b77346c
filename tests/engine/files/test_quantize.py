"""The nested codes are as good as plain 4 bits, each view is a least-squares fit, and no weight is too odd for them."""
from __future__ import annotations

import threading

import pytest
import torch

from engine.files.quantize import nested, search
from kernels.layout import Layout

LAYOUT = Layout(hidden=256, neurons=64, group=64)


def rows(kind: str, seed: int = 0, n: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, 256, generator=generator)
    if kind == "gaussian":
        return normal * 0.02
    if kind == "heavy":  # Student's t with 3 degrees of freedom
        chi = torch.randn(3, n, 256, generator=generator).square().sum(0) / 3
        return normal / chi.sqrt() * 0.02
    return normal * 0.02 + torch.rand(n, 1, generator=generator)  # far from zero


def values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    grouped = codes.double().unflatten(1, (-1, LAYOUT.group))
    return (grouped * scales[..., :1].double() + scales[..., 1:].double()).flatten(1)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted.double()).norm() / wanted.double().norm())


def spanned(groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Plain codes over a range [low, high] -> values in float64, no fit."""
    step = ((high - low) / 15).clamp_min(1e-30)
    return ((groups - low) / step).round().clamp(0, 15) * step + low


def min_max(w: torch.Tensor) -> torch.Tensor:
    groups = w.double().unflatten(1, (-1, LAYOUT.group))
    return spanned(groups, groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)).flatten(1)


def exhaustive(w: torch.Tensor) -> torch.Tensor:
    """The best of forty clipping ranges for every group, in float64."""
    groups = w.double().unflatten(1, (-1, LAYOUT.group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best, least = None, None
    for clip in torch.linspace(0.4, 1.0, 41).tolist():
        middle, half = (low + high) / 2, (high - low) / 2 * clip
        found = spanned(groups, middle - half, middle + half)
        loss = (found - groups).square().sum(-1, keepdim=True)
        best = found if best is None else torch.where(loss < least, found, best)
        least = loss if least is None else torch.minimum(loss, least)
    return best.flatten(1)


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "shifted"])
@pytest.mark.parametrize("seed", [0, 1])
def test_nested_is_as_good_as_plain_4_bits(kind, seed):
    w = rows(kind, seed)
    found = nested(w, LAYOUT)
    ours = error(values(found.codes, found.fine), w)
    assert ours <= error(min_max(w), w)
    assert ours <= 1.02 * error(exhaustive(w), w) + 2e-4 * (kind == "shifted")  # an offset near 1 in float16


@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
def test_both_views_are_least_squares(kind):
    """No scale and offset near the stored ones is better by more than their rounding to float16 explains."""
    w = rows(kind)
    found = nested(w, LAYOUT)
    for codes, scales in ((found.codes >> 2, found.coarse), (found.codes, found.fine)):
        at_best = (values(codes, scales) - w).unflatten(1, (-1, 64)).square().sum(-1)
        q = codes.double().unflatten(1, (-1, 64))
        system = torch.stack((q, torch.ones_like(q)), -1)
        exact = torch.linalg.lstsq(system, w.double().unflatten(1, (-1, 64))[..., None]).solution
        limit = ((system @ exact)[..., 0] - w.unflatten(1, (-1, 64))).square().sum(-1)
        assert (at_best <= limit * (1 + 1e-3)).all() and (at_best >= limit * (1 - 1e-9)).all()
        for factor, shift in ((1.01, 0), (0.99, 0), (1, 0.02), (1, -0.02)):
            moved = scales.double() * torch.tensor([factor, 1.0])
            moved[..., 1] += shift * scales[..., 0].double()
            assert ((values(codes, moved) - w).unflatten(1, (-1, 64)).square().sum(-1) > at_best).all()


def test_the_sketch_is_the_upper_half_of_the_same_codes():
    w = rows("gaussian")
    found = nested(w, LAYOUT)
    assert int(found.codes.max()) == 15 and int(found.codes.min()) == 0
    fine, coarse = (error(values(*view), w) for view in ((found.codes, found.fine), (found.codes >> 2, found.coarse)))
    assert fine < 0.1 < coarse < 0.4


def odd_rows() -> torch.Tensor:
    w = torch.zeros(9, 256)
    w[1] = 0.25                                              # constant
    w[2] = -3e-6                                             # constant and tiny
    w[3, ::2] = 1.0                                          # two values
    w[4, 5] = 100.0                                          # one outlier
    w[5] = torch.linspace(-3e4, 3e4, 256)                    # as large as float16 goes
    w[6] = torch.linspace(-1e30, 1e30, 256)                  # larger than float16 can say
    w[7] = torch.linspace(-1e-9, 1e-9, 256)                  # smaller than float16 can say
    w[8] = torch.linspace(-1, 1, 256)
    return w


def test_odd_weights():
    w = odd_rows()
    found = nested(w, LAYOUT)
    assert torch.isfinite(found.fine).all() and torch.isfinite(found.coarse).all()
    fine, coarse = values(found.codes, found.fine), values(found.codes >> 2, found.coarse)
    for view in (fine, coarse):
        assert (view[0] == 0).all() and (view[1] == 0.25).all()
        assert (view[2] + 3e-6).abs().max() < 6e-8 and view[7].abs().max() < 1e-7
        assert (view[3] - w[3]).abs().max() < 2e-4
    assert abs(float(fine[4, 5]) - 100) < 0.1
    assert error(fine[5], w[5]) < 0.03 and error(fine[8], w[8]) < 0.03


def test_the_padding_is_worth_nothing():
    layout = Layout(hidden=320, neurons=8, group=64)
    found = nested(torch.randn(8, 320, generator=torch.Generator().manual_seed(0)), layout)
    assert found.codes.shape == (8, 512) and found.fine.shape == found.coarse.shape == (8, 8, 2)
    assert not found.codes[:, 320:].any() and not found.fine[:, 5:].any() and not found.coarse[:, 5:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value):
    w = rows("gaussian")
    w[40, 7] = value
    with pytest.raises(ValueError, match="not finite"):
        nested(w, LAYOUT)


def test_blocks_do_not_change_the_result(monkeypatch):
    w = rows("heavy")
    whole = nested(w, LAYOUT)
    monkeypatch.setattr("engine.files.quantize.BLOCK", 256 * 3)
    assert all(torch.equal(a, b) for a, b in zip(nested(w, LAYOUT), whole, strict=True))


def test_it_can_be_stopped_between_two_blocks(monkeypatch):
    monkeypatch.setattr("engine.files.quantize.BLOCK", 256 * 3)
    asked = []
    nested(rows("heavy"), LAYOUT, lambda: asked.append(1))
    assert len(asked) == -(-len(rows("heavy")) // 3)

    def stop() -> None:
        raise InterruptedError
    with pytest.raises(InterruptedError):
        nested(rows("heavy"), LAYOUT, stop)


def test_threads_change_nothing_not_even_how_many_there_are(monkeypatch):
    w, before, seen = rows("heavy"), torch.get_num_threads(), []
    monkeypatch.setattr("engine.files.quantize.BLOCK", 256 * 3)
    try:
        torch.set_num_threads(1)
        alone = nested(w, LAYOUT)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(nested(w, LAYOUT), alone, strict=True))
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert torch.get_num_threads() == 3 and seen == [3]
    finally:
        torch.set_num_threads(before)


def test_any_dtype_gives_the_codes_of_its_values():
    w = rows("gaussian").bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(nested(w, LAYOUT), nested(w.float(), LAYOUT), strict=True))
    codes, scales = search(w.float().unflatten(1, (-1, 64)))
    assert torch.equal(codes.flatten(1), nested(w, LAYOUT).codes) and torch.equal(scales, nested(w, LAYOUT).fine)
