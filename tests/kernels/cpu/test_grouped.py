"""Prefill's experts from their codes: as the reference, and bit for bit as a token alone."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs numba, which compiles these functions")

from kernels.activation import Gate
from kernels.cpu import apply as cpu_apply
from kernels.cpu import threads
from kernels.cpu.prefill import grouped as cpu_grouped
from kernels.dense import grouped
from kernels.layout import Layout
from tests.kernels.cpu.test_twins import LARGE, Case, cases, close, tries
from tests.support.random_experts import random_bias

Tensor = torch.Tensor
counted = st.lists(st.integers(1, 40), min_size=1, max_size=3)


def made(case: Case, counts: list[int]) -> tuple[tuple, Tensor]:
    """Arguments of `grouped`, and the expert of each row."""
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x = torch.randn(len(owner), case.layout.padded, generator=case.draw)
    x[:, case.layout.hidden:] = 0
    blobs = [case.blobs[i % len(case.blobs)] for i in range(len(counts))]
    bias = random_bias((len(counts),), case.layout.neurons, case.draw, case.biased)
    return (x, blobs, counts, case.layout, case.gate, bias), owner


def check(case: Case, counts: list[int]) -> None:
    arguments, owner = made(case, counts)
    x, blobs, _, layout, gate, bias = arguments
    found = cpu_grouped.grouped(*arguments)
    close(found, grouped.reference(*arguments), 2e-4)
    alone = cpu_apply.dense(x, torch.stack(blobs), owner[:, None].int(), layout, gate,
                            bias and bias._replace(ids=bias.ids[owner][:, None]))
    assert torch.equal(found, alone[:, 0])


@tries
@given(cases(), counted)
def test_grouped(case, counts):
    check(case, counts)


@settings(tries, max_examples=4)
@given(cases(LARGE), counted)
def test_grouped_of_real_sizes(case, counts):
    check(case, counts)


def test_what_is_no_number_stays_with_its_token():
    arguments, _ = made(Case(Layout(256, 40, 128), 1, 1, Gate(), False, 0), [11, 3])
    arguments[0][5, 70] = float("nan")
    broken = cpu_grouped.grouped(*arguments).isnan()
    assert broken[5].all() and not broken[:5].any() and not broken[6:].any()


def test_any_number_of_threads_makes_the_same_bits(monkeypatch):
    monkeypatch.setattr(threads, "GRAIN", 1)
    arguments, _ = made(Case(Layout(320, 150, 64), 1, 2, Gate(), True, 1), [70, 1, 9])
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(cpu_grouped.grouped(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_gate_that_only_python_knows_is_left_to_the_reference():
    arguments, _ = made(Case(Layout(256, 20, 128), 1, 1, Gate("other", function=torch.add), False, 0), [3, 2])
    assert cpu_grouped.grouped(*arguments) is NotImplemented
    assert torch.equal(grouped(*arguments), grouped.reference(*arguments))
