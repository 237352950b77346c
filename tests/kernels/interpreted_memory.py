"""Cases for Triton's interpreter (run by test_interpreted.py): take, resolve, fill and age, byte for byte."""
from __future__ import annotations

import pytest
import torch

from kernels.evict import age
from kernels.fill import fill
from kernels.gpu import evict as gpu_evict
from kernels.gpu import fill as gpu_fill
from kernels.gpu import pool as gpu_pool
from kernels.layout import Layout
from kernels.pool import Pool, new_pool, pin, take
from kernels.resolve import resolve_experts, resolve_neurons

N_OBJECTS = 300


def copy(pool: Pool) -> Pool:
    return Pool(*(table.clone() for table in pool))


def assert_same(a: Pool, b: Pool) -> None:
    """Every table; of the free stack only what is on it."""
    n = int(a.n_free)
    for name, left, right in zip(Pool._fields, a, b, strict=True):
        assert torch.equal(*((left[:n], right[:n]) if name == "free" else (left, right))), name


def wishes(generator: torch.Generator, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct objects a row, sorted, some -1 at the end, with a prefix or the whole wanted of each."""
    objects = torch.stack([torch.randperm(N_OBJECTS, generator=generator)[:columns].sort().values
                           for _ in range(rows)]).int()
    n_padding = int(torch.randint(0, columns + 1, (1,), generator=generator)) // 2
    objects[:, columns - n_padding:] = -1
    need = torch.tensor([128, 384], dtype=torch.int32)[torch.randint(0, 2, objects.shape, generator=generator)]
    return objects, need


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("n_slots", [0, 1, 40, N_OBJECTS])
def test_take_gives_the_references_places_and_tables(rows, n_slots):
    generator = torch.Generator().manual_seed(rows * 1000 + n_slots)
    pool = new_pool(N_OBJECTS, n_slots)
    twin = copy(pool)
    for clock in range(6):
        objects, need = wishes(generator, rows, 24)
        for tables in (pool, twin):
            pin(tables, objects[0, :5 * (clock % 2)], clock)
        for ahead in (clock % 3 == 2, False):
            lists = torch.full((2, 1 + objects.numel()), -7, dtype=torch.int32)
            expected = take.reference(pool, objects, need, clock, ahead, lists[0])
            found = gpu_pool.take(twin, objects, need, torch.tensor([clock], dtype=torch.int32), ahead, lists[1])
            assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
            assert torch.equal(lists[0], lists[1])
            assert_same(pool, twin)


@pytest.mark.parametrize("shape", [(0,), (1, 0), (3, 0)])
def test_take_of_nothing(shape):
    pool = new_pool(9, 4)
    twin, nothing = copy(pool), torch.zeros(shape, dtype=torch.int32)
    lists = torch.full((2, 1), -7, dtype=torch.int32)
    expected = take.reference(pool, nothing, nothing, 3, False, lists[0])
    found = gpu_pool.take(twin, nothing, nothing, 3, False, lists[1])
    assert all(tensor.shape == shape for tensor in (*expected, *found)) and lists.tolist() == [[0], [0]]
    assert_same(pool, twin)


def test_take_of_a_list_longer_than_a_tile(monkeypatch):
    monkeypatch.setattr(gpu_pool, "LARGEST_TILE", 32)
    generator = torch.Generator().manual_seed(5)
    pool = new_pool(N_OBJECTS, 90)
    twin = copy(pool)
    for clock in range(3):
        objects, need = wishes(generator, 2, 100)
        lists = torch.zeros(2, 201, dtype=torch.int32)
        expected = take.reference(pool, objects, need, clock, False, lists[0])
        found = gpu_pool.take(twin, objects, need, clock, False, lists[1])
        assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
        assert torch.equal(lists[0], lists[1])
        assert_same(pool, twin)


def same_wishes(mine, theirs) -> None:
    """Of two Resolved: every table; of the misses only those that are listed."""
    n = int(mine.misses[0])
    assert torch.equal(mine.misses[:n + 1], theirs.misses[:n + 1])
    assert all(map(torch.equal, mine[:4], theirs[:4]))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("n_slots", [0, 5, 60])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_resolve_gives_the_references_places_tables_and_counts(rows, n_slots, kind):
    """Experts, records and fetches ahead of a layer by turns, in one pool; a finished answer counts nothing."""
    generator, layout = torch.Generator().manual_seed(rows + n_slots), Layout(256, 10, 128)
    pools, counts = [new_pool(N_OBJECTS, n_slots)], torch.zeros(2, 5, dtype=torch.int64)
    pools.append(copy(pools[0]))
    for clock in range(6):
        now, done = torch.tensor([clock], dtype=torch.int32), torch.tensor(clock == 4)
        first = 90 * (clock % 2)
        ids = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(rows)]).to(kind)
        neurons = torch.stack([torch.randperm(40, generator=generator)[:24].sort().values for _ in range(rows)]).int()
        neurons[-1, 20 - clock:] = -1
        fidelity = torch.randint(0, 3, neurons.shape, generator=generator).to(torch.int8)
        most = torch.tensor([(9000, 0, 5000)[clock % 3]], dtype=torch.int32)
        found = []
        for pool, total, experts, records in zip(
                pools, counts, (resolve_experts.reference, gpu_pool.resolve_experts),
                (resolve_neurons.reference, gpu_pool.resolve_neurons), strict=True):
            rest = now, total, done
            found.append((experts(pool, ids, first, 4000, *rest),
                          experts(pool, ids[-1:].clone(), first + 90, 4000, *rest, most),
                          records(pool, neurons, fidelity, ids, first, layout, *rest)))
        for mine, theirs in zip(*found, strict=True):
            same_wishes(mine, theirs)
        assert_same(*pools)
        assert torch.equal(counts[0], counts[1])
    assert counts[0, 0] >= counts[0, 2] > 0 and (n_slots < 60 or (counts[0, 1] > 0 and counts[0, 3] > 0))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("n_bytes", [1152, 2304, 12_288])
def test_fill_copies_the_same_bytes(n_bytes, listed):
    generator = torch.Generator().manual_seed(n_bytes)
    experts, objects, slots, n = 4, 9, 30, 20
    blobs = torch.randint(0, 256, (experts, 256 + objects * n_bytes), dtype=torch.uint8, generator=generator)
    far = blobs[:, 256:].unflatten(1, (objects, n_bytes))
    source = torch.randperm(experts * objects, generator=generator)[:n].int()
    place = torch.randperm(slots, generator=generator)[:n].int()
    place[3] = -1
    prefix = n_bytes // 256 * 128
    steps = torch.tensor([0, prefix, n_bytes], dtype=torch.int32)
    have, need = (steps[torch.randint(0, 3, (n,), generator=generator)] for _ in range(2))
    near = torch.randint(0, 256, (2, slots, n_bytes), dtype=torch.uint8, generator=generator)
    near[1] = near[0]
    missing = ((have < need) & (place >= 0)).nonzero()[:, 0].int()
    misses = torch.cat((torch.tensor([len(missing)], dtype=torch.int32), missing)) if listed else None
    fill.reference(far, source, near[0], place, have, need)
    gpu_fill.fill(far, source, near[1], place, have, need, misses)
    assert torch.equal(near[0], near[1])


@pytest.mark.parametrize("n_slots", [0, 1, 100, 250])
def test_age_frees_the_references_slots(monkeypatch, n_slots):
    monkeypatch.setattr(gpu_evict, "TILE", 64)
    generator = torch.Generator().manual_seed(n_slots)
    pool = new_pool(N_OBJECTS, n_slots)
    twin = copy(pool)
    for clock in (0, 1, 2, 3, 5000, 5001, 9999):                  # gaps beyond the ages told apart
        for ahead in (True, False):
            objects, need = wishes(generator, 1, 40)
            for tables in (pool, twin):
                take.reference(tables, objects, need, clock, ahead)
        reserve = int(torch.randint(0, 120, (1,), generator=generator))
        for tables in (pool, twin):
            pin(tables, objects[0, :20], clock)
        expected = age.reference(pool, clock, reserve)
        found = gpu_evict.age(twin, torch.tensor([clock], dtype=torch.int32), reserve)
        assert torch.equal(expected, found)
        assert_same(pool, twin)
    assert n_slots < 100 or expected[0] > 0


@pytest.mark.parametrize("n_slots", [0, 7, 60, N_OBJECTS])
def test_slots_hold_what_the_references_hold_step_by_step(monkeypatch, n_slots):
    """Demand of one to four tokens, fetches ahead and the ends of tokens in any order: after every kernel the same
    tables, and after every fill the same bytes in every slot and bounce row."""
    monkeypatch.setattr(gpu_evict, "TILE", 64)
    generator, bounce, whole = torch.Generator().manual_seed(n_slots), 4 * 12, 384
    far = torch.randint(0, 256, (3, N_OBJECTS // 3, whole), dtype=torch.uint8, generator=generator)
    pool, near, clock = new_pool(N_OBJECTS, n_slots), torch.zeros(2, n_slots + bounce, whole, dtype=torch.uint8), 0
    twin, n_evicted, n_hits = copy(pool), 0, 0
    for turn in torch.randint(0, 6, (30,), generator=generator).tolist():
        if turn == 5:
            reserve = int(torch.randint(0, 30, (1,), generator=generator))
            freed = age.reference(pool, clock, reserve)
            assert torch.equal(freed, gpu_evict.age(twin, torch.tensor([clock], dtype=torch.int32), reserve))
            clock, n_evicted = clock + 1, n_evicted + int(freed[0])
        else:
            objects, need = wishes(generator, max(1, turn), 12)   # turn 0: ahead of demand
            lists = torch.zeros(2, 1 + objects.numel(), dtype=torch.int32)
            expected = take.reference(pool, objects, need, clock, turn == 0, lists[0])
            found = gpu_pool.take(twin, objects, need, clock, turn == 0, lists[1])
            assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
            n_hits += int((found[1] > 0).sum())
            fill.reference(far, objects, near[0], *expected, need, lists[0])
            gpu_fill.fill(far, objects, near[1], *found, need, lists[1])
        assert_same(pool, twin)
        assert torch.equal(near[0], near[1])
        for slot, item in enumerate(pool.object_of.tolist()):
            if item >= 0:
                n_bytes = int(pool.held[slot])
                assert torch.equal(near[1, slot, :n_bytes], far.view(N_OBJECTS, whole)[item, :n_bytes])
    assert n_hits or n_slots == 0
    assert n_evicted or n_slots in (0, N_OBJECTS)
