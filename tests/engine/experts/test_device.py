"""The experts' step of a device against the host's path, its oracle: the same tokens, the same bytes, step by step."""
from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from engine.core import Options, UserError
from engine.experts.device import DeviceRuntime, NoDevicePath
from engine.experts.layer import LayerExperts, LevelPlan, recognised
from engine.experts.prefill import Staging
from engine.experts.runtime import Runtime
from engine.experts.working_set import pin
from engine.model import load
from engine.model.registration import FloeExperts
from kernels.activation import Gate
from kernels.pool import PINNED
from tests.engine.experts.on_device import take_over
from tests.engine.experts.test_host import N_TOKENS, PLANS, PROMPT, E, K, L, N
from tests.kernels.test_interpreted import run_cases
from tests.support.folders import checkpoint, compressed

LEVELS = ("exact", *PLANS)


def answer(loaded) -> list[int]:
    """Greedy tokens; the prompt one by one as well, because only the host's prefill leaves experts near."""
    loaded.runtime.phase = "decode"
    state, found, prompt = None, [], PROMPT[0].tolist()
    for i in range(len(prompt) + N_TOKENS):
        token = prompt[i] if i < len(prompt) else found[-1]
        out = loaded.model(torch.tensor([[token]]), past_key_values=state, use_cache=True)
        state = out.past_key_values
        found.append(int(out.logits[0, -1].argmax()))
    return found[len(prompt) - 1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return compressed("qwen3_moe", tmp_path_factory.mktemp("device"), num_hidden_layers=L)[2]


def opened(folder: Path, level: str, share: float, predict: bool, on_device: bool, tokens: int = 1):
    """A model whose near memory has as many slots on either path. share: of all objects that are near."""
    loaded = load.load(folder, Options("exact", device="cpu"))
    runtime = loaded.runtime
    runtime.plans.update({level: PLANS[level]} if level in PLANS else PLANS)  # the levels of a device share near memory
    runtime.predict = predict
    n_slots = int(share * L * E)
    if on_device:
        runtime = take_over(loaded, tokens=tokens)
    runtime.tokens = tokens
    if level == "exact":
        rows = L * E if share == 1 else n_slots + K * runtime.tokens
        near_bytes = rows * runtime.far.layout.blob_bytes
    else:
        runtime.set_level(level)
        least = runtime.smallest_bytes()
        near_bytes = least + int(share * (Runtime.everything_bytes(runtime) - least))  # the same bytes on either side
    runtime.set_level(level, near_bytes)
    return loaded


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("share, predict", [(1.0, True), (0.4, True), (0.4, False), (0.0, False)])
@torch.no_grad()
def test_tokens_and_bytes_are_those_of_the_host(level, share, predict, folder):
    share = max(share, 0.1) if level == "exact" else share
    found = {}
    for on_device in (False, True):
        loaded = opened(folder, level, share, predict, on_device)
        start = loaded.runtime.counters()
        tokens = answer(loaded)
        used = loaded.runtime.counters() - start
        found[on_device] = tokens, used, loaded.runtime.residency(), loaded.runtime.near_used_bytes() > 0
    assert isinstance(loaded.runtime, DeviceRuntime) and used.needed_bytes > 0
    if share == 1:  # the host computes from the file's map, and reads whole experts
        assert found[True][0] == found[False][0] and used.needed_bytes == found[False][1].needed_bytes
    else:
        assert found[True] == found[False]


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_several_tokens_at_once(level, folder):
    """Equal one by one, but for what they choose together (test_window.py), which is the same on either side."""
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1], [1, 2], [7, 0], [3, 4]])
    weights = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4]])
    out = {}
    for on_device in (False, True):
        together = on_device or level in ("balanced", "fast")
        runtime = opened(folder, level, 0.3, False, on_device, tokens=4 if together else 1).runtime
        runtime.phase = "decode"
        out[on_device] = [runtime.forward(layer, rows, ids, weights) for layer in runtime.layers]
        assert runtime.counters().needed_bytes > 0
    # Compiled for the processor, an activation has 16 bits; whole experts that are decoded to float32 take all of it.
    torch.testing.assert_close(out[True], out[False], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma4_text", "glm4_moe", "mixtral"])
@torch.no_grad()
def test_other_experts(name, tmp_path):
    made, found = compressed(name, tmp_path)[2], {}
    for on_device in (False, True):
        loaded = load.load(made, Options("exact", device="cpu"))
        runtime = loaded.runtime
        runtime.plans["fast"] = LevelPlan(((20, 30),) * runtime.far.layers)
        if on_device:
            runtime = take_over(loaded)
        for level in ("exact", "fast"):
            runtime.set_level(level)
            before = runtime.counters()
            found[on_device, level] = answer(loaded), (runtime.counters() - before).needed_bytes
    assert found[True, "exact"] == found[False, "exact"] and found[True, "fast"] == found[False, "fast"]


@torch.no_grad()
def test_prefill_in_16_bits_takes_what_a_fused_step_hands_over(folder):
    runtime, found = opened(folder, "exact", 1.0, False, True).runtime, []
    x, ids, weights = torch.randn(3, 64), torch.tensor([[0, 1], [1, 2], [7, 0]]), torch.full((3, 2), 0.5)
    runtime.phase = "prefill"
    for dtype in (torch.float32, torch.bfloat16):
        runtime.staging = Staging(runtime.far.layout, runtime.far.experts, "cpu", dtype)
        found.append(runtime.forward(runtime.layers[0], x, ids, weights))
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0, atol=3e-2 * float(found[0].abs().max()))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4_text"])
@pytest.mark.parametrize("per_tile", [1, 3, 100])
@torch.no_grad()
def test_prefill_through_tiles(name, per_tile, tmp_path):
    """The host's outputs; what is near is not fetched again, and prefill leaves near memory as it was."""
    made, found = compressed(name, tmp_path)[2], []
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    loaded = load.load(made, Options("exact", device="cpu"))
    far, top_k = loaded.runtime.far, loaded.runtime.top_k
    ids = torch.stack([torch.randperm(far.experts - 1)[:top_k] for _ in range(40)])  # one that nobody wants
    weights = torch.rand(40, top_k)
    for on_device in (False, True):
        if on_device:
            runtime = take_over(loaded)
            runtime.staging = Staging(far.layout, far.experts, "cpu", per_tile=min(per_tile, far.experts))
        runtime = loaded.model.floe
        runtime.predict = False
        runtime.set_level("exact", runtime.everything_bytes())
        runtime.phase = "prefill"
        found.append([runtime.forward(layer, x, ids, weights) for layer in runtime.layers])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    used = len(ids.unique())
    assert runtime.prefill_far_bytes == used * far.layers * far.expert_bytes and not sum(runtime.residency())
    runtime.phase = "decode"
    for layer in runtime.layers:
        runtime.forward(layer, x[:1], ids[:1], weights[:1])
    before, tables, runtime.phase = runtime.prefill_far_bytes, runtime.near.pool.slot_of.clone(), "prefill"
    again = [runtime.forward(layer, x, ids, weights) for layer in runtime.layers]
    torch.testing.assert_close(again, found[0], rtol=1e-3, atol=1e-3)
    near = len(set(ids[0].tolist()))
    assert runtime.prefill_far_bytes - before == (used - near) * far.layers * far.expert_bytes
    assert torch.equal(runtime.near.pool.slot_of, tables)


