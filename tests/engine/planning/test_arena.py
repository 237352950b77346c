"""What the plan says lies near is what the engine's caches make of the planned bytes, for every model."""
from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bench.synthetic import SHARES
from engine.experts.device import DeviceRuntime
from engine.experts.host import HostRuntime
from engine.experts.layer import LevelPlan
from engine.experts.runtime import Runtime
from engine.library import catalogue
from engine.machine import table
from engine.planning.arena import ArenaSizes
from engine.planning.cost_model import LAYER_NODES, SPARSE_NODES, WHOLE_NODES
from engine.planning.explain import plan_text
from engine.planning.plan import PlanRequest
from engine.planning.planner import plan
from kernels.layout import Layout, default_group_size

SPECS = {name: entry.spec for name, entry in catalogue.entries().items()}
RAM = {"ram_free_bytes": 10**12, "ram_total_bytes": 10**12}
MACHINES = {
    "12 GB": replace(table.described("rtx-3060-12gb"), pinned_limit_bytes=10**12, **RAM),
    "24 GB": replace(table.described("rtx-3060-12gb"), pinned_limit_bytes=10**12, vram_free_bytes=24 * 10**9, **RAM),
    "12 GB, 16 GiB locked": replace(table.described("rtx-3060-12gb"), pinned_limit_bytes=16 << 30, **RAM),
    "processor": replace(table.described("cpu-ddr4"), ram_free_bytes=24 * 10**9, ram_total_bytes=32 * 10**9)}


GIB = 2**30
CARD_12 = table.described("rtx-3060-12gb")


def test_a_32_gb_windows_machine_records_its_step():
    """16 GiB may be locked, the experts are 18.1 GB: three layers stay on the card, and cost room for the others."""
    spec, locked = SPECS["qwen3.6-35b-a3b"], replace(CARD_12, pinned_limit_bytes=16 * GIB)
    for level in ("exact", "fast"):
        wishes = PlanRequest(level=level)
        whole, most = plan(spec, CARD_12, wishes), plan(spec, locked, wishes)
        assert most.pinned_bytes == 37 * 256 * 1_769_472 <= 16 * GIB and most.pageable_layers == 0
        assert most.far_bytes_per_token > whole.far_bytes_per_token
        assert most.decode_tokens_per_second > 0.8 * whole.decode_tokens_per_second
        assert "1.4 GB of experts stay on the card for good" in plan_text(most)
        # Where they do not fit, the host fetches, no step is recorded, and every kernel is launched by itself.
        small = plan(spec, locked, replace(wishes, near_bytes=1_300_000_000))
        assert small.pageable_layers == 3 and "the processor fetches from them" in plan_text(small)
        nodes = LAYER_NODES["qwen3_5_moe"] + {"exact": WHOLE_NODES, "fast": SPARSE_NODES}[level]
        assert dict(small.token)["launches"] == pytest.approx(40 * nodes * 12e-6 + 3 * 0.4e-3)


def test_a_prompt_is_read_in_pieces_that_attention_has_room_for():
    """gpt-oss has all its scores in memory, three times: 64 heads, 16 bits, and a mask of 3 bytes."""
    spec = SPECS["gpt-oss-20b"]
    assert spec.prefill == ((2 * (2880 + 3 * 64 * 64), 64 * 64 * 4, 3 + 64 * 3 * 2),)
    chunks = {context: plan(spec, CARD_12, PlanRequest(context=context)).chunk
              for context in (1024, 2048, 8192, 32768, 131072)}
    assert chunks == {1024: 1024, 2048: 1024, 8192: 256, 32768: 64, 131072: 16}
    assert all(context * chunk * 387 <= 2**30 for context, chunk in chunks.items())
    made = plan(spec, CARD_12, PlanRequest(chunk=2048))        # whoever wishes it is told what it takes
    assert dict(made.memory)["prefill workspace"] > 6.4e9 and made.vram_bytes <= CARD_12.vram_free_bytes
    assert plan(SPECS["qwen3.6-35b-a3b"], CARD_12).chunk == 2048
    assert plan(spec, table.described("cpu-ddr4")).chunk == 128


class OnPaper:
    """Far memory of which only the sizes are asked."""

    def __init__(self, spec, layout: Layout, readable_layers: int) -> None:
        self.layers, self.experts, self.neurons, self.hidden = spec.layers, spec.experts, spec.neurons, spec.hidden
        self.layout, self.expert_bytes, self.readable_layers = layout, layout.blob_bytes, readable_layers


