"""Near memory under random sequences of what the runtime may do: what is read is what was stored, within the bytes.

The kernels' bookkeeping has its own machine; here it is the engine's two caches, filled from real far bytes. Tokens
begin and end, experts and records are demanded (whole or prefix) and fetched ahead, in any order.
"""
from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.experts.cache import SparseCache, WholeCache
from engine.planning.arena import ArenaSizes
from kernels.evict import age
from kernels.fill import fill
from kernels.layout import Layout
from kernels.pool import take

L, E, K, HIDDEN = 3, 4, 2, 64
LAYOUT = Layout(HIDDEN, 3, 64)
N = LAYOUT.neurons
BUDGETS = [4, 5, 3]  # most records a layer may need
SETTINGS = settings(max_examples=30, stateful_step_count=30, deadline=None,
                    suppress_health_check=[HealthCheck.too_slow])
FAR = torch.randint(0, 256, (L, E, LAYOUT.blob_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def consistent(pool, used: set[int]) -> None:
    """A slot holds at most one object, an object is in at most one slot, free slots are free, used ones are near."""
    held = {slot: item for slot, item in enumerate(pool.object_of.tolist()) if item >= 0}
    assert len(set(held.values())) == len(held)
    slot_of = pool.slot_of.tolist()
    assert {item: slot for slot, item in held.items()} == {i: s for i, s in enumerate(slot_of) if s >= 0}
    free = pool.free[:int(pool.n_free)].tolist()
    assert len(set(free)) == len(free) and set(free) | set(held) == set(range(len(pool.object_of)))
    assert not set(free) & set(held)
    assert all(slot_of[item] >= 0 for item in used), "used in this token and gone"


def evicted(cache, clock: int) -> None:
    """Between tokens, as the runtime does."""
    for pool, reserve in cache.pools():
        n, in_vain = age(pool, clock, reserve).tolist()
        assert 0 <= in_vain <= n


class Sparse(RuleBasedStateMachine):
    """Sketches and records as levels `quality` to `floe` use them."""

    @initialize(spare=st.integers(0, 40 * LAYOUT.record))
    def start(self, spare: int) -> None:
        smallest = K * LAYOUT.sketch_bytes + max(BUDGETS) * LAYOUT.record
        self.limit = smallest + spare
        sizes = ArenaSizes(L * E, LAYOUT.sketch_bytes, K, N, LAYOUT.record, max(BUDGETS))
        self.cache = SparseCache(LAYOUT, sizes, L, sum(BUDGETS), self.limit, "cpu")
        self.clock, self.sketches_used, self.records_used = 1, set(), set()

    def sketches(self, layer: int) -> torch.Tensor:
        return FAR[layer][:, None, :LAYOUT.sketch_bytes]

    def records(self, layer: int) -> torch.Tensor:
        return FAR[layer][:, LAYOUT.sketch_bytes:].unflatten(1, (N, LAYOUT.record))

    @rule(layer=st.integers(0, L - 1), ids=st.permutations(range(E)), n=st.integers(1, K), ahead=st.booleans())
    def take_sketches(self, layer: int, ids: list[int], n: int, ahead: bool) -> None:
        ids = torch.tensor(ids[:n], dtype=torch.int32)
        near = self.cache.sketch_pool.slot_of[ids.long() + layer * E] >= 0
        need = torch.full_like(ids, LAYOUT.sketch_bytes)
        place, have = take(self.cache.sketch_pool, ids + layer * E, need, self.clock, ahead)
        fill(self.sketches(layer), ids, self.cache.sketches, place, have, need)
        assert int((need - have)[place >= 0].sum()) == int((~near & (place >= 0)).sum()) * LAYOUT.sketch_bytes
        assert ahead or (place >= 0).all()
        assert ahead is False or (place < len(self.cache.sketch_pool.object_of)).all()
        for e, where in zip(ids.tolist(), place.tolist(), strict=True):
            assert where < 0 or torch.equal(self.cache.sketches[where], FAR[layer, e, :LAYOUT.sketch_bytes])
        if not ahead:
            found = self.cache.sketch_pool.slot_of[ids.long() + layer * E] >= 0
            self.sketches_used |= {int(e) + layer * E for e in ids[found]}

    @rule(layer=st.integers(0, L - 1), data=st.data())
    def take_records(self, layer: int, data: st.DataObject) -> None:
        items = data.draw(st.lists(st.integers(0, E * N - 1), min_size=1, max_size=BUDGETS[layer], unique=True))
        need = torch.tensor([data.draw(st.sampled_from((LAYOUT.prefix, LAYOUT.record))) for _ in items]).int()
        rows = torch.tensor(items, dtype=torch.int32)
        pool = self.cache.record_pool
        slots = pool.slot_of[rows.long() + layer * E * N].long()
        held = torch.zeros(len(items), dtype=torch.int32)
        held[slots >= 0] = pool.held[slots[slots >= 0]]
        place, have = take(pool, rows + layer * E * N, need, self.clock)
        fill(self.records(layer), rows, self.cache.records, place, have, need)
        assert int((need - have).sum()) == int((need - held).clamp_min(0).sum())
        assert len(set(place.tolist())) == len(items)
        for item, where, n in zip(items, place.tolist(), need.tolist(), strict=True):
            assert torch.equal(self.cache.records[where, :n], self.records(layer)[item // N, item % N, :n])
        self.records_used |= {i + layer * E * N for i in items if int(pool.slot_of[i + layer * E * N]) >= 0}

    @rule()
    def end_token(self) -> None:
        evicted(self.cache, self.clock)
        self.holds()  # the token that just ended keeps what it used
        self.clock += 1
        self.sketches_used, self.records_used = set(), set()

    @invariant()
    def holds(self) -> None:
        cache = self.cache
        consistent(cache.sketch_pool, self.sketches_used)
        consistent(cache.record_pool, self.records_used)
        arenas = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (cache.sketches, cache.records)}
        assert sum(arenas.values()) == cache.near_bytes <= self.limit and cache.used_bytes() <= cache.near_bytes
        pool = cache.record_pool  # everything that is near, not only what was just read
        for slot, item in enumerate(pool.object_of.tolist()):
            if item >= 0:
                layer, rest, n = item // (E * N), item % (E * N), int(pool.held[slot])
                assert torch.equal(cache.records[slot, :n], self.records(layer)[rest // N, rest % N, :n])


class Whole(RuleBasedStateMachine):
    """Whole experts as level `exact` uses them."""

    @initialize(rows=st.integers(K, L * E + 2), rest=st.integers(0, 100))
    def start(self, rows: int, rest: int) -> None:
        self.limit = rows * LAYOUT.blob_bytes + rest
        self.cache = WholeCache(ArenaSizes(L * E, LAYOUT.blob_bytes, K), L, self.limit, "cpu")
        self.clock, self.used = 1, set()

    @rule(layer=st.integers(0, L - 1), ids=st.permutations(range(E)), n=st.integers(1, K), ahead=st.booleans())
    def take_experts(self, layer: int, ids: list[int], n: int, ahead: bool) -> None:
        ids = torch.tensor(ids[:n], dtype=torch.int32)
        need = torch.full_like(ids, LAYOUT.blob_bytes)
        place, have = take(self.cache.pool, ids + layer * E, need, self.clock, ahead)
        fill(FAR[layer][:, None], ids, self.cache.blobs, place, have, need)
        assert ahead or (place >= 0).all()
        for expert, where in zip(ids.tolist(), place.tolist(), strict=True):
            assert where < 0 or torch.equal(self.cache.blobs[where], FAR[layer, expert])
            if not ahead and int(self.cache.pool.slot_of[layer * E + expert]) >= 0:
                self.used.add(layer * E + expert)

    @rule()
    def end_token(self) -> None:
        evicted(self.cache, self.clock)
        self.holds()
        self.clock, self.used = self.clock + 1, set()

    @invariant()
    def holds(self) -> None:
        consistent(self.cache.pool, self.used)
        held = self.cache.blobs.untyped_storage().nbytes()
        assert held == self.cache.near_bytes <= self.limit and self.cache.used_bytes() <= self.cache.near_bytes
        for slot, item in enumerate(self.cache.pool.object_of.tolist()):
            assert item < 0 or torch.equal(self.cache.blobs[slot], FAR[item // E, item % E])


Sparse.TestCase.settings = Whole.TestCase.settings = SETTINGS
TestSparseCache, TestWholeCache = Sparse.TestCase, Whole.TestCase
