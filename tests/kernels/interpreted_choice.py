"""Cases for Triton's interpreter (run by test_interpreted.py): scoring and selecting against the references."""
from __future__ import annotations

import pytest
import torch

from kernels.activation import KINDS, Gate, quantize, quantize_activation
from kernels.gpu import activation as gpu_activation
from kernels.gpu import score as gpu_score
from kernels.gpu import select as gpu_select
from kernels.layout import Layout, default_group_size
from kernels.score import score, score_up
from kernels.select import REFINED, histogram_of, select, select_above
from tests.support.random_experts import SEEDS, random_bias, random_blobs, random_shape

# H, I, k, T
SHAPES = [(256, 100, 2, 4), (2880, 33, 1, 1)]
SLOW = [(256, 512, 10, 1), (2048, 40, 3, 3), (4096, 1000, 1, 1), (256, 14_336, 1, 1), *map(random_shape, SEEDS)]


def with_slow(quick: list, slow: list) -> list:
    return quick + [pytest.param(*shape, marks=pytest.mark.slow) for shape in slow]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter's time goes by operations, not by their width."""
    monkeypatch.setattr(gpu_score, "ROWS", 1024)


def layout_of(hidden: int, neurons: int) -> Layout:
    return Layout(hidden, neurons, default_group_size(hidden))