@torch.no_grad()
def test_sketches_that_are_near_are_not_read_again(folder):
    """At a sparse level prefill takes them from near memory; only records cross the link."""
    loaded = opened(folder, "fast", 0.5, False, True)
    runtime, x = loaded.runtime, torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    assert runtime.near.resident
    ids, weights = torch.tensor([[0, 1], [5, 2]]).repeat(20, 1), torch.rand(40, K)
    found = []
    for level in ("fast", "exact"):
        runtime.set_level(level, runtime.near_wish)
        runtime.phase, before = "prefill", runtime.prefill_far_bytes
        found.append(torch.stack([runtime.forward(layer, x, ids, weights) for layer in runtime.layers]))
        each = runtime.far.expert_bytes - (runtime.far.layout.sketch_bytes if level == "fast" else 0)
        assert runtime.prefill_far_bytes - before == 4 * L * each
    assert torch.equal(*found)


@pytest.mark.parametrize("level", ["exact", "fast", "floe"])
@torch.no_grad()
def test_what_is_pinned_stays_near_on_either_path(level, folder):
    """The working set survives whole answers, changes no token, and lets go of what is pinned no more."""
    experts, neurons = [(0, 1), (2, 7)], [] if level == "exact" else [(0, 3, 5), (1, 2, 40), (1, 2, 41)]
    found = []
    for on_device in (False, True):
        loaded = opened(folder, level, 0.4, False, on_device)
        runtime, plain = loaded.runtime, answer(opened(folder, level, 0.4, False, on_device))
        before = runtime.counters()
        pin(runtime, experts, neurons)
        fetched = (runtime.counters() - before).speculative_bytes
        assert answer(loaded) == plain
        pools = [pool for pool, _ in runtime.near.pools()]
        wanted = [[layer * E + expert for layer, expert in experts],
                  [(layer * E + expert) * N + neuron for layer, expert, neuron in neurons]]
        for pool, objects in zip(pools, wanted, strict=False):
            assert all(int(pool.slot_of[item]) >= 0 and int(pool.stamp[pool.slot_of[item]]) == PINNED
                       for item in objects)
        pin(runtime, experts, neurons)  # nothing to do
        assert (runtime.counters() - before).speculative_bytes == fetched > 0
        pin(runtime)
        assert answer(loaded) == plain and not any(bool((pool.stamp == PINNED).any()) for pool in pools)
        with pytest.raises(UserError, match="pin less"):
            pin(runtime, [(layer, expert) for layer in range(L) for expert in range(E)],
                        [(0, expert, neuron) for expert in range(E) for neuron in range(N)] if neurons else [])
        found.append(fetched)
    assert found[0] == found[1]


