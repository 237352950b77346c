"""What is made of a profile and of counted bytes, and of a token on another card: the arithmetic."""
from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.bench import rows, step_profile
from engine.bench.gpu_kernels import Speeds
from engine.bench.step_profile import Needs, gpu_named, projected
from engine.core import Options, UserError
from engine.experts.layer import LevelPlan
from engine.machine import table
from engine.model import load
from engine.model.host_embedding import leave_on_host
from kernels.select import DOWN_ONLY
from tests.engine.experts.on_device import take_over
from tests.engine.experts.test_far_locked import Ledger
from tests.support.folders import compressed

POSITIVE = st.floats(1.0, 1e12)
CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


@dataclass(frozen=True)
class Seen:
    """An event as torch.profiler tells it."""

    name: str
    device_type: object = CPU
    self_device_time_total: float = 0.0


def test_a_profile_is_summed_by_name_and_token():
    events = [Seen("_fill", CUDA, 8.0), Seen("gemv", CUDA, 30.0), Seen("_fill", CUDA, 2.0), Seen("aten::mm"),
              Seen("cudaStreamSynchronize"), Seen("cudaEventSynchronize"), Seen("_score", CUDA, 4.0)]
    profile = step_profile.summed(events, 2)
    assert profile.microseconds == {"gemv": 15.0, "_fill": 5.0, "_score": 2.0} and profile.calls["_fill"] == 1.0
    assert list(profile.microseconds) == ["gemv", "_fill", "_score"] and profile.waits == 0.5
    assert (profile.own(), profile.others()) == (7.0, 15.0)
    nodes, *kernels = profile.rows({"model": "m"}, 5)
    assert nodes["nodes_per_token"] == 2.0 and nodes["own_us_per_layer"] == 1.4 and nodes["other_us_per_layer"] == 3.0
    assert [row["us_per_layer"] for row in kernels] == [3.0, 1.0, 0.4] and kernels[0]["model"] == "m"
    assert rows.text(kernels[0]) == ("measured kernel  model m  name gemv  us_per_layer 3  us_per_token 15  "
                                "calls_per_token 0.5")


def test_the_kernels_that_count_as_ours_are_all_that_are_launched(repository):
    sources = [path.read_text(encoding="utf-8") for path in (repository / "kernels" / "gpu").rglob("*.py")]
    assert {name for text in sources for name in re.findall(r"^ +(_\w+)\[", text, re.MULTILINE)} == step_profile.OURS


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    loaded = load.load(compressed("qwen3_moe", tmp_path_factory.mktemp("token"))[2], Options("exact", device="cpu"))
    layers, experts = loaded.runtime.far.layers, loaded.runtime.far.experts
    loaded.runtime.plans.update({"fast": LevelPlan(((9, 14),) * layers),
                                 "floe": LevelPlan((), ((0.4,) * experts,) * layers)})
    take_over(loaded)
    return loaded


@pytest.mark.parametrize("level", ["exact", "fast", "floe"])
@torch.no_grad()
def test_bytes_of_the_experts_are_those_of_the_rows_that_kernels_read(level, opened):
    """Counted again from what a step chose, layer by layer."""
    runtime, rows, n_bytes = opened.runtime, [], 0
    runtime.set_level(level)
    runtime.phase, layout, choose = "decode", runtime.far.layout, runtime._choose
    runtime._choose = lambda *given: rows.append(choose(*given)) or rows[-1]
    before = runtime.counters()
    state = opened.model(torch.tensor([[5]]), use_cache=True).past_key_values
    opened.model(torch.tensor([[7]]), past_key_values=state)
    del runtime._choose
    for neurons, fidelity, _ in rows:
        there = neurons >= 0
        n, n_short = int(there.sum()), int((there & (fidelity == DOWN_ONLY)).sum())
        n_bytes += n * layout.sketch_row + (n - n_short) * layout.record + n_short * layout.prefix
    whole = layout.sketch_bytes if rows else layout.blob_bytes
    n_bytes += 2 * runtime.far.layers * runtime.top_k * whole
    used = runtime.counters() - before
    assert step_profile.expert_bytes(runtime, used, 2) * 2 == n_bytes
    assert bool(rows) == (level != "exact")


