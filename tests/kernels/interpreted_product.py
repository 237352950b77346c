"""Cases for Triton's interpreter (run by test_interpreted.py): the sparse and the dense expert product."""
from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn.functional import pad

from kernels.activation import KINDS, FixedPoint, Gate, quantize
from kernels.apply import apply, chosen_sums
from kernels.cpu import whole_sums as cpu_whole_sums
from kernels.dense import dense, from_sums, together, whole_sums
from kernels.gpu import activation as gpu_activation
from kernels.gpu import apply as gpu_apply
from kernels.gpu import whole_sums as gpu_whole_sums
from kernels.layout import Layout, default_group_size
from kernels.select import DOWN_ONLY, FLOE, REFINED
from kernels.weigh import Mixture
from tests.support.random_experts import SEEDS, random_bias, random_blobs, random_shape


def random_case(seed: int) -> tuple[int, ...]:
    """A third, two thirds or all of the neurons are chosen, at most 4,096."""
    hidden, neurons, k, n_tokens = random_shape(seed)
    return hidden, neurons, k, n_tokens, min(4096, k * neurons) * (seed % 3 + 1) // 3


SHAPES = [(256, 100, 3, 4, 80), (2880, 30, 2, 1, 60), (256, 32, 2, 1, 0)]      # H, I, k, T, chosen
SLOW = [(256, 512, 10, 1, 1000), (2048, 40, 3, 3, 50), (256, 14_336, 1, 1, 4000), *map(random_case, SEEDS)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter's time goes by operations, not by their width."""
    monkeypatch.setattr(gpu_apply, "PRODUCT_ROWS", 512)
    monkeypatch.setattr(gpu_apply, "DOWN_ROWS", 256)


def records_of(blobs: torch.Tensor, layout: Layout) -> torch.Tensor:
    """uint8 [E * I, record] of whole blobs."""
    return blobs[:, layout.sketch_bytes:].reshape(-1, layout.record)


def choice(layout: Layout, k: int, n_tokens: int, n: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Ascending neurons with padding at the end of the last token's list, any fidelity."""
    neurons = torch.stack([torch.randperm(k * layout.neurons, generator=generator)[:n].sort().values
                           for _ in range(n_tokens)]).int()
    neurons[-1, n - n // 4:] = -1
    fidelity = torch.tensor([DOWN_ONLY, REFINED, FLOE], dtype=torch.int8)
    return neurons, fidelity[torch.randint(0, 3, neurons.shape, generator=generator)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_ends_as_none(bad, kind):
    """Level `exact`, and the sparse ones at every fidelity."""
    layout, generator = Layout(256, 24, 64), torch.Generator().manual_seed(2)
    blobs, x = random_blobs(1, layout, generator), torch.randn(1, 256, generator=generator)
    x[0, 70] = bad
    place, chosen = torch.zeros(1, 1, dtype=torch.int32), torch.arange(24, dtype=torch.int32)[None]
    for run in (gpu_apply.dense, dense.reference):
        assert run(x, blobs, place, layout, Gate(kind)).isnan().any()
    for run, fidelity in product((gpu_apply.apply, apply.reference), (DOWN_ONLY, REFINED, FLOE)):
        found = run(x, blobs, place, records_of(blobs, layout), chosen, chosen,
                    torch.full((1, 24), fidelity, dtype=torch.int8), layout, Gate(kind))
        assert found.isnan().any(), (run, fidelity)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("hidden,neurons,k,n_tokens,n",
                         SHAPES + [pytest.param(*shape, marks=pytest.mark.slow) for shape in SLOW])
def test_apply(hidden, neurons, k, n_tokens, n, biased):
    generator = torch.Generator().manual_seed(hidden)
    layout = Layout(hidden, neurons, default_group_size(hidden))
    n_experts = k + 1
    blobs = random_blobs(n_experts, layout, generator)
    place = torch.stack([torch.randperm(n_experts, generator=generator)[:k] for _ in range(n_tokens)]).int()
    chosen, fidelity = choice(layout, k, n_tokens, n, generator)
    shuffled = torch.randperm(n_experts * neurons, generator=generator)
    expert = torch.stack([place[t][(chosen[t].clamp_min(0) // neurons).long()] for t in range(n_tokens)])
    record_place = shuffled.argsort()[(expert * neurons + chosen.clamp_min(0) % neurons).long()].int()
    record_place[chosen < 0] = -1
    records = records_of(blobs, layout)[shuffled]
    x = torch.randn(n_tokens, hidden, generator=generator)
    bias = random_bias((n_tokens, k), neurons, generator, biased)
    gate = Gate("clamped_swiglu") if biased else Gate("silu")
    arguments = (x, blobs, place, records, record_place, chosen, fidelity, layout, gate, bias)
    expected = apply.reference(*arguments)
    found = gpu_apply.apply(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))
    assert bool(expected.any()) == (n > 0)


@pytest.mark.parametrize("biased, added", [(False, True), (True, False)])
@pytest.mark.parametrize("ranks", [20, 256])
def test_what_becomes_of_the_sums(monkeypatch, biased, added, ranks):
    """Of several tokens, in one part an expert and in several, a list that ends early: weights, bias of down,
    residual."""
    monkeypatch.setattr(gpu_apply, "RANKS_OF_BLOCK", ranks)
    monkeypatch.setattr(gpu_apply, "DOWN_ROWS", 16)
    generator, layout = torch.Generator().manual_seed(ranks), Layout(192, 40, 64)
    blobs, place = random_blobs(3, layout, generator), torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    x, every = torch.randn(2, 256, generator=generator), torch.arange(80, dtype=torch.int32).expand(2, -1).contiguous()
    where = (place.repeat_interleave(40, 1) * 40 + every % 40).int()
    mixture = Mixture(torch.rand(2, 2, generator=generator), 192,
                      torch.randn(2, 192, generator=generator) if added else None,
                      *((torch.randn(5, 192, generator=generator), torch.tensor([[4, 0], [1, 4]])) if biased else ()))
    rest = layout, Gate(), None, mixture
    where, every = (pad(part, (0, 7), value=-1) for part in (where, every))
    chosen = every, torch.full_like(every, REFINED, dtype=torch.int8)
    expected = dense.reference(x, blobs, place, *rest)
    for found in (gpu_apply.dense(x, blobs, place, *rest),
                  gpu_apply.apply(x, blobs, place, records_of(blobs, layout), where, *chosen, *rest)):
        assert found.shape == (2, 192)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


def test_apply_of_nothing_is_zero():
    layout = Layout(256, 32, 128)
    blobs = random_blobs(1, layout, torch.Generator().manual_seed(0))
    nothing = torch.full((1, 9), -1, dtype=torch.int32)
    found = gpu_apply.apply(torch.ones(1, 256), blobs, torch.zeros(1, 1, dtype=torch.int32),
                               records_of(blobs, layout), nothing, nothing, nothing.to(torch.int8), layout, Gate())
    assert not found.any()


@pytest.mark.parametrize("hidden,neurons,k,n_tokens,biased,kind", [
    *((256, 80, 2, 1, False, kind) for kind in KINDS), (256, 40, 2, 4, True, "clamped_swiglu"),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in (
        (256, 300, 2, 3, False, "silu"), (2880, 20, 1, 1, True, "clamped_swiglu"), (2048, 24, 3, 2, False, "gelu"),
        (4096, 20, 1, 1, True, "relu"), (5120, 20, 1, 1, False, "gelu_tanh")))])
def test_dense(monkeypatch, hidden, neurons, k, n_tokens, biased, kind):
    monkeypatch.setattr(gpu_apply, "RANKS_OF_BLOCK", 70)       # several blocks an expert, summed in order
    generator = torch.Generator().manual_seed(hidden)
    layout = Layout(hidden, neurons, default_group_size(hidden))
    blobs = random_blobs(3, layout, generator)
    place = torch.randint(0, 3, (n_tokens, k), generator=generator).int()
    x = torch.randn(n_tokens, hidden, generator=generator)
    bias = random_bias((n_tokens, k), neurons, generator, biased)
    expected = dense.reference(x, blobs, place, layout, Gate(kind), bias)
    found = gpu_apply.dense(x, blobs, place, layout, Gate(kind), bias)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("group", [64, 128])
def test_fixed_point(group):
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(group)) * torch.logspace(-3, 3, 512)
    fixed = gpu_activation.fixed_point(x, group)
    code = fixed.high.int() * 256 + fixed.low.int()
    grouped = code.unflatten(1, (-1, group)) * fixed.scale[..., None]
    largest = x.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True)
    assert ((grouped - x.unflatten(1, (-1, group))).abs() <= largest / 2 ** 15).all()
    torch.testing.assert_close(fixed.sums, grouped.sum(-1), rtol=1e-5, atol=1e-5 * float(largest.max()))


@pytest.mark.parametrize("hidden, neurons, kind, biased", [
    (256, 40, "silu", False), (192, 33, "clamped_swiglu", True), (512, 20, "gelu_tanh", False), (256, 20, "relu", True),
    pytest.param(2880, 150, "silu", True, marks=pytest.mark.slow)])
def test_whole_sums_are_the_same_bits_wherever_they_are_computed(hidden, neurons, kind, biased):
    """Reference, processor and card; whatever is computed beside, in whatever parts of the layer."""
    generator, layout = torch.Generator().manual_seed(neurons), Layout(hidden, neurons, default_group_size(hidden))
    blobs, place = random_blobs(4, layout, generator), torch.tensor([[2, 0, 3], [1, 2, 0]], dtype=torch.int32)
    x, bias = torch.randn(2, hidden, generator=generator) * 3, random_bias((2, 3), neurons, generator, biased)
    gate, fixed = Gate(kind), FixedPoint(*quantize.reference(x, layout.group, layout.padded)[2:])
    expected = whole_sums.reference(fixed, blobs, place, layout, gate, bias)
    for run in (gpu_whole_sums.whole_sums, cpu_whole_sums.whole_sums):
        assert torch.equal(run(fixed, blobs, place, layout, gate, bias), expected), run
        for part in ([0, 2], [1]):
            own = bias and bias._replace(ids=bias.ids[:, part].contiguous())
            found = run(fixed, blobs, place[:, part].contiguous(), layout, gate, own)
            assert torch.equal(found, expected[:, part]), (run, part)
    plain = dense.reference(x, blobs, place, layout, gate, bias)
    torch.testing.assert_close(from_sums(expected), plain, rtol=1e-3, atol=2e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("hidden, neurons, n, kind, biased", [
    (256, 40, 50, "silu", False), (192, 33, 99, "clamped_swiglu", True), (512, 20, 30, "gelu_tanh", False),
    (256, 20, 0, "relu", False), pytest.param(2880, 150, 200, "silu", True, marks=pytest.mark.slow)])
def test_chosen_sums_are_the_same_bits_wherever_they_are_computed(hidden, neurons, n, kind, biased):
    """At every fidelity; in one part, and in two that nobody sees in their sum."""
    generator, layout = torch.Generator().manual_seed(neurons), Layout(hidden, neurons, default_group_size(hidden))
    blobs, place = random_blobs(4, layout, generator), torch.tensor([[2, 0, 3], [1, 2, 0]], dtype=torch.int32)
    x, bias = torch.randn(2, hidden, generator=generator) * 3, random_bias((2, 3), neurons, generator, biased)
    gate, fixed = Gate(kind), FixedPoint(*quantize.reference(x, layout.group, layout.padded)[2:])
    chosen, fidelity = choice(layout, 3, 2, n, generator)
    expert = place.gather(1, (chosen.clamp_min(0) // neurons).long())
    where = torch.where(chosen < 0, -1, expert * neurons + chosen % neurons).int()
    rest = layout, gate, bias

    def run(function, *listed):
        return function(fixed, blobs, place, records_of(blobs, layout), *listed, *rest)
    expected = run(chosen_sums.reference, where, chosen, fidelity)
    for function in (gpu_whole_sums.chosen_sums, cpu_whole_sums.chosen_sums):
        assert torch.equal(run(function, where, chosen, fidelity), expected), function
        parts = [run(function, *(part[:, kept].contiguous() for part in (where, chosen, fidelity)))
                 for kept in (slice(0, None, 2), slice(1, None, 2))]
        assert torch.equal(together(*parts), expected), function
    plain = apply.reference(x, blobs, place, records_of(blobs, layout), where, chosen, fidelity, *rest)
    torch.testing.assert_close(from_sums(expected), plain, rtol=1e-3, atol=2e-4 * float(plain.abs().max()))
    every = torch.arange(3 * neurons, dtype=torch.int32).expand(2, -1).contiguous()
    where = (place.gather(1, (every // neurons).long()) * neurons + every % neurons).int()
    refined = torch.full_like(every, REFINED, dtype=torch.int8)
    assert torch.equal(run(chosen_sums.reference, where, every, refined),
                       whole_sums.reference(fixed, blobs, place, *rest)), "all of them are the whole expert"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_whole_sums_of_no_number_are_none(bad):
    layout, generator = Layout(256, 24, 64), torch.Generator().manual_seed(2)
    blobs, x = random_blobs(1, layout, generator), torch.randn(1, 256, generator=generator)
    x[0, 70] = bad
    fixed, place = FixedPoint(*quantize.reference(x, 64)[2:]), torch.zeros(1, 1, dtype=torch.int32)
    found = [run(fixed, blobs, place, layout, Gate()) for run in (
        whole_sums.reference, gpu_whole_sums.whole_sums, cpu_whole_sums.whole_sums)]
    assert all(torch.equal(each, found[0]) for each in found) and from_sums(found[0]).isnan().any()