@torch.no_grad()
def test_activity_fades_as_on_the_host(folder):
    shown = []
    for on_device in (False, True):
        loaded = opened(folder, "fast", 0.5, False, on_device)
        answer(loaded)
        shown.append(torch.tensor(loaded.runtime.activity()))
    assert shown[0].shape == (L, E) and shown[0].max() > 0
    torch.testing.assert_close(shown[1], shown[0], rtol=0, atol=2e-3)


@torch.no_grad()
def test_a_finished_answer_counts_nothing_and_bytes_ahead_are_capped(folder):
    loaded = opened(folder, "exact", 0.5, True, True)
    runtime = loaded.runtime
    answer(loaded)
    assert runtime.counters().speculative_bytes > 0
    runtime.ahead_bytes.fill_(0)
    before = runtime.counters()
    answer(loaded)
    assert (runtime.counters() - before).speculative_bytes == 0
    runtime.done.fill_(True)
    before = runtime.counters()
    answer(loaded)
    assert runtime.counters() == before


@torch.no_grad()
def test_levels_change_in_the_same_tensors(folder):
    """All calibrated levels run in one near memory, told apart by values; each as it would alone."""
    loaded, alone = opened(folder, "exact", 0.5, False, True), {}
    runtime = loaded.runtime
    for level in LEVELS:
        alone[level] = answer(opened(folder, level, 0.5, False, True))
    assert len(set(map(tuple, alone.values()))) > 2
    near_bytes = 3 * runtime.everything_bytes() // 4
    kept: dict[str, list[int]] = {}
    for level in ("fast", "exact", "balanced", "floe", "exact", "fast"):
        runtime.set_level(level, near_bytes)
        assert answer(loaded) == alone[level] and runtime.near_bytes <= near_bytes
        places = [table.data_ptr() for pool in runtime.near.pools() for table in pool[0]] + [runtime._arena.data_ptr()]
        assert kept.setdefault(runtime.kind, places) == places
    assert set(kept) == {"dense", "sparse", "floe"}
    before = runtime.near
    with pytest.raises(UserError, match="give at least"):
        runtime.set_level("fast", 10)
    assert runtime.near is before and runtime.near_wish == near_bytes and answer(loaded) == alone["fast"]


