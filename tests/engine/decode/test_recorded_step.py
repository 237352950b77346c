"""One decode step, recorded once, replayed for 200 tokens past every window, is the step run anew every time."""
from __future__ import annotations

from functools import partial

import pytest
import torch

from engine.core import Options, Sampling
from engine.decode.cuda_graph import Graphs
from engine.decode.device_sampling import DeviceSampler
from engine.decode.step import Step
from engine.experts.layer import LevelPlan
from engine.files import trunk
from engine.model import load
from engine.model.packed import Packed
from engine.model.static_cache import StepCache, forward
from engine.planning import cost_model
from tests.engine.experts.on_device import take_over
from tests.support.folders import compressed
from tests.support.recorded import Recording, asks_the_host, device_nodes, from_here, record

FUSED = ("qwen3_moe", "mixtral", "olmoe", "qwen3_5_moe_text", "qwen3_next", "gpt_oss", "glm4_moe", "glm4_moe_lite",
         "deepseek_v2", "deepseek_v3", "gemma4_text")
CAPTURED = ["qwen3_moe", "qwen3_5_moe_text", "qwen3_next", "gpt_oss", "gemma4_text", "mixtral", "glm4_moe",
            "glm4_moe_lite", "longcat_flash", "deepseek_v3", "afmoe"]
N_TOKENS, CONTEXT = 200, 224
PROMPT = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(6))
SAMPLING = Sampling(4.0, 60, 0.98, 0.001, 1.5, seed=3)  # the small models repeat themselves otherwise


def opened(folder, level: str) -> Step:
    """A step behind a prompt that has been read, with near memory for about half of everything."""
    loaded = load.load(folder, Options("exact", device="cpu"))
    plans = loaded.runtime.plans
    plans["fast"] = LevelPlan(((15, 20), (6, 30), (0, 12))[:loaded.runtime.far.layers])
    runtime = take_over(loaded)
    runtime.set_level(level)
    runtime.set_level(level, (runtime.smallest_bytes() + runtime.everything_bytes()) // 2)
    cache = StepCache(loaded.model.config, CONTEXT)
    runtime.phase = "prefill"
    forward(loaded.model, PROMPT[:, :-1], cache)
    step = Step(loaded.model, runtime, cache, DeviceSampler(128, CONTEXT))
    step.sampler.start(SAMPLING, None, PROMPT[0].tolist())
    step.start(int(PROMPT[0, -1]), frozenset(), N_TOKENS)
    return step


@pytest.mark.parametrize("name, trunk_bits", [*((name, 16) for name in CAPTURED), ("qwen3_5_moe_text", 4),
                                              ("gpt_oss", 4), ("olmoe", 4), ("deepseek_v2", 4),
                                              pytest.param("gemma4_text", 8, marks=pytest.mark.slow)])
@torch.no_grad()
def test_replay_equals_eager(name, trunk_bits, tmp_path, monkeypatch):
    monkeypatch.setattr(trunk, "SMALLEST", 1024)  # the matrices of these models are small
    folder = compressed(name, tmp_path, trunk_bits)[2]
    for level in ("exact", "fast"):
        step = opened(folder, level)
        start = step.save(PROMPT.shape[1] - 1)
        step.run()                                   # warm-up: what is made at first use must not be recorded
        graph, names = record(step.run)
        assert not asks_the_host(names) and len(names) > 50
        assert (trunk_bits < 16) == any(isinstance(p, Packed) for p in step.model.parameters())
        step.restore(start)
        graphs = Graphs(step, Recording())
        graphs.launch(PROMPT.shape[1] - 1)
        assert (step.fused is not None) == (name in FUSED)
        assert graphs.reason == ""                   # as a card's graph proves itself: at two positions
        eager, expected = from_here(step, start, step.run, N_TOKENS)
        replayed, found = from_here(step, start, graph, N_TOKENS)
        assert replayed == eager
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        tokens = [packet[0] for packet in eager]
        assert len(set(tokens)) > 10 and eager[-1][1] == 1 and not any(packet[1] for packet in eager[:-1])
        counts = torch.tensor([packet[3:] for packet in eager])
        assert bool((counts.diff(dim=0) >= 0).all()) and 0 < counts[-1, 2] < counts[-1, 0]


@pytest.mark.parametrize("level, is_roomy, expected", [
    ("exact", True, cost_model.WHOLE_NODES), ("fast", False, cost_model.SPARSE_NODES),
    ("fast", True, cost_model.SPARSE_NODES - 1)])
@torch.no_grad()
def test_a_layers_experts_are_the_nodes_that_the_plan_counts(level, is_roomy, expected, tmp_path):
    """One layer more of the step, without look-ahead and without age, which comes once a token. Sketches that all stay
    near are neither looked up nor filled."""
    folder = compressed("qwen3_moe", tmp_path, num_hidden_layers=3, hidden_size=256)[2]
    loaded = load.load(folder, Options("exact", device="cpu"))
    loaded.runtime.plans["fast"] = LevelPlan(((15, 20),) * 3)
    runtime = take_over(loaded)
    runtime.set_level(level)
    if not is_roomy:
        runtime.set_level(level, runtime.smallest_bytes())
    runtime.phase, runtime.headroom, counted = "decode", False, []
    x, ids, weights = torch.randn(1, 256).bfloat16(), torch.tensor([[0, 3]]), torch.rand(1, 2).bfloat16()
    for n in (1, 2):
        step = partial(_layers, runtime, runtime.layers[:n], x, ids, weights)
        step()
        counted.append(device_nodes(record(step)[0]))
    assert counted[1] - counted[0] == expected


def _layers(runtime, layers, *given) -> None:
    for layer in layers:
        runtime.forward(layer, *given)


@torch.no_grad()
def test_what_asks_the_host_is_found(tmp_path):
    """The host's own path cannot pass for a step: recording it fails, or shows where it asks."""
    table = torch.tensor([3.0, 1.0])

    def step() -> None:
        table.add_(table.nonzero().sum())
    assert asks_the_host(record(step)[1])
    assert asks_the_host(record(lambda: table.add_(table.new_tensor([1.0, 2.0])))[1])
    with pytest.raises(RuntimeError, match="value out of a tracing tensor|data-dependent"):
        record(lambda: table.add_((table + 1).max().item()))
