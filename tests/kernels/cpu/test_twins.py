"""Every compiled function equals its reference: random shapes, gates, biases, tokens, and what is not a number."""
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs numba, which compiles these functions")

from kernels.activation import KINDS, Gate, quantize_activation
from kernels.apply import apply
from kernels.cpu import activation as cpu_activation
from kernels.cpu import apply as cpu_apply
from kernels.cpu import score as cpu_score
from kernels.cpu import select as cpu_select
from kernels.cpu import threads
from kernels.dense import dense
from kernels.layout import Layout, default_group_size
from kernels.score import score, score_up
from kernels.select import BINS, DOWN_ONLY, FLOE, REFINED, select, select_above
from tests.support.random_experts import random_bias, random_blobs

Tensor = torch.Tensor
SMALL, LARGE = (64, 256, 320), (2048, 2816, 2880, 4096)     # hidden; 320 and 2880 are padded
tries = settings(max_examples=20, deadline=None)


@dataclass
class Case:
    """Random experts of one layout, and T tokens that are routed to k of them."""

    layout: Layout
    tokens: int
    routed: int
    gate: Gate
    biased: bool
    seed: int

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.seed)
        self.blobs = random_blobs(self.routed + 1, self.layout, self.draw)
        self.place = torch.stack([torch.randperm(self.routed + 1, generator=self.draw)[:self.routed]
                                  for _ in range(self.tokens)]).int()
        self.x = torch.randn(self.tokens, self.layout.hidden, generator=self.draw)
        self.weight = torch.randn(self.tokens, self.routed, generator=self.draw)
        self.bias = random_bias((self.tokens, self.routed), self.layout.neurons, self.draw, self.biased)

    def choice(self, share: float) -> tuple[Tensor, ...]:
        """records, record_place, neurons and fidelity as `apply` takes them: records lie in any order, the last token
        wants fewer of them."""
        n_all, n = self.routed * self.layout.neurons, int(share * self.routed * self.layout.neurons)
        neurons = torch.stack([torch.randperm(n_all, generator=self.draw)[:n].sort().values
                               for _ in range(self.tokens)]).int()
        neurons[-1, n - n // 4:] = -1
        kinds = torch.tensor([DOWN_ONLY, REFINED, FLOE], dtype=torch.int8)
        fidelity = kinds[torch.randint(0, 3, neurons.shape, generator=self.draw)]
        index = neurons.clamp_min(0).long()
        item = self.place.long().gather(1, index // self.layout.neurons) * self.layout.neurons
        order = torch.randperm(len(self.blobs) * self.layout.neurons, generator=self.draw)
        records = self.blobs[:, self.layout.sketch_bytes:].reshape(-1, self.layout.record)[order]
        where = order.argsort()[item + index % self.layout.neurons].int().masked_fill(neurons < 0, -1)
        return records, where, neurons, fidelity

    def scored(self) -> tuple:
        return (*quantize_activation.reference(self.x, self.layout.group, self.layout.padded), self.blobs, self.place)


@st.composite
def cases(draw: st.DrawFn, hidden: tuple[int, ...] = SMALL) -> Case:
    width = draw(st.sampled_from(hidden))
    neurons = draw(st.integers(1, 200 if width < 1000 else 40))
    group = draw(st.sampled_from((64, 128))) if width % 128 == 0 else default_group_size(width)
    return Case(Layout(width, neurons, group), draw(st.integers(1, 4)), draw(st.integers(1, 4)),
                Gate(draw(st.sampled_from(KINDS))), draw(st.booleans()), draw(st.integers(0, 2**16)))


def close(found: Tensor, expected: Tensor, of_largest: float) -> None:
    """Within a share of the largest number; both NaN where either is no number, whatever kind."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    broken = ~expected.isfinite()
    assert found[broken].isnan().all() and found[~broken].isfinite().all()
    if expected[~broken].numel():
        torch.testing.assert_close(found[~broken], expected[~broken], rtol=1e-3,
                                   atol=of_largest * float(expected[~broken].abs().max()) + 1e-30)


# --- activations ---------------------------------------------------------------------------------------------------

@tries
@given(tokens=st.integers(1, 4), groups=st.integers(1, 40), group=st.sampled_from((64, 128)),
       dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), seed=st.integers(0, 99))
def test_codes_and_scales_bit_for_bit(tokens, groups, group, dtype, seed):
    x = torch.randn(tokens, groups * group, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0, :group] = 0
    for columns in (None, (groups + 2) * group):
        for found, expected in zip(cpu_activation.quantize_activation(x, group, columns),
                                   quantize_activation.reference(x, group, columns), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_has_no_scale(value):
    x = torch.ones(2, 256)
    x[1, 70] = value
    codes, scales = cpu_activation.quantize_activation(x, 64)
    assert scales.isnan().tolist() == [[False] * 4, [False, True, False, False]]
    assert not codes[1, 64:128].any() and (codes[0] == 127).all()


# --- scores --------------------------------------------------------------------------------------------------------

def check_scores(case: Case) -> None:
    given_ = case.scored()
    histograms = torch.zeros(2, case.tokens, BINS, dtype=torch.int32)
    expected = score.reference(*given_, case.weight, case.layout, case.gate, case.bias, histogram=histograms[0])
    found = cpu_score.score(*given_, case.weight, case.layout, case.gate, case.bias, histogram=histograms[1])
    close(found, expected, 1e-5)
    assert histograms.sum(-1).tolist() == [[expected.shape[1]] * case.tokens] * 2
    given_ = *given_, case.layout, case.bias
    close(cpu_score.score_up(*given_), score_up.reference(*given_), 1e-5)


@tries
@given(cases())
def test_scores(case):
    check_scores(case)


@settings(tries, max_examples=6)
@given(cases(LARGE))
def test_scores_of_real_sizes(case):
    check_scores(case)


# --- the choice ----------------------------------------------------------------------------------------------------

@tries
@given(st.data())
def test_the_same_choice_bit_for_bit(data):
    n, tokens, seed = data.draw(st.integers(1, 3000)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
    total = data.draw(st.integers(0, n))
    refined, capacity = data.draw(st.integers(0, total)), data.draw(st.integers(total, n))
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, n, generator=draw).abs()
    ties = data.draw(st.integers(0, 4))
    scores = (scores * ties).round() if ties else scores        # many are equal, or none
    scores[0, ::7] = float("nan") if data.draw(st.booleans()) else 0
    histogram = torch.ones(tokens, BINS, dtype=torch.int32)
    arguments = scores, refined, torch.tensor([total], dtype=torch.int32), capacity
    found = cpu_select.select(*arguments, histogram=histogram)
    for mine, expected in zip(found, select.reference(*arguments), strict=True):
        assert torch.equal(mine, expected) and mine.dtype == expected.dtype
    assert not histogram.any()


@tries
@given(n=st.integers(1, 500), tokens=st.integers(1, 4), level=st.floats(0, 3), seed=st.integers(0, 99))
def test_everything_above_a_threshold(n, tokens, level, seed):
    scores = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed)).abs()
    scores[-1, n // 2] = float("nan")
    threshold = torch.full((tokens, n), level)
    for capacity in (n, n // 2, *([None] if tokens == 1 else [])):
        found = cpu_select.select_above(scores, threshold, capacity)
        for mine, expected in zip(found, select_above.reference(scores, threshold, capacity), strict=True):
            assert torch.equal(mine, expected) and mine.dtype == expected.dtype


# --- products ------------------------------------------------------------------------------------------------------

def check_products(case: Case, share: float) -> None:
    arguments = (case.x, case.blobs, case.place, case.layout, case.gate, case.bias)
    close(cpu_apply.dense(*arguments), dense.reference(*arguments), 2e-4)
    arguments = (case.x, case.blobs, case.place, *case.choice(share), case.layout, case.gate, case.bias)
    close(cpu_apply.apply(*arguments), apply.reference(*arguments), 2e-4)


@tries
@given(cases(), st.floats(0, 1))
def test_products(case, share):
    check_products(case, share)


@settings(tries, max_examples=6)
@given(cases(LARGE), st.floats(0, 1))
def test_products_of_real_sizes(case, share):
    check_products(case, share)


@tries
@given(cases(), st.sampled_from((float("nan"), float("inf"), -float("inf"))), st.integers(0, 63), st.integers(0, 3))
def test_what_is_no_number_stays_none(case, value, at, token):
    """One bad element makes everything bad that is computed from its token, and nothing else."""
    token %= case.tokens
    case.x[token, at] = value
    codes, scales, *rest = case.scored()
    found = [cpu_score.score(codes, scales, *rest, case.weight, case.layout, case.gate, case.bias),
             cpu_apply.dense(case.x, case.blobs, case.place, case.layout, case.gate, case.bias).flatten(1)]
    for rows in found:
        broken = rows.isnan()
        assert broken[token].all() and broken.sum() == rows.shape[1]


def test_nothing_chosen_is_zero():
    case = Case(Layout(256, 20, 128), 2, 2, Gate(), False, 0)
    records, where, neurons, fidelity = case.choice(0.5)
    neurons[:] = where[:] = -1
    found = cpu_apply.apply(case.x, case.blobs, case.place, records, where, neurons, fidelity, case.layout, case.gate)
    assert found.shape == (2, 2, 256) and not found.any()


def test_a_gate_that_only_python_knows_is_left_to_the_reference():
    case = Case(Layout(256, 20, 128), 1, 2, Gate("other", function=lambda gate, up: gate + up), False, 0)
    arguments = (case.x, case.blobs, case.place, case.layout, case.gate)
    assert cpu_apply.dense(*arguments) is NotImplemented
    assert torch.equal(dense(*arguments), dense.reference(*arguments))


def test_what_asks_for_gradients_is_computed_without():
    case = Case(Layout(256, 20, 128), 1, 2, Gate(), True, 0)
    case.x.requires_grad_()
    found = cpu_apply.dense(case.x, case.blobs, case.place, case.layout, case.gate, case.bias)
    codes, _ = cpu_activation.quantize_activation(case.x, 128)
    assert found.isfinite().all() and not found.requires_grad and codes.any()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_any_number_of_threads_makes_the_same_bits(share, monkeypatch):
    monkeypatch.setattr(threads, "GRAIN", 1)
    case = Case(Layout(320, 300, 64), 3, 3, Gate(), True, 1)
    chosen, before, found = case.choice(share), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append((cpu_score.score(*case.scored(), case.weight, case.layout, case.gate, case.bias),
                          cpu_apply.dense(case.x, case.blobs, case.place, case.layout, case.gate, case.bias),
                          cpu_apply.apply(case.x, case.blobs, case.place, *chosen, case.layout, case.gate,
                                          case.bias)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_sums_do_not_depend_on_where_records_lie():
    case = Case(Layout(256, 150, 128), 1, 3, Gate(), False, 2)
    records, where, neurons, fidelity = case.choice(0.7)
    moved = torch.randperm(len(records), generator=case.draw)
    there, elsewhere = (
        cpu_apply.apply(case.x, case.blobs, case.place, *lying, neurons, fidelity, case.layout, case.gate)
        for lying in ((records, where), (records[moved], moved.argsort().int()[where.long()])))
    assert torch.equal(there, elsewhere)