@torch.no_grad()
def test_a_card_that_is_full_lets_go_back_to_what_was(folder, monkeypatch):
    loaded = opened(folder, "exact", 0.5, False, True)
    runtime, empty = loaded.runtime, torch.empty
    level, near_bytes, first = runtime.level, runtime.near_wish, answer(loaded)

    def full(*sizes, **given):
        if sizes == (near_bytes + 1000,):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(*sizes, **given)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError):
        runtime.set_level("exact", near_bytes + 1000)
    runtime.set_level(level, near_bytes)
    assert answer(loaded) == first


def test_reset_keeps_the_tensors(folder):
    loaded = opened(folder, "balanced", 0.5, False, True)
    runtime = loaded.runtime
    with torch.no_grad():
        first = answer(loaded)
    before = [table.data_ptr() for pool in runtime.near.pools() for table in pool[0]]
    runtime.reset()
    assert before == [table.data_ptr() for pool in runtime.near.pools() for table in pool[0]]
    assert not sum(runtime.residency())
    with torch.no_grad():
        assert answer(loaded) == first


def test_gates_are_told_from_their_values():
    for gate in (Gate("silu"), Gate("gelu"), Gate("gelu_tanh"), Gate("relu"), Gate("clamped_swiglu")):
        for join in (lambda g, u: torch.cat((g, u), -1), lambda g, u: torch.stack((g, u), -1).flatten(-2)):
            joined = join(torch.zeros(1, 2), torch.ones(1, 2))
            interleaved = joined[0, 1] == 1

            def apply_gate(both, gate=gate, interleaved=interleaved):
                sides = (both[..., ::2], both[..., 1::2]) if interleaved else both.chunk(2, -1)
                return gate(*sides)
            assert recognised(apply_gate, join).kind == gate.kind
    assert recognised(lambda both: both[..., :2401].sin(), join) is None


def test_experts_without_a_device_path_say_so(folder, tmp_path, monkeypatch):
    checkpoint("qwen3_moe", tmp_path)
    plain = load.load(tmp_path, Options("full", device="cpu"))
    with pytest.raises(NoDevicePath, match="compress it first"):
        take_over(plain)
    loaded = opened(folder, "exact", 1.0, False, False)
    origin = next(module.origin for module in loaded.model.modules() if isinstance(module, FloeExperts))
    monkeypatch.setattr(origin, "_apply_gate", lambda both: both.chunk(2, -1)[0].sin())
    with pytest.raises(NoDevicePath, match="on the host"):
        take_over(loaded)
    assert loaded.model.floe is loaded.runtime


def test_the_step_runs_on_the_kernels_of_a_card(repository):
    pytest.importorskip("triton")
    run_cases(repository, "not slow", "step")


@pytest.mark.slow
def test_the_step_runs_on_the_kernels_of_a_card_at_every_level(repository):
    pytest.importorskip("triton")
    run_cases(repository, "slow", "step")


def test_near_memory_for_less_than_a_step_is_a_sentence(folder):
    runtime = opened(folder, "exact", 1.0, False, True).runtime
    with pytest.raises(UserError, match=f"give at least {K * runtime.far.layout.blob_bytes:,}"):
        runtime.set_level(runtime.level, K * runtime.far.layout.blob_bytes - 1)


def test_a_layer_goes_with_its_last_reader():
    """Not with the next collection, until when its router would stay on a card."""
    layer = LayerExperts(0, True, lambda gate_up: gate_up[..., ::2] * gate_up[..., 1::2], {},
                         router_weight=torch.zeros(4, 64))
    assert layer.gate(torch.tensor([2.0]), torch.tensor([3.0])).tolist() == [6.0]
    gone = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()
