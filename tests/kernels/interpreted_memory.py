"""Cases for Triton's interpreter (run by test_interpreted.py): take, resolve, fill and age, byte for byte."""
from __future__ import annotations

import pytest
import torch

from kernels.evict import age
from kernels.fill import fill
from kernels.gpu import evict as gpu_evict
from kernels.gpu import fetch as gpu_fetch
from kernels.gpu import fill as gpu_fill
from kernels.gpu import pool as gpu_pool
from kernels.gpu.turns import WORDS
from kernels.layout import Layout
from kernels.pool import Pool, new_pool, pin, take
from kernels.resolve import Link, look_ahead, resolve_experts, resolve_neurons
from kernels.select import BINS, histogram_of, select

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


@pytest.mark.parametrize("blocks", [1, 2, 7])
@pytest.mark.parametrize("n_slots", [0, 5, 60, 180])
def test_what_is_missing_is_copied_by_the_launch_that_looks_it_up(monkeypatch, n_slots, blocks):
    """One to four tokens, experts, records and fetches ahead of two layers; at clock 5 nothing is missing. Every launch
    leaves the turn as it found it, so the next one needs no reset."""
    monkeypatch.setattr(gpu_pool, "COPYING_WARPS", 4 * blocks)
    monkeypatch.setattr(gpu_fill, "LANE_WORDS", 1)      # several chunks an object, several objects at a time
    generator, layout, each = torch.Generator().manual_seed(n_slots), Layout(256, 10, 128), 4096
    far = torch.randint(0, 256, (18, 1, each), dtype=torch.uint8, generator=generator)
    records = torch.randint(0, 256, (2, 9, 10, layout.record), dtype=torch.uint8, generator=generator)
    pools, counts = [(new_pool(18, n_slots // 10), new_pool(180, n_slots))], torch.zeros(2, 5, dtype=torch.int64)
    pools.append(tuple(copy(pool) for pool in pools[0]))
    near = torch.zeros(2, n_slots // 10 + 16, each, dtype=torch.uint8)
    near_records = torch.zeros(2, n_slots + 96, layout.record, dtype=torch.uint8)
    turns, done = torch.zeros(2, WORDS, dtype=torch.int32), torch.zeros((), dtype=torch.bool)
    for clock in range(6):
        rows, layer, now = 1 + clock % 4, clock % 2, torch.tensor([clock], dtype=torch.int32)
        if clock < 5:
            ids = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(rows)])
            neurons = torch.stack([torch.randperm(40, generator=generator)[:24].sort().values for _ in range(rows)])
            fidelity = torch.randint(0, 3, neurons.shape, generator=generator).to(torch.int8)
        most, found = torch.tensor([(2 * each, 0)[clock % 2]], dtype=torch.int32), []
        for side, (experts, chosen) in enumerate(((resolve_experts.reference, resolve_neurons.reference),
                                                  (gpu_pool.resolve_experts, gpu_pool.resolve_neurons))):
            link = Link(far[9 * layer:9 * layer + 9], near[side], turns[0])
            found.append((
                experts(pools[side][0], ids, 9 * layer, each, now, counts[side], done, None, link),
                experts(pools[side][0], ids[:1].flip(1), 9 - 9 * layer, each, now, counts[side], done, most,
                        Link(far[9 - 9 * layer:18 - 9 * layer], near[side], turns[1])),
                chosen(pools[side][1], neurons.int(), fidelity, ids, 90 * layer, layout, now, counts[side], done,
                       Link(records[layer], near_records[side], turns[0]))))
        for mine, theirs in zip(*found, strict=True):
            same_wishes(mine, theirs)
        for mine, theirs in zip(*pools, strict=True):
            assert_same(mine, theirs)
        assert torch.equal(*near) and torch.equal(*near_records) and torch.equal(*counts) and not turns.any()
    assert counts[0, 2] > 0 and (n_slots < 60 or counts[0, 3] > 0)


@pytest.mark.parametrize("blocks, experts, hidden", [(1, 9, 40), (3, 22, 64), (7, 22, 70)])
def test_look_ahead_fetches_what_the_router_would_pick(monkeypatch, blocks, experts, hidden):
    """Fewer and more blocks than pieces of the router; slots for some; at clock 2 no byte may come."""
    monkeypatch.setattr(gpu_fetch, "COPYING_WARPS", 4 * blocks)
    monkeypatch.setattr(gpu_fetch, "ROUTER_COLUMNS", 32)
    generator, each = torch.Generator().manual_seed(experts), 1024
    far = torch.randint(0, 256, (experts, 1, each), dtype=torch.uint8, generator=generator)
    router, near = torch.randn(experts, hidden, generator=generator), torch.zeros(2, 12, each, dtype=torch.uint8)
    pools, counts = [new_pool(experts, 10)], torch.zeros(2, 5, dtype=torch.int64)
    pools.append(copy(pools[0]))
    turn, done = torch.zeros(WORDS, dtype=torch.int32), torch.zeros((), dtype=torch.bool)
    for clock in range(4):
        x, now = torch.randn(1 + clock, hidden, generator=generator), torch.tensor([clock], dtype=torch.int32)
        most = torch.tensor([each * (4, 1, 0, 9)[clock]], dtype=torch.int32)
        mine, theirs = (
            look(x, router, 4, pools[side], 0, each, now, counts[side], done, most, Link(far, near[side], turn))
            for side, look in enumerate((look_ahead.reference, gpu_fetch.look_ahead)))
        same_wishes(mine, theirs)
        assert_same(*pools)
        assert torch.equal(*near) and torch.equal(*counts) and not turn.any()
    assert counts[0, 3] > 0


@pytest.mark.parametrize("blocks, tile", [(1, 64), (3, 64), (2, 32), (5, 16), (1, 16)])
def test_what_is_chosen_is_looked_up_and_copied(monkeypatch, blocks, tile):
    """Of 40 scores in one tile, in two, in several; everything, nothing, some; counts and turn are zero afterwards."""
    for name, value in (("TILE", tile), ("warps_of", lambda n: 4), ("COPYING_WARPS", 4 * blocks), ("LARGEST_TILE", 32)):
        monkeypatch.setattr(gpu_fetch, name, value)
    generator, layout, n_slots = torch.Generator().manual_seed(tile), Layout(256, 10, 128), 30
    records = torch.randint(0, 256, (9, 10, layout.record), dtype=torch.uint8, generator=generator)
    pools, counts = [new_pool(180, n_slots)], torch.zeros(2, 5, dtype=torch.int64)
    pools.append(copy(pools[0]))
    near = torch.zeros(2, n_slots + 96, layout.record, dtype=torch.uint8)
    turn, done = torch.zeros(WORDS, dtype=torch.int32), torch.zeros((), dtype=torch.bool)
    for clock, (refined, total) in enumerate(((5, 14), (40, 40), (0, 0), (0, 9), (7, 20))):
        scores, now = torch.rand(1, 40, generator=generator) ** 4, torch.tensor([clock], dtype=torch.int32)
        scores[0, 11:30:2] = scores[0, 10]                   # ties
        ids, budget = torch.randperm(9, generator=generator)[None, :4], torch.tensor([[refined], [total]]).int()
        histogram = torch.zeros(3, BINS, dtype=torch.int32)
        histogram[:1] = histogram_of(scores)
        neurons, fidelity = select.reference(scores, refined, total, 40)
        expected = resolve_neurons.reference(pools[0], neurons, fidelity, ids, 90, layout, now, counts[0], done,
                                             Link(records, near[0], turn))
        found = gpu_fetch.choose_neurons(scores, *budget, 40, histogram, ids, pools[1], 90, layout, now, counts[1],
                                          done, Link(records, near[1], turn))
        assert all(map(torch.equal, found, (neurons, fidelity, expected.place)))
        assert_same(*pools)
        assert torch.equal(*near) and torch.equal(*counts) and not turn.any() and not histogram.any()
    assert counts[0, 2] > 0 and counts[0, 1] > 0


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