def runtime_of(spec, layout: Layout, level: str, machine, calibration: dict, near_bytes: int) -> Runtime:
    """A runtime as far as its near memory goes; the arena is on the meta device and takes nothing."""
    side = DeviceRuntime if machine.device == "cuda" else HostRuntime
    locked = spec.layers
    if machine.device == "cuda":
        locked = min(spec.layers, machine.pinned_limit_bytes // (spec.experts * layout.blob_bytes))
    runtime = side.__new__(side)
    runtime.far, runtime.top_k, runtime.tokens, runtime.level = OnPaper(spec, layout, locked), spec.top_k, 1, level
    runtime.plans = {name: LevelPlan(tuple(map(tuple, found["budgets"])))
                     for name, found in calibration["levels"].items()}
    runtime.near_wish, runtime.device, runtime._kinds = near_bytes, "meta", {}
    runtime.n_arenas, runtime.arena_bytes, runtime._arena = 0, -1, None
    return runtime


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", SPECS)
def test_plan_and_engine_divide_the_same_bytes_alike(name, machine):
    spec, machine = SPECS[name], MACHINES[machine]
    layout = Layout(spec.hidden, spec.neurons, default_group_size(spec.hidden))
    n, seen = spec.top_k * spec.neurons, 0
    calibration = {"levels": {level: {"budgets": [[int(refined * n), int(rest * n) + layer]
                                                  for layer in range(spec.layers)]}
                              for level, (refined, rest) in SHARES.items()}}
    for level in ("exact", *SHARES):
        made = plan(spec, machine, PlanRequest(level=level, on_disk=True), calibration)
        if made.verdict == "no" or (machine.device == "cpu" and made.hit_rate == 1):  # the map of the file, no arena
            continue
        runtime = runtime_of(spec, layout, level, machine, calibration, made.near_bytes)
        cache = runtime._new_cache()
        slots = [len(pool.object_of) for pool, _ in cache.pools()]
        assert cache.near_bytes == made.near_bytes
        if level == "exact":
            assert slots == [made.near.expert_slots] and cache.blobs.numel() == made.near.expert_bytes
        else:
            assert slots == [made.near.sketch_slots, made.near.record_slots]
            assert (cache.sketches.numel(), cache.records.numel()) == (made.near.sketch_bytes, made.near.record_bytes)
        runtime.near = cache
        assert made.pageable_layers == runtime._unread_layers - cache.kept // spec.experts
        assert runtime.asks_the_host == bool(made.pageable_layers)
        seen += 1
    if not seen:
        pytest.skip("this model does not fit that machine, or fits whole")


SIZES = st.builds(lambda n, row, bounce, neurons, record, most, kept: ArenaSizes(
    n, 16 * row, min(bounce, n), neurons, 16 * record if neurons else 0, min(most, n * neurons), min(kept, n)),
    st.integers(1, 60), st.integers(1, 40), st.integers(1, 8), st.integers(0, 9), st.integers(1, 9),
    st.integers(0, 40), st.integers(0, 60))


@settings(max_examples=400, deadline=None)
@given(SIZES, st.integers(0, 40_000))
def test_a_split_keeps_within_its_bytes_and_has_room_for_a_step(sizes, spare):
    near_bytes = sizes.least_bytes + spare
    split = sizes.divided(near_bytes)
    n, n_records = sizes.n_experts, sizes.n_experts * sizes.neurons
    assert sizes.bytes_of(split) <= near_bytes
    assert split.slots == split.rows == n or split.slots == split.rows - sizes.bounce >= split.kept
    assert split.kept in (0, sizes.kept) and (split.kept == sizes.kept) == (near_bytes >= sizes.keeping_bytes
                                                                           or not sizes.kept)
    if sizes.neurons:
        assert split.record_rows == split.record_slots + sizes.bounce_records
        assert split.kept * sizes.neurons <= split.record_slots <= n_records
    more = sizes.divided(near_bytes + 16)
    assert sizes.bytes_of(more) >= sizes.bytes_of(split) - sizes.row_bytes - sizes.record_bytes


def test_what_stays_near_is_kept_as_soon_as_it_fits():
    sizes = ArenaSizes(10, 100, 2, 4, 10, 6, kept=3)
    assert sizes.least_bytes == 260 and sizes.keeping_bytes == 260 + 3 * 140
    assert sizes.divided(679).kept == 0 and sizes.divided(680).kept == 3
    split = sizes.divided(680)
    assert (split.rows, split.slots, split.record_slots, split.record_rows) == (5, 3, 12, 18)
    assert sizes.sizes_worth_trying(2000) == [2000, 679, 1059, 1179]