@pytest.mark.parametrize("hidden,neurons,k,n_tokens", with_slow(SHAPES, SLOW))
@pytest.mark.parametrize("biased", [False, True])
def test_score(hidden, neurons, k, n_tokens, biased):
    generator = torch.Generator().manual_seed(hidden + biased)
    layout = layout_of(hidden, neurons)
    sketches = random_blobs(k + 1, layout, generator)
    place = torch.stack([torch.randperm(k + 1, generator=generator)[:k] for _ in range(n_tokens)]).int()
    x = torch.randn(n_tokens, layout.padded, generator=generator)
    codes, scales = quantize_activation.reference(x, layout.group)
    weight = torch.rand(n_tokens, k, generator=generator)
    bias = random_bias((n_tokens, k), neurons, generator, biased)
    gate = Gate("clamped_swiglu") if biased else Gate("silu")
    expected = score.reference(codes, scales, sketches, place, weight, layout, gate, bias)
    counts = torch.zeros(n_tokens, 4096, dtype=torch.int32)
    found = gpu_score.score(codes, scales, sketches, place, weight, layout, gate, bias, counts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    assert torch.equal(counts, histogram_of(found))
    torch.testing.assert_close(gpu_score.score_up(codes, scales, sketches, place, layout, bias),
                               score_up.reference(codes, scales, sketches, place, layout, bias),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_score_knows_every_gate(kind):
    generator = torch.Generator().manual_seed(1)
    layout = layout_of(256, 32)
    sketches = random_blobs(1, layout, generator)
    place = torch.zeros(1, 1, dtype=torch.int32)
    codes, scales = quantize_activation.reference(torch.randn(1, 256, generator=generator), layout.group)
    expected = score.reference(codes, scales, sketches, place, torch.ones(1, 1), layout, Gate(kind))
    found = gpu_score.score(codes, scales, sketches, place, torch.ones(1, 1), layout, Gate(kind))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden,n_tokens", [(256, 4), (2048, 1), (3072, 2), (4096, 3), (5120, 1)])
def test_quantized_activation_bit_for_bit(hidden, n_tokens, dtype):
    x = torch.randn(n_tokens, hidden, generator=torch.Generator().manual_seed(hidden)) * 30
    x[0, :128] = 0
    x[-1, -128:] = torch.arange(-64, 64) * 0.5                    # halves: ties of rounding
    x = x.to(dtype)
    for group in (64, 128):
        for mine, theirs in zip(gpu_activation.quantize_activation(x, group),
                                quantize_activation.reference(x, group), strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(gpu_activation.quantize(x, group), quantize.reference(x, group), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("hidden, group", [(192, 64), (2880, 64), (2816, 128), (100, 128)])
def test_what_is_narrower_than_the_experts_is_quantised_with_zeros_behind(hidden, group):
    x, columns = torch.randn(3, hidden, generator=torch.Generator().manual_seed(hidden)), -(-hidden // 256) * 256
    found = gpu_activation.quantize(x, group, columns)
    for mine, theirs in zip(found, quantize.reference(x, group, columns), strict=True):
        assert torch.equal(mine, theirs) and len(mine) == 3
    assert found[0].shape == (3, columns) and not found[0][:, hidden:].any()
    for mine, theirs in zip(gpu_activation.quantize_activation(x, group, columns), found, strict=False):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("run", [gpu_activation.quantize_activation, quantize_activation.reference,
                                 gpu_activation.quantize, quantize.reference])
def test_a_group_that_holds_no_numbers_has_no_scale(run, bad):
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    x[1, 130] = bad
    codes, scales, *fixed = run(x, 64)
    assert scales.isfinite().tolist() == [[True] * 4, [True, True, False, True]]
    assert not codes[1, 128:192].any() and codes[1, :128].any()
    assert torch.equal(codes[:1], run(x[:1], 64)[0])
    for numbers in fixed[2:]:
        assert numbers.isfinite().tolist() == [[True] * 4, [True, True, False, True]]
    assert not any(half[1, 128:192].any() for half in fixed[:2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("run", [gpu_score.score, score.reference])
def test_what_is_no_number_is_scored_so_and_chosen(run, bad, kind):
    layout, generator = layout_of(256, 32), torch.Generator().manual_seed(1)
    sketches, place = random_blobs(1, layout, generator), torch.zeros(1, 1, dtype=torch.int32)
    x = torch.randn(1, 256, generator=generator)
    x[0, 3] = bad
    counts = torch.zeros(1, 4096, dtype=torch.int32)
    scores = run(*quantize_activation.reference(x, layout.group), sketches, place, -torch.ones(1, 1), layout,
                 Gate(kind), histogram=counts)
    assert scores.isnan().all() and (scores.view(torch.int32) > 0).all() and int(counts.sum()) == 32
    scores[0, :20], budget = 1.0, torch.tensor([5], dtype=torch.int32)
    for choose in (select.reference, gpu_select.select):
        assert choose(scores, budget, budget, 5)[0].tolist() == [[20, 21, 22, 23, 24]]
    for choose in (select_above.reference, gpu_select.select_above):
        assert choose(scores, torch.full_like(scores, 2.0), 12)[0].tolist() == [list(range(20, 32))]


def scores_of(kind: str, n_tokens: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    scores = torch.rand(n_tokens, n, generator=generator) ** 4
    if kind == "ties":
        scores = (scores * 6).floor() / 8
    if kind == "near ties":                                      # same upper 12 bits of the key, other lower ones
        scores = 1 + scores / 64
    if kind == "zeros":
        scores *= scores > 0.6
    return scores


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("kind", ["random", "ties", "near ties", "zeros"])
@pytest.mark.parametrize("n_tokens,n", with_slow([(1, 1), (2, 700)], [(4, 900), (1, 4096)]))
def test_select(n_tokens, n, kind, counted):
    scores = scores_of(kind, n_tokens, n)
    for n_refined, n_total in {(0, 0), (0, n // 3), (n // 5, n // 3), (n // 3, n // 3), (n, n), (1, 1)}:
        histogram = histogram_of(scores) if counted else None
        capacity = max(n_total, n // 2)
        expected = select.reference(scores, n_refined, n_total, capacity)
        budget = [torch.tensor([value], dtype=torch.int32) for value in (n_refined, n_total)]
        found = gpu_select.select(scores, *budget, capacity, histogram)
        assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1]), (n_refined, n_total)
        assert not counted or not histogram.any()


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize("n_tokens,n,tile", [(2, 700, 256), (2, 500, 256),
                                             pytest.param(1, 28_672, 4096, marks=pytest.mark.slow),
                                             pytest.param(1, 6144, 4096, marks=pytest.mark.slow)])
def test_select_with_several_blocks(monkeypatch, n_tokens, n, tile, kind, counted):
    monkeypatch.setattr(gpu_select, "LARGEST_TILE", tile)
    scores = scores_of(kind, n_tokens, n)
    for n_refined, n_total in ((0, 0), (n // 5, n // 3), (1, n - 1), (n, n)):
        histogram = histogram_of(scores) if counted else None
        expected = select.reference(scores, n_refined, n_total, n)
        found = gpu_select.select(scores, n_refined, n_total, n, histogram)
        assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1]), (n_refined, n_total)
        assert not counted or not histogram.any()


@pytest.mark.parametrize("tile", [4096, 512, 128])
@pytest.mark.parametrize("counts", ["none", "twice", "another's", "all in one"])
def test_a_stale_histogram_leaves_no_garbage(monkeypatch, counts, tile):
    """As a step that was broken off leaves it: what is chosen is wrong then, but every entry is a neuron or -1."""
    monkeypatch.setattr(gpu_select, "LARGEST_TILE", tile)
    garbage = torch.full((3 * 1024,), 0x5A5A5A5A, dtype=torch.int32)
    monkeypatch.setattr(gpu_select.torch, "empty", lambda *shape, dtype, device: garbage.clone().view(dtype)[
        :torch.Size(shape).numel()].view(shape))
    scores = scores_of("random", 2, 700)
    histogram = {"none": torch.zeros(2, 4096, dtype=torch.int32), "twice": 2 * histogram_of(scores),
                 "another's": histogram_of(scores / 3), "all in one": 0 * histogram_of(scores)}[counts]
    if counts == "all in one":
        histogram[:, 4095] = 700
    for n_refined, n_total in ((0, 100), (40, 300), (350, 700)):
        neurons, fidelity = gpu_select.select(scores, n_refined, n_total, 700, histogram.clone())
        for row, kind in zip(neurons.tolist(), fidelity.tolist(), strict=True):
            n = row.index(-1) if -1 in row else len(row)
            assert row[:n] == sorted(set(row[:n])) and set(row[n:]) <= {-1} and all(0 <= i < 700 for i in row[:n])
            assert set(kind) <= {0, REFINED}


@pytest.mark.parametrize("tile", [4096, 128])
@pytest.mark.parametrize("capacity", [0, 5, 500])
def test_select_above(monkeypatch, capacity, tile):
    monkeypatch.setattr(gpu_select, "LARGEST_TILE", tile)
    scores = scores_of("ties", 2, 500)
    threshold = torch.rand(2, 500, generator=torch.Generator().manual_seed(3))
    expected = select_above.reference(scores, threshold, capacity)
    found = gpu_select.select_above(scores, threshold, capacity)
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