def test_bytes_of_the_trunk_are_its_weights_without_the_embedding(opened):
    model = opened.model
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.data_ptr() != head.data_ptr()
    assert step_profile.trunk_bytes(model) == every - embedding.numel() * embedding.element_size()
    untied = model.get_output_embeddings()
    model.set_output_embeddings(model.get_input_embeddings())  # tied: it is read whole, as the head
    assert step_profile.trunk_bytes(model) == every - head.numel() * head.element_size()
    model.set_output_embeddings(untied)
    memory = leave_on_host(model, Ledger())
    assert step_profile.trunk_bytes(model) == every - embedding.numel() * embedding.element_size()
    spec = opened.spec
    assert step_profile.vram_bytes(model, spec, 100, 7.0) - step_profile.vram_bytes(model, spec, 0, 0.0) == (
        100 * spec.kv_bytes_per_token + 7)
    memory.close()


def test_the_baseline_runs_in_the_same_near_memory_and_leaves_the_level(opened):
    runtime = opened.runtime
    runtime.set_level("fast", 3 * runtime.far.layers * runtime.top_k * runtime.far.layout.blob_bytes)
    before, seen = runtime.near_wish, []

    def measure():
        seen.append((runtime.level, runtime.near_wish))
        return {"ms_per_token": 1.0}
    near_bytes = runtime.near_bytes
    assert list(step_profile.whole_experts(runtime, measure)) == [{"measured": "whole experts", "ms_per_token": 1.0}]
    assert seen == [("exact", near_bytes)] and (runtime.level, runtime.near_wish) == ("fast", before)
    runtime.set_level("fast", runtime.smallest_bytes())
    row, = step_profile.whole_experts(runtime, measure)
    assert "give at least" in row["sentence"] and runtime.level == "fast" and len(seen) == 1
    runtime.set_level("exact")
    assert not list(step_profile.whole_experts(runtime, measure))


def test_bytes_go_over_the_other_cards_bandwidths_and_the_rest_stays():
    measured, other = Speeds(vram=400e9, link=20e9), table.described("rtx-3060-12gb")
    needs = Needs(vram_bytes=2e9, link_bytes=40e6, seconds=0.010)  # 5 ms + 2 ms as measured, so 3 ms are something else
    assert needs.outside_seconds(measured) == pytest.approx(0.003)
    row = projected(needs, measured, other)
    assert row["vram_ms"] == pytest.approx(2e9 / (0.88 * 360e9) * 1e3)
    assert row["link_ms"] == pytest.approx(40e6 / (16 * 1.575e9) * 1e3)
    assert row["outside_ms"] == pytest.approx(3)
    assert row["tokens_per_second"] == pytest.approx(1e3 / (row["vram_ms"] + row["link_ms"] + 3))
    assert row["bound_tokens_per_second"] == pytest.approx(1e3 / (row["vram_ms"] + row["link_ms"]))


@given(POSITIVE, POSITIVE, st.floats(1e-6, 1e3), POSITIVE, POSITIVE)
def test_onto_itself_a_card_is_what_was_measured(vram_bytes, link_bytes, seconds, vram, link):
    """Or its bound, where the bytes alone should have taken longer than was measured."""
    measured, needs = Speeds(vram, link), Needs(vram_bytes, link_bytes, seconds)
    itself = table.Machine("itself", 1, 1, 1, 1, vram_bytes_per_second=vram, link_bytes_per_second=link)
    expected = 1 / max(seconds, needs.memory_seconds(measured))
    assert projected(needs, measured, itself)["tokens_per_second"] == pytest.approx(expected)


def test_only_cards_that_could_run_it():
    assert gpu_named("rtx-4070-12gb").name == "GeForce RTX 4070"
    with pytest.raises(UserError, match="no card that runs this"):
        gpu_named("gtx-1080-ti-11gb")
    with pytest.raises(UserError, match="no card that runs this"):
        gpu_named("cpu-ddr4")
    with pytest.raises(UserError, match="choose one of"):
        gpu_named("voodoo")
