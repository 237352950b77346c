"""The torch references against even plainer code: bits, numbers and the cache protocol."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kernels.activation import KINDS, Gate, quantize_activation
from kernels.apply import apply
from kernels.dense import dense
from kernels.evict import age
from kernels.fill import fill
from kernels.layout import Layout
from kernels.planes import (
    Nested,
    decode_down,
    decode_gate,
    decode_sketch,
    decode_up,
    pack2,
    pack4,
    record_rows,
    sketch_rows,
    unpack2,
    unpack4,
)
from kernels.pool import PINNED, new_pool, pin, take
from kernels.score import score, score_up
from kernels.select import BINS, DOWN_ONLY, FLOE, REFINED, histogram_of, select, select_above
from tests.support.random_experts import blob_of, random_bias, random_blobs, random_expert

LAYOUTS = [Layout(256, 5, 128), Layout(320, 3, 64), Layout(2880, 4, 64), Layout(2048, 3, 128)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- planes --------------------------------------------------------------------------------------------------------

def words_as_ints(plane: torch.Tensor) -> list[int]:
    return [int.from_bytes(bytes(word), "little") for word in plane.view(-1, 4).tolist()]


def test_two_bit_words_bit_for_bit():
    codes = torch.randint(0, 4, (1, 512), dtype=torch.uint8, generator=seeded())
    for w, word in enumerate(words_as_ints(pack2(codes)[0])):
        for e in range(16):
            assert word >> 8 * (e % 4) + 2 * (e // 4) & 3 == codes[0, 16 * w + e]
    assert torch.equal(unpack2(pack2(codes)), codes)


def test_four_bit_words_bit_for_bit():
    codes = torch.randint(0, 16, (1, 512), dtype=torch.uint8, generator=seeded())
    for w, word in enumerate(words_as_ints(pack4(codes)[0])):
        for e in range(8):
            assert word >> 8 * (e % 4) + 4 * (e // 4) & 15 == codes[0, 8 * w + e]
    assert torch.equal(unpack4(pack4(codes)), codes)


def test_shifted_words_meet_the_activation_in_natural_order():
    """What dp4a does: the bytes of (word >> 2s) & 0x03030303 times activation word 4*w + s."""
    codes = torch.randint(0, 4, (1, 256), dtype=torch.uint8, generator=seeded(1))
    x = torch.randint(-127, 128, (256,), generator=seeded(2))
    total = 0
    for w, word in enumerate(words_as_ints(pack2(codes)[0])):
        for s in range(4):
            lanes = (word >> 2 * s & 0x03030303).to_bytes(4, "little")
            total += sum(code * int(x[16 * w + 4 * s + i]) for i, code in enumerate(lanes))
    assert total == int(codes[0].long() @ x)


def values(codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    per_code = scales.float().repeat_interleave(group, dim=1)
    return per_code[..., 0] * codes.float() + per_code[..., 1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.hidden))
def test_rows_decode_to_the_quantised_values(layout):
    gate, up, down = random_expert(layout, seeded(3))
    sketch, record = sketch_rows(gate, up, layout), record_rows(gate, up, down, layout)
    assert sketch.shape == (layout.neurons, layout.sketch_row) and record.shape == (layout.neurons, layout.record)
    pairs = [*zip(decode_sketch(sketch, layout), (values(m.codes >> 2, m.coarse, layout.group) for m in (gate, up)),
                  strict=True),
             (decode_gate(sketch, record, layout), values(gate.codes, gate.fine, layout.group)),
             (decode_up(sketch, record, layout), values(up.codes, up.fine, layout.group)),
             (decode_down(record[:, :layout.prefix], layout), values(down.codes, down.fine, layout.group))]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.hidden))
def test_layout_is_aligned_and_does_not_overlap(layout):
    assert layout.record % 128 == layout.prefix % 32 == layout.sketch_bytes % 128 == layout.refine_at % 16 == 0
    assert layout.sketch_row % 16 == 0 and layout.padded % 256 == 0
    assert layout.refine_at >= layout.record_scales_at + 3 * layout.scales
    assert layout.record >= layout.refine_at + 2 * layout.plane2
    assert layout.prefix >= layout.plane4 + layout.scales


# --- activation, score ---------------------------------------------------------------------------------------------

def test_quantised_activation_is_within_half_a_step():
    x = torch.randn(3, 512, generator=seeded()) * torch.logspace(-4, 4, 512)
    codes, scales = quantize_activation(x, 64)
    step = scales.repeat_interleave(64, dim=1)
    assert ((codes.float() * step - x).abs() <= step * 0.5001).all()
    assert not quantize_activation(torch.zeros(1, 128), 128)[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_the_dense_product_of_the_sketch(kind):
    layout = Layout(256, 7, 128)
    experts = [random_expert(layout, seeded(i)) for i in range(3)]
    blobs = torch.stack([blob_of(*expert, layout) for expert in experts])
    codes, scales = quantize_activation(torch.randn(2, 256, generator=seeded(9)), 128)
    x = codes.float() * scales.repeat_interleave(128, dim=1)
    place, weight = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32), torch.rand(2, 2, generator=seeded(8))
    bias = random_bias((2, 2), 7, seeded(7))
    histogram = torch.zeros(2, BINS, dtype=torch.int32)
    found = score(codes, scales, blobs, place, weight, layout, Gate(kind), bias, histogram)
    for t in range(2):
        for j in range(2):
            gate, up, _ = experts[int(place[t, j])]
            g, u = (values(m.codes >> 2, m.coarse, 128) @ x[t] + b[bias.ids[t, j]]
                    for m, b in zip((gate, up), bias[:2], strict=True))
            torch.testing.assert_close(found.view(2, 2, 7)[t, j], Gate(kind)(g, u).abs() * weight[t, j],
                                       rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(score_up(codes, scales, blobs, place, layout, bias).view(2, 2, 7)[t, j],
                                       u.abs(), rtol=1e-4, atol=1e-5)
    assert torch.equal(histogram, histogram_of(found)) and histogram.sum() == found.numel()


# --- select --------------------------------------------------------------------------------------------------------

def by_sorting(scores: list[float], n_refined: int, n_total: int) -> tuple[list[int], list[int]]:
    """Top 24 bits of the score, ties by index."""
    bits = torch.tensor(scores).view(torch.int32) >> 7
    best = sorted(range(len(scores)), key=lambda i: (-int(bits[i]), i))
    refined = set(best[:n_refined])
    chosen = sorted(best[:n_total])
    return chosen, [REFINED if i in refined else DOWN_ONLY for i in chosen]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 1.0, 1.0 + 2 ** -20, 1.5, 7e-39, 3e38, 0.125]) | st.floats(0, 100, width=32),
                min_size=1, max_size=60), st.data())
def test_select_equals_sorting(scores, data):
    n_total = data.draw(st.integers(0, len(scores)))
    n_refined = data.draw(st.integers(0, n_total))
    capacity = data.draw(st.integers(n_total, len(scores)))
    neurons, fidelity = select(torch.tensor([scores, scores[::-1]]), torch.tensor([n_refined]), n_total, capacity)
    for row, kinds, wanted in zip(neurons.tolist(), fidelity.tolist(), (scores, scores[::-1]), strict=True):
        chosen, expected = by_sorting(wanted, n_refined, n_total)
        assert row == chosen + [-1] * (capacity - n_total) and kinds[:n_total] == expected


def test_select_above_keeps_what_is_above():
    scores, threshold = torch.tensor([[1., 5., 2., 2., 9.]]), torch.tensor([[1., 4., 1., 2., 0.]])
    assert select_above(scores, threshold)[0].tolist() == [[1, 2, 4]]
    assert select_above(scores, threshold)[1].tolist() == [[FLOE] * 3]
    assert select_above(scores.expand(2, 5), threshold.expand(2, 5), 2)[0].tolist() == [[1, 2], [1, 2]]
    assert select_above(scores, threshold, 5)[0].tolist() == [[1, 2, 4, -1, -1]]


# --- apply ---------------------------------------------------------------------------------------------------------

def row_at(matrix: Nested, n: int, fine: bool, layout: Layout) -> torch.Tensor:
    if fine:
        return values(matrix.codes, matrix.fine, layout.group)[n]
    return values(matrix.codes >> 2, matrix.coarse, layout.group)[n]


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda layout: str(layout.hidden))
@pytest.mark.parametrize("biased", [False, True])
def test_apply_is_the_masked_dense_product(layout, biased):
    experts = [random_expert(layout, seeded(i)) for i in range(3)]
    blobs = torch.stack([blob_of(*expert, layout) for expert in experts])
    place = torch.tensor([[2, 0]], dtype=torch.int32)
    x = torch.randn(1, layout.hidden, generator=seeded(5))
    bias = random_bias((1, 2), layout.neurons, seeded(6), biased)
    gate = Gate("clamped_swiglu") if biased else Gate()
    chosen = torch.tensor([[0, 2, layout.neurons, layout.neurons + 1, -1]], dtype=torch.int32)
    fidelity = torch.tensor([[REFINED, DOWN_ONLY, FLOE, REFINED, 0]], dtype=torch.int8)
    records = blobs[:, layout.sketch_bytes:].reshape(-1, layout.record)
    where = torch.tensor([[int(place[0, i // layout.neurons]) * layout.neurons + i % layout.neurons if i >= 0 else -1
                           for i in chosen[0].tolist()]], dtype=torch.int32)
    found = apply(x, blobs, place, records, where, chosen, fidelity, layout, gate, bias)
    expected = torch.zeros(2, layout.padded)
    for index, kind in zip(chosen[0].tolist(), fidelity[0].tolist(), strict=True):
        if index < 0:
            continue
        e, n = index // layout.neurons, index % layout.neurons
        gates, ups, downs = experts[int(place[0, e])]
        g = row_at(gates, n, kind != DOWN_ONLY, layout)[:layout.hidden] @ x[0]
        u = row_at(ups, n, kind == REFINED, layout)[:layout.hidden] @ x[0]
        if biased:
            g, u = (product + table[bias.ids[0, e], n] for product, table in zip((g, u), bias[:2], strict=True))
        expected[e] += gate(g, u) * values(downs.codes, downs.fine, layout.group)[n]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_dense_is_apply_of_every_neuron():
    layout = LAYOUTS[1]
    blobs = random_blobs(3, layout, seeded(4))
    place = torch.tensor([[1, 2], [0, 1]], dtype=torch.int32)
    x = torch.randn(2, layout.padded, generator=seeded(5))
    every = torch.arange(2 * layout.neurons, dtype=torch.int32).expand(2, -1)
    where = torch.stack([(row[:, None] * layout.neurons + torch.arange(layout.neurons)).flatten()
                         for row in place]).int()
    records = blobs[:, layout.sketch_bytes:].reshape(-1, layout.record)
    expected = apply(x, blobs, place, records, where, every, torch.full_like(every, REFINED, dtype=torch.int8), layout,
                     Gate())
    torch.testing.assert_close(dense(x, blobs, place, layout, Gate()), expected, rtol=1e-5, atol=1e-6)


# --- the cache protocol --------------------------------------------------------------------------------------------

N_EXPERTS, N_EACH, PREFIX, WHOLE = 3, 6, 16, 48
N_OBJECTS, N_BOUNCE = N_EXPERTS * N_EACH, 4 * 6


class Protocol(RuleBasedStateMachine):
    """Demand, fetches ahead and ageing in any order, each an atomic step; T tokens may want the same object.

    What is fetched ahead has its place at once and its bytes later: whenever the branch beside the main stream gets to
    it, at the latest when the next demand, fetch ahead or token joins it.
    """

    @initialize(n_slots=st.integers(0, N_OBJECTS + 2), seed=st.integers(0, 99))
    def start(self, n_slots, seed):
        self.far = torch.randint(0, 256, (N_EXPERTS, N_EACH, WHOLE), dtype=torch.uint8, generator=seeded(seed))
        self.near = torch.zeros(n_slots + N_BOUNCE, WHOLE, dtype=torch.uint8)
        self.pool = new_pool(N_OBJECTS, n_slots)
        self.clock = 0
        self.used: set[int] = set()                                # objects in slots that this token asked for
        self.unasked: set[int] = set()                             # fetched ahead, not asked for since
        self.pinned: set[int] = set()
        self.branch, self.pending = None, set()                    # a fill that has not run; slots that it writes

    @rule()
    def branch_ends(self):
        if self.branch is not None:
            others = [slot for slot in range(len(self.near)) if slot not in self.pending]
            before = self.near[others]
            self.branch()
            assert torch.equal(self.near[others], before)
        self.branch, self.pending = None, set()

    def fetched(self, rows, ahead):
        width = max(len(row) for row in rows)
        objects = torch.full((len(rows), width), -1, dtype=torch.int32)
        need = torch.zeros(len(rows), width, dtype=torch.int32)
        for i, row in enumerate(rows):
            for j, (item, n_bytes) in enumerate(sorted(row.items())):
                objects[i, j], need[i, j] = item, n_bytes
        misses = torch.zeros(1 + objects.numel(), dtype=torch.int32)
        self.branch_ends()
        before = {int(item) for item in self.pool.object_of if item >= 0}
        place, have = take(self.pool, objects, need, self.clock, ahead, misses)
        missing = (have < need) & (place >= 0)
        assert misses[1:1 + int(misses[0])].tolist() == missing.flatten().nonzero()[:, 0].tolist()
        self.branch = partial(fill, self.far, objects, self.near, place, have, need, misses)
        self.pending = set(place[missing].tolist())
        if not ahead:
            self.branch_ends()
        return objects, need, place, before

    @rule(rows=st.lists(st.dictionaries(st.integers(0, N_OBJECTS - 1), st.sampled_from([PREFIX, WHOLE]), min_size=1,
                                        max_size=6), min_size=1, max_size=4))
    def demand(self, rows):
        objects, need, place, _ = self.fetched(rows, ahead=False)
        n_slots = len(self.pool.object_of)
        bounced = place[place >= n_slots].tolist()
        assert len(bounced) == len(set(bounced))
        for item, n_bytes, to in zip(objects.flatten().tolist(), need.flatten().tolist(), place.flatten().tolist(),
                                     strict=True):
            if item < 0:
                assert to == -1
                continue
            assert to >= 0
            original = self.far[item // N_EACH, item % N_EACH]
            assert torch.equal(self.near[to, :n_bytes], original[:n_bytes])    # what is read is what was stored
            if to < n_slots:
                self.used.add(item)
                self.unasked.discard(item)

    @rule(row=st.dictionaries(st.integers(0, N_OBJECTS - 1), st.sampled_from([PREFIX, WHOLE]), min_size=1, max_size=6))
    def fetch_ahead(self, row):
        objects, _, place, before = self.fetched([row], ahead=True)
        for item, to in zip(objects[0].tolist(), place[0].tolist(), strict=True):
            assert to < len(self.pool.object_of)                   # never the bounce area
            if to >= 0 and item not in before:
                self.unasked.add(item)

    @rule(reserve=st.integers(0, N_OBJECTS))
    def next_token(self, reserve):
        self.branch_ends()
        before = {int(item) for item in self.pool.object_of if item >= 0}
        stamps = {int(o): int(s) for o, s in zip(self.pool.object_of, self.pool.stamp, strict=True) if o >= 0}
        n_free = int(self.pool.n_free)
        n_evicted, n_wasted = age(self.pool, self.clock, reserve).tolist()
        gone = before - {int(item) for item in self.pool.object_of if item >= 0}
        assert len(gone) == n_evicted and not gone & (self.used | self.pinned)
        assert len(gone & self.unasked) == n_wasted
        assert int(self.pool.n_free) == n_free + n_evicted and (not gone or n_free + n_evicted <= reserve)
        stayed = [stamps[item] for item in before - gone]  # the latest possible for a pinned one
        assert not gone or max(stamps[item] for item in gone) <= min(stayed, default=1 << 30)
        self.unasked -= gone
        self.used.clear()
        self.clock += 1

    @rule(objects=st.sets(st.integers(0, N_OBJECTS - 1), max_size=8))
    def pin(self, objects):
        """Only between tokens: here, before anything of this one is asked for."""
        if self.used:
            return
        pin(self.pool, torch.tensor(sorted(objects), dtype=torch.int64), self.clock)
        self.pinned = {item for item in objects if int(self.pool.slot_of[item]) >= 0}

    @invariant()
    def pins_are_what_was_pinned_last(self):
        if not hasattr(self, "pool"):
            return
        assert {int(self.pool.object_of[slot]) for slot in (self.pool.stamp == PINNED).nonzero()[:, 0]
                if int(self.pool.object_of[slot]) >= 0} == self.pinned

    @invariant()
    def every_object_has_one_slot_and_every_slot_one_object(self):
        if not hasattr(self, "pool"):
            return
        slot_of, object_of = self.pool.slot_of.tolist(), self.pool.object_of.tolist()
        for item, slot in enumerate(slot_of):
            assert slot == -1 or object_of[slot] == item
        for slot, item in enumerate(object_of):
            assert item == -1 or slot_of[item] == slot
        free = self.pool.free[:int(self.pool.n_free)].tolist()
        assert sorted(free) == [slot for slot, item in enumerate(object_of) if item == -1]
        assert all(slot_of[item] >= 0 for item in self.used)       # nothing used in this token left in it

    @invariant()
    def what_is_held_is_there(self):
        if not hasattr(self, "pool"):
            return
        for slot, item in enumerate(self.pool.object_of.tolist()):
            if item >= 0 and slot not in self.pending:
                n_bytes = int(self.pool.held[slot])
                assert torch.equal(self.near[slot, :n_bytes], self.far[item // N_EACH, item % N_EACH, :n_bytes])


Protocol.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)
TestProtocol = Protocol.TestCase
