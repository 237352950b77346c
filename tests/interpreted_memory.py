"""Cases for Triton's interpreter (run by test_kernels_triton.py): take, fill and age, byte for byte."""
from __future__ import annotations

import pytest
import torch

from kernels import triton_age, triton_fill, triton_take
from kernels.age import age
from kernels.fill import fill
from kernels.take import Pool, new_pool, pin, take

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
            found = triton_take.take(twin, objects, need, torch.tensor([clock], dtype=torch.int32), ahead, lists[1])
            assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
            assert torch.equal(lists[0], lists[1])
            assert_same(pool, twin)


def test_take_of_a_list_longer_than_a_tile(monkeypatch):
    monkeypatch.setattr(triton_take, "LARGEST_TILE", 32)
    generator = torch.Generator().manual_seed(5)
    pool = new_pool(N_OBJECTS, 90)
    twin = copy(pool)
    for clock in range(3):
        objects, need = wishes(generator, 2, 100)
        lists = torch.zeros(2, 201, dtype=torch.int32)
        expected = take.reference(pool, objects, need, clock, False, lists[0])
        found = triton_take.take(twin, objects, need, clock, False, lists[1])
        assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
        assert torch.equal(lists[0], lists[1])
        assert_same(pool, twin)


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
    triton_fill.fill(far, source, near[1], place, have, need, misses)
    assert torch.equal(near[0], near[1])


@pytest.mark.parametrize("n_slots", [0, 1, 100, 250])
def test_age_frees_the_references_slots(monkeypatch, n_slots):
    monkeypatch.setattr(triton_age, "TILE", 64)
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
        found = triton_age.age(twin, torch.tensor([clock], dtype=torch.int32), reserve)
        assert torch.equal(expected, found)
        assert_same(pool, twin)
    assert n_slots < 100 or expected[0] > 0
