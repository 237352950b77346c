"""What only a card can show: kernels, page-locked memory and graphs, against what the CPU computes."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.chat.engine import Engine
from engine.core import Options, Sampling
from engine.decode.cuda_graph import Graphs
from engine.decode.decoder import DeviceDecoder
from engine.experts.device import DeviceRuntime
from engine.experts.layer import LevelPlan
from engine.experts.prefill import Staging
from engine.experts.store import FarLocked
from engine.files.manifest import Manifest
from engine.machine.pinned_memory import CudaDriver, HostMemory
from engine.machine.process_memory import return_freed
from engine.model import load
from engine.model.static_cache import StepCache
from kernels.fill import fill
from tests.engine.chat.test_engine import GREEDY, TALK, chat, finish, told
from tests.engine.experts.on_device import take_over
from tests.support.folders import compressed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CAPTURED = ["qwen3_moe", "qwen3_5_moe_text", "qwen3_next", "gpt_oss", "gemma4_text", "mixtral", "glm4_moe",
            "glm4_moe_lite", "deepseek_v2"]
N_TOKENS = 300


def locked(folder: Path) -> FarLocked:
    far = FarLocked(folder, Manifest.load(folder), CudaDriver())
    assert far.memory.reason == ""
    return far


def test_a_kernel_reads_page_locked_memory():
    memory = HostMemory(1000 * 2304, CudaDriver())
    memory.bytes.copy_(torch.arange(1000 * 2304) % 251)
    far, near = memory.bytes.view(1, 1000, 2304), torch.zeros(64, 2304, dtype=torch.uint8, device="cuda")
    source = torch.randperm(1000)[:64].int().cuda()
    place = torch.arange(64, dtype=torch.int32, device="cuda")
    fill(far, source, near, place, torch.zeros_like(place), torch.full_like(place, 2304))
    assert torch.equal(near.cpu(), far[0, source.long().cpu()])
    memory.close()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("level", ["exact", "fast", "floe"])
@pytest.mark.parametrize("tokens", [1, 4])
@torch.no_grad()
def test_the_experts_step_is_the_cpus(name, level, tokens, tmp_path):
    from tests.kernels.interpreted_step import run
    folder = compressed(name, tmp_path)[2]
    expected, found = run(folder, level, tokens), run(folder, level, tokens, locked(folder), "cuda")
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert found[1] == expected[1] and all(map(torch.equal, found[2], expected[2]))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4_text"])
@pytest.mark.parametrize("level", ["exact", "fast"])
@torch.inference_mode()
def test_prefill_is_the_cpus(name, level, tmp_path):
    """Tiles on a stream of their own, decoded by one kernel, torch's grouped product; tiles are reused."""
    folder, found = compressed(name, tmp_path)[2], []
    draw = torch.Generator().manual_seed(0)
    x, n = torch.randn(200, 64, generator=draw), 200
    for device in ("cpu", "cuda"):
        loaded = load.load(folder, Options("exact", device="cpu"))
        loaded.runtime.plans["fast"] = LevelPlan(((15, 20), (6, 30), (0, 12))[:loaded.runtime.far.layers])
        far = locked(folder) if device == "cuda" else loaded.runtime.far
        loaded.model.to(device)
        runtime = take_over(loaded, far, device)
        runtime.set_level(level, runtime.everything_bytes())
        runtime.staging = Staging(far.layout, far.experts, device, per_tile=2)
        runtime.phase, draw = "prefill", torch.Generator().manual_seed(1)
        ids = torch.stack([torch.randperm(far.experts, generator=draw)[:runtime.top_k] for _ in range(n)])
        weights = torch.rand(n, runtime.top_k, generator=draw)
        for _ in range(2):
            found.append([runtime.forward(layer, x.to(device), ids.to(device), weights.to(device)).cpu()
                          for layer in runtime.layers])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", CAPTURED)
@torch.inference_mode()
def test_a_captured_step_replays_past_every_window(name, tmp_path):
    folder = compressed(name, tmp_path, max_position_embeddings=512)[2]
    loaded = load.load(folder, Options("exact", device="cpu"))
    loaded.runtime.plans["fast"] = LevelPlan(((15, 20), (6, 30), (0, 12))[:loaded.runtime.far.layers])
    model = loaded.model.to("cuda")
    runtime = take_over(loaded, locked(folder), "cuda")
    decoder = DeviceDecoder(model, runtime, StepCache(model.config, N_TOKENS + 8, "cuda"), adapts=False)
    for level in ("exact", "fast"):
        runtime.set_level(level, (runtime.smallest_bytes() + runtime.everything_bytes()) // 2)
        graphs, answers = Graphs(decoder.step), []
        for decoder.graphs, headroom in ((None, True), (graphs, True), (graphs, False)):
            runtime.headroom = headroom  # a graph with the branch of look-ahead, and one without
            decoder.prefix.reset()
            runtime.reset()
            steps = decoder.tokens([1], Sampling(4.0, 60, 0.98, seed=3), None, frozenset(), N_TOKENS)
            answers.append([drawn.token for drawn in steps])
        assert decoder.reason == "" and answers[0] == answers[1] == answers[2] and len(set(answers[0])) > 10


def test_the_embedded_model_says_what_it_says_on_the_cpu(repository):
    texts = []
    for device in ("cpu", "cuda"):
        with Engine.open(repository / "assets" / "demo", Options("exact", device=device)) as engine:
            assert isinstance(engine._turns.runtime, DeviceRuntime) == (device == "cuda")
            texts.append(told(finish(engine.chat(TALK, GREEDY))[0]))
    assert texts[0] == texts[1]


def test_every_question_is_read_and_closing_gives_the_card_back(repository):
    """Behind the recorded step's answers, with a job beside the conversation between them; then the same once more."""
    left = []
    for _ in range(2):
        with Engine.open(repository / "assets" / "demo", Options("exact", device="cuda")) as engine:
            texts = ["What is your name?"]
            for question in ("And what do you like?", "Tell me more.", "Goodbye!"):
                said, end = finish(engine.chat(chat(*texts), replace(GREEDY, max_tokens=40)))
                finish(engine.side_chat(chat("Tell me about the sea."), GREEDY))
                prefix = engine._turns.prefix
                assert end.reason != "error" and int(prefix.cache.clock.pos) == len(prefix.ids)
                texts += [told(said), question]
        return_freed()
        left.append(torch.cuda.memory_reserved())
    assert left[1] <= left[0]
