"""Near memory's tables and prefill's decoding, compiled, against their references: random histories and shapes."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs numba, which compiles these functions")

from kernels.cpu import pool as cpu_pool
from kernels.cpu.prefill import dequantize as cpu_dequantize
from kernels.evict import age
from kernels.layout import Layout
from kernels.pool import Pool, new_pool, pin, take
from kernels.resolve import resolve_experts, resolve_neurons
from kernels.select import DOWN_ONLY, REFINED
from kernels.trunk.linear import dequantize_rows
from tests.kernels.cpu.test_linear_twin import matrix

Tensor = torch.Tensor
LAYOUT = Layout(64, 6, 64)
EXPERTS = 8


def twice(pool: Pool) -> tuple[Pool, Pool]:
    return tuple(Pool(*(table.clone() for table in pool)) for _ in range(2))


def same(found, expected) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs), (mine, theirs)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(0, 999))
def test_a_history(slots, tokens, seed):
    """Experts and records taken on demand and ahead, pinned, aged: every table the same after every step."""
    draw, n_records = torch.Generator().manual_seed(seed), EXPERTS * LAYOUT.neurons
    pools = [twice(new_pool(n, min(slots, n))) for n in (EXPERTS, n_records)]
    counts, done = torch.zeros(2, 5, dtype=torch.int64), torch.zeros((), dtype=torch.bool)
    for step in range(1, 8):
        clock = torch.tensor([step], dtype=torch.int32)
        ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:3] for _ in range(tokens)])
        neurons = torch.stack([torch.randperm(3 * LAYOUT.neurons, generator=draw)[:7].sort().values
                               for _ in range(tokens)]).int()
        neurons[-1, 5:] = -1
        fidelity = torch.tensor([DOWN_ONLY, REFINED], dtype=torch.int8)[torch.randint(0, 2, neurons.shape,
                                                                                       generator=draw)]
        most = torch.randint(0, 4 * LAYOUT.blob_bytes, (1,), generator=draw).int()
        done.fill_(step == 5)
        results = []
        for which, (asked, chosen, evict) in enumerate((
                (cpu_pool.resolve_experts, cpu_pool.resolve_neurons, cpu_pool.age),
                (resolve_experts.reference, resolve_neurons.reference, age.reference))):
            experts, records = pools[0][which], pools[1][which]
            found = [*asked(experts, ids, 0, LAYOUT.blob_bytes, clock, counts[which], done),
                     *asked(experts, ids[:1].flip(1), 0, LAYOUT.blob_bytes, clock, counts[which], done, most),
                     *chosen(records, neurons, fidelity, ids, 0, LAYOUT, clock, counts[which], done)]
            if step == 3:
                pin(records, torch.arange(5), clock)
            results.append([*found, evict(experts, clock, 3), evict(records, clock, int(most) % 9)])
        same(*results)
        for pair in pools:
            same(*pair)
        assert torch.equal(*counts)


def test_ages_beyond_those_that_are_told_apart_and_nothing_wanted():
    pools = twice(new_pool(50, 20))
    for run, pool in zip((cpu_pool.take, take.reference), pools, strict=True):
        for clock in (1, 2, 1500, 3000):
            run(pool, torch.arange(clock % 7, clock % 7 + 5, dtype=torch.int32), torch.full((5,), 9).int(), clock)
    same(*pools)
    same([cpu_pool.age(pools[0], 3001, 12), *pools[0]], [age.reference(pools[1], 3001, 12), *pools[1]])
    nothing = torch.empty(2, 0, dtype=torch.int32)
    same(cpu_pool.take(pools[0], nothing, nothing, 4), take.reference(pools[1], nothing, nothing, 4))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.sampled_from((1, 3, 4, 45)), st.sampled_from((8, 4)), st.integers(0, 99))
def test_dequantize_rows(rows, groups, bits, seed):
    given, outs = matrix(rows, 64 * groups, bits, seed), torch.empty(2, rows, 64 * groups)
    assert cpu_dequantize.dequantize_rows(*given, outs[0]) is None
    dequantize_rows.reference(*given, outs[1])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-6)
    assert cpu_dequantize.dequantize_rows(*given, outs[0].bfloat16()) is NotImplemented
