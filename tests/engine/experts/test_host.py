"""The runtime behind the experts: results never depend on what is near, bytes are counted as they move, limits hold."""
from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import engine.experts.runtime
from engine.core import Options, Sampling, UserError
from engine.decode.decoder import HostDecoder
from engine.experts.layer import LevelPlan
from engine.experts.runtime import Runtime
from engine.files.manifest import experts_name
from engine.machine import detect
from engine.model import load
from kernels.fill import fill
from tests.support.folders import compressed

L, E, K, N, HIDDEN = 3, 8, 2, 48, 64
PROMPT = torch.randint(3, 128, (1, 10), generator=torch.Generator().manual_seed(2))
N_TOKENS = 10
PLANS = {
    "balanced": LevelPlan(((20, 30), (0, 25), (48, 0))),
    "fast": LevelPlan(((5, 10), (8, 0), (3, 20))),
    "floe": LevelPlan((), tuple(tuple(0.2 + 0.05 * e for e in range(E)) for _ in range(L))),
}
SPARSE = tuple(PLANS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return compressed("qwen3_moe", tmp_path_factory.mktemp("experts"), num_hidden_layers=L)[2]


@pytest.fixture
def loaded(folder):
    """A freshly opened model whose sparse levels have budgets."""
    opened = load.load(folder, Options("exact", device="cpu"))
    opened.runtime.plans.update(PLANS)
    return opened


def answer(loaded) -> list[int]:
    """Greedy tokens, the cache warming up as it goes."""
    out, state, found = loaded.model(PROMPT, use_cache=True), None, []
    for _ in range(N_TOKENS):
        state, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(int(token))
        out = loaded.model(token, past_key_values=state, use_cache=True)
    return found


def smallest(runtime: Runtime, level: str) -> int:
    runtime.set_level(level)
    return runtime.smallest_bytes()


@pytest.mark.parametrize("level", ["exact", "balanced"])
def test_the_activity_is_the_share_of_tokens_that_chose_an_expert(loaded, level, monkeypatch):
    """Without fading it counts: every decode token chooses K experts of each layer, prefill does not count."""
    monkeypatch.setattr(loaded.runtime.busy, "_kept", torch.ones(2, 1))
    loaded.runtime.set_level(level)
    before = loaded.runtime.picks[1].clone()
    assert sum(map(sum, loaded.runtime.activity())) == 0
    chosen = torch.zeros(L, E)
    forward = loaded.runtime.forward

    def noted(layer, x, ids, weights):
        if len(x) == 1:
            chosen[layer.index, ids[0]] += 1
        return forward(layer, x, ids, weights)
    monkeypatch.setattr(loaded.runtime, "forward", noted)
    answer(loaded)
    assert torch.tensor(loaded.runtime.activity()) == pytest.approx(chosen / N_TOKENS, abs=1e-3)
    *counts, tokens = (loaded.runtime.picks[1] - before).tolist()
    assert tokens == N_TOKENS and counts == chosen.flatten().tolist()


def held_bytes(runtime: Runtime) -> int:
    """Of the arena, by the storage behind what the kernels read; of the file's map everything."""
    rows = [runtime.near.rows(layer, records) for layer in range(L) for records in (False, True)]
    storages = [tensor.untyped_storage() for tensor in rows]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("level", ["exact", *SPARSE])
@torch.no_grad()
def test_the_answer_does_not_depend_on_near_memory_nor_on_prediction(level, loaded):
    runtime = loaded.runtime
    least = smallest(runtime, level)
    everything = runtime.everything_bytes()
    answers, far = {}, {}
    for near in (everything, (everything + least) // 2, (everything + 7 * least) // 8, least):
        for predict in (False, True):
            runtime.predict = predict
            runtime.set_level(level, near)
            before = runtime.counters()
            answers[near, predict] = answer(loaded)
            used = runtime.counters() - before
            far[near, predict] = used.far_bytes
            assert held_bytes(runtime) == (near if runtime.is_mapped else runtime.arena_bytes) <= near
            assert runtime.near_bytes <= near and runtime.is_mapped == (near == everything)
            assert runtime.near_used_bytes() <= runtime.near_bytes and max(runtime.residency()) <= 1
            assert used.needed_bytes == used.hit_bytes + used.far_bytes and used.dropped_weight == 0
            assert used.wasted_bytes <= used.speculative_bytes
            assert predict or runtime.is_mapped or not used.speculative_bytes
    assert len(set(map(tuple, answers.values()))) == 1 and len(set(answers[least, True])) > 2
    fewest, *_, most = by_near = [far[near, False] for near in sorted({near for near, _ in far}, reverse=True)]
    assert by_near == sorted(by_near) and fewest < most


@pytest.mark.parametrize("level", ["exact", "balanced"])
@torch.inference_mode()
def test_a_step_has_the_same_bits_however_it_is_computed(level, loaded, monkeypatch):
    """In one call where everything is in place, in many where it is not; on one thread and on two, every product cut
    into pieces, however small."""
    threads = pytest.importorskip("kernels.cpu.threads")
    monkeypatch.setattr(threads, "GRAIN", 1)
    runtime, before, rows, needed = loaded.runtime, torch.get_num_threads(), [], set()
    least, greedy = smallest(runtime, level), Sampling(0.0, 0, 1.0, 0.0, 1.0)
    try:
        for near in (runtime.everything_bytes(), (runtime.everything_bytes() + least) // 2, least):
            runtime.set_level(level, near)
            for n in (1, 2):
                torch.set_num_threads(n)
                decoder, counted = HostDecoder(loaded.model), runtime.counters()
                drawn = list(decoder.tokens(PROMPT[0].tolist(), greedy, None, frozenset(), N_TOKENS))
                rows.append(torch.stack([one.logits for one in drawn]))
                needed.add((runtime.counters() - counted).needed_bytes)
                assert decoder.prefix.fused.in_one_call(decoder.prefix._cache) == runtime.is_mapped
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(rows[0], other) for other in rows[1:]) and len(needed) == 1
    assert len(set(rows[0].argmax(1).tolist())) > 2


@torch.inference_mode()
def test_what_is_fetched_ahead_comes_beside_the_step_as_the_engine_runs_it(loaded, monkeypatch):
    """In inference mode, by another thread; a disk that fails ahead of demand stops the answer."""
    runtime, threads = loaded.runtime, set()

    def noting(*given):
        threads.add(threading.current_thread())
        fill(*given)
    monkeypatch.setattr(engine.experts.runtime, "fill", noting)
    runtime.set_level("exact", runtime.everything_bytes() // 2)
    before = runtime.counters()
    answer(loaded)
    assert (runtime.counters() - before).speculative_bytes > 0 and len(threads) == 2

    def failing(*given):
        if threading.current_thread() is not threading.main_thread():
            raise OSError("Input/output error")
        fill(*given)
    monkeypatch.setattr(engine.experts.runtime, "fill", failing)
    runtime.reset()
    with pytest.raises(OSError, match="Input/output"):
        answer(loaded)


@torch.no_grad()
def test_where_everything_is_near_nothing_is_copied_and_each_expert_is_read_once(loaded, monkeypatch):
    """The map of the file is near memory, for every level: what one level has read the next one finds."""
    runtime, read, moved = loaded.runtime, [], []
    verify = runtime.far.verify
    monkeypatch.setattr(runtime.far, "verify", lambda *expert: (read.append(expert), verify(*expert))[1])
    monkeypatch.setattr(engine.experts.runtime, "fill", lambda *given: moved.append(given))
    blob, tokens = runtime.far.layout.blob_bytes, {}
    start, prefill = runtime.counters(), runtime.prefill_far_bytes
    for level in ("exact", *SPARSE):
        runtime.set_level(level)
        assert runtime.near_bytes == L * E * blob == runtime.everything_bytes()
        assert runtime.near.rows(0, False).data_ptr() == runtime.far.blobs(0).data_ptr()
        tokens[level] = answer(loaded)
    used = runtime.counters() - start
    assert len(read) == len(set(read)) > 0 and not moved
    assert len(read) * blob == used.far_bytes + used.speculative_bytes + runtime.prefill_far_bytes - prefill
    assert runtime.near_used_bytes() == len(read) * blob and used.wasted_bytes == 0
    assert used.needed_bytes == used.hit_bytes + used.far_bytes > 0
    held = {layer: {expert for which, expert in read if which == layer} for layer in range(L)}
    assert runtime.residency() == [len(held[layer]) / E for layer in range(L)]


@torch.no_grad()
def test_a_damaged_expert_is_noticed_at_its_first_use_wherever_it_is_computed(folder, tmp_path):
    x, weights = torch.randn(1, HIDDEN), torch.tensor([[0.7, 0.3]])
    for share, phase in ((1.0, "decode"), (1.0, "prefill"), (0.5, "decode"), (0.5, "prefill")):
        made = Path(shutil.copytree(folder, tmp_path / f"{share} {phase}"))
        runtime = load.load(made, Options("exact", device="cpu")).runtime
        with (made / experts_name(1)).open("r+b") as file:  # an open model's file, on a disk that forgets
            file.seek(-100, 2)  # in the last expert
            byte = file.read(1)[0]
            file.seek(-100, 2)
            file.write(bytes([byte ^ 1]))
        runtime.set_level("exact", int(share * runtime.everything_bytes()))
        runtime.phase = phase
        for _ in range(2):  # it does not count as near
            with pytest.raises(UserError, match="damaged .expert 7 does not match its checksum"):
                runtime.forward(runtime.layers[1], x, torch.tensor([[2, 7]]), weights)
        runtime.forward(runtime.layers[1], x, torch.tensor([[2, 3]]), weights)


@torch.no_grad()
def test_far_bytes_of_exact_are_misses_times_the_blob(loaded, monkeypatch):
    runtime, filled = loaded.runtime, []

    def counting(far, source, near, place, have, need, misses=None):
        filled.append(int(((have < need) & (place >= 0)).sum()))
        fill(far, source, near, place, have, need, misses)
    monkeypatch.setattr(engine.experts.runtime, "fill", counting)
    blob = runtime.far.layout.blob_bytes
    for predict in (False, True):
        runtime.predict = predict
        runtime.set_level(runtime.level, runtime.everything_bytes() // 2)
        start = runtime.counters()
        filled.clear()
        answer(loaded)
        used = runtime.counters() - start
        assert used.needed_bytes == N_TOKENS * L * K * blob
        assert sum(filled) * blob == used.far_bytes + used.speculative_bytes
        assert used.far_bytes % blob == used.wasted_bytes % blob == 0 and (used.speculative_bytes > 0) == predict


@pytest.mark.parametrize("level", SPARSE)
@pytest.mark.parametrize("share", [0.9, 0.3, 0.0])
@torch.no_grad()
def test_far_bytes_of_sparse_levels_are_the_bytes_that_fill_moved(level, share, loaded, monkeypatch):
    runtime = loaded.runtime
    least = smallest(runtime, level)
    moved = [0]

    def counting(far, source, near, place, have, need, misses=None):
        before = near.clone()
        fill(far, source, near, place, have, need, misses)
        rows = (place >= 0) & (have < need)
        for where, low, high in zip(place[rows].tolist(), have[rows].tolist(), need[rows].tolist(), strict=True):
            before[where, low:high] = near[where, low:high]
            moved[0] += high - low
        assert torch.equal(before, near), "bytes moved that were not counted"

    runtime.set_level(level, int(least + share * (runtime.everything_bytes() - least)))
    monkeypatch.setattr(engine.experts.runtime, "fill", counting)
    start = runtime.counters()
    answer(loaded)
    used = runtime.counters() - start
    assert moved[0] == used.far_bytes + used.speculative_bytes
    layout, needed = runtime.far.layout, N_TOKENS * L * K * runtime.far.layout.sketch_bytes
    if level != "floe":
        budgets = PLANS[level].budgets
        needed += N_TOKENS * sum(r * layout.record + d * layout.prefix for r, d in budgets)
        assert used.needed_bytes == needed
    assert used.needed_bytes > needed or level != "floe"


@pytest.mark.parametrize("level", ["exact", *SPARSE])
def test_a_byte_too_few_is_a_sentence_and_changes_nothing(level, loaded):
    runtime = loaded.runtime
    least = smallest(runtime, level)
    runtime.set_level(level, least)
    half = runtime.everything_bytes() // 2
    runtime.set_level("exact", half)
    cache, near = runtime.near, runtime.near_bytes
    with pytest.raises(UserError, match=f"give at least {least:,}") as caught:
        runtime.set_level(level, least - 1)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert (runtime.level, runtime.near_bytes, runtime.near_wish) == ("exact", near, half)
    assert runtime.near is cache


def test_no_near_memory_at_all_is_refused_not_taken_for_the_default(folder):
    with pytest.raises(UserError, match="0 bytes of near memory"):
        load.load(folder, Options("exact", near_bytes=0, device="cpu"))


@torch.no_grad()
def test_levels_change_between_answers(loaded):
    runtime = loaded.runtime
    alone = {}
    for level in ("exact", *SPARSE):
        runtime.set_level(level)
        alone[level] = answer(loaded)
    assert len(set(map(tuple, alone.values()))) > 2  # the levels do differ here
    for level in ("fast", "exact", "floe", "balanced", "exact", "fast"):
        runtime.set_level(level, runtime.near_wish)
        assert runtime.level == level and answer(loaded) == alone[level]
    before = runtime.counters()
    runtime.reset()
    assert runtime.counters() == before and answer(loaded) == alone["fast"]


def test_a_level_that_is_not_calibrated(folder):
    said = []
    opened = load.load(folder, Options("balanced", device="cpu"), lambda text, share: said.append((text, share)))
    assert opened.runtime.level == "exact" and opened.runtime.levels == ("exact",)
    assert any("Not calibrated for balanced" in text for text, _ in said)
    assert [share for _, share in said] == sorted(share for _, share in said) and said[-1][1] == load.LOADED
    for level, way in (("balanced", ".*calibrate it"), ("floe", ".*calibrate it"), ("full", "")):
        with pytest.raises(UserError, match=f"cannot run at level {level}: it offers exact{way}") as caught:
            opened.runtime.set_level(level)
        assert str(caught.value).endswith(".") and opened.runtime.level == "exact"


@pytest.mark.parametrize("packed_speed, level", [(1e12, "exact"), (1e5, "fast")])
def test_without_a_wish_the_level_is_the_plans_choice(packed_speed, level, repository, monkeypatch):
    """The best level that is quick enough on a quick machine, the quickest one on a slow machine."""
    machine = detect.machine
    monkeypatch.setattr(detect, "machine", lambda *given: replace(machine(*given), packed_bytes_per_second=packed_speed,
                                                                  operation_seconds=1e-6))
    opened = load.load(repository / "assets" / "demo", Options(device="cpu"))
    assert opened.runtime.level == opened.planner.plan(None).level == level


@torch.no_grad()
def test_half_precision_inputs_come_back_in_their_type(loaded):
    runtime, layer = loaded.runtime, loaded.runtime.layers[1]
    x, ids = torch.randn(1, HIDDEN), torch.tensor([[3, 5]])
    weights = torch.tensor([[0.7, 0.3]])
    expected = runtime.forward(layer, x, ids, weights)
    found = runtime.forward(layer, x.bfloat16(), ids, weights.bfloat16())
    assert found.dtype == torch.bfloat16 and (found.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("n", [5, 300])
@torch.no_grad()
def test_decode_and_prefill_give_the_same_at_whole_levels(n, loaded):
    """Few tokens of an expert, and so many that more than one call computes them."""
    runtime, layer = loaded.runtime, loaded.runtime.layers[0]
    x = torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[0, 1], [1, 2], [7, 0], [3, 4], [4, 3]]).repeat(n // 5, 1)
    weights = torch.rand(n, K, generator=torch.Generator().manual_seed(4))
    runtime.phase = "prefill"
    dense = runtime.forward(layer, x, ids, weights)
    runtime.phase = "decode"
    assert torch.allclose(runtime.forward(layer, x, ids, weights), dense, rtol=1e-3, atol=1e-3)
