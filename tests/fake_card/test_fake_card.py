"""Every model of the catalogue on a card that is not there: what a step asks, crosses and launches, what prefill takes.

What it cannot see: numbers, times, whether a kernel compiles (tests/kernels/test_compile.py), what a library allocates
by itself. One forward of a real card is worth more; until there is one, this is the whole device path.
"""
from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig

from engine.bench import synthetic
from engine.experts.policy_hook import PolicyHook
from engine.experts.side_stream import SideStream
from engine.files.skeleton import build_skeleton, experts_modules, model_spec
from engine.library import catalogue
from engine.model.static_cache import NotCapturable
from engine.planning.cost_model import LAYER_NODES, OTHER_LAYER_NODES, SPARSE_NODES, WHOLE_NODES
from engine.policies.choice import parse
from engine.policies.route import Weights
from kernels.layout import Layout
from tests.fake_card.card import Waits, fake_card
from tests.fake_card.model import CARD, LAYERS, nowhere, opened, prefill

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(),
    reason="needs a PyTorch with CUDA on a computer without a card (tests/fake_card/card.py says how to get one)")]
# Kernels of a decoder layer at `fast`; the plan takes as many or more.
COUNTED = {"qwen3_5_moe": 11, "qwen3_next": 11, "qwen3_moe": 10, "gpt_oss": 10, "mixtral": 10, "gemma4": 12,
           "glm4_moe_lite": 14, "glm4_moe": 11, "olmoe": 10, "deepseek_v2": 14, "laguna": 85, "mellum": 69}
ROOMY = 2       # fewer where all sketches stay near: looking them up, looking ahead
NODES = 1.0     # by which a count may differ
NOT_TORCHS = ("driver context and kernels", "graph pool")   # parts of the plan that no tensor takes
STEPWISE = ("zaya1-8b",)            # has layers without a cache of fixed shape
models = pytest.mark.parametrize("name", [name for name in catalogue.entries() if name not in STEPWISE])


def nodes_of(name: str, level: str, layers: int, is_roomy: bool = False, policies: str = "") -> int:
    """Of one decode step, the second: the first makes the cache."""
    shape = synthetic.shape_named(name, layers)
    model = nowhere(shape)
    with fake_card() as watch, torch.no_grad():
        on = opened(shape, model, level, is_roomy)
        if policies:
            on.runtime.hook = _hook(on, policies)
        on.step.start(5, frozenset(), 9)
        for _ in range(2):
            watch.nodes.clear()
            watch.crossings.clear()
            on.step.compute()
        n_nodes = sum(watch.nodes.values())
        on.step.choose()
        assert not watch.crossings, "a step copies between the host and the card"
        assert watch.nodes["_take"] >= layers * (level == "exact") and "_products" in watch.nodes
    return n_nodes


@models
@pytest.mark.parametrize("level", ["fast", "exact"])
def test_a_step_waits_for_nothing_and_has_so_many_nodes(name, level):
    """FakeTensors raise where a number is asked for, streams and events where they are waited for."""
    counted = (nodes_of(name, level, 2 * LAYERS) - nodes_of(name, level, LAYERS)) / LAYERS
    kind = synthetic.shape_named(name, LAYERS).spec.model_type
    if level == "fast":
        assert abs(counted - COUNTED[kind]) <= NODES, f"{kind}: {counted:.1f} nodes a layer"
        planned = LAYER_NODES.get(kind, OTHER_LAYER_NODES) + SPARSE_NODES
        assert planned >= COUNTED[kind] and (kind not in LAYER_NODES or planned - COUNTED[kind] <= NODES)
    else:
        assert counted < COUNTED[kind], "whole experts take fewer"


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen3.6-35b-a3b", "gpt-oss-20b"])
def test_sketches_that_all_stay_near_are_neither_looked_up_nor_fetched(name):
    less, more = (nodes_of(name, "fast", n * LAYERS, is_roomy=True) for n in (1, 2))
    counted = (more - less) / LAYERS
    kind = synthetic.shape_named(name, LAYERS).spec.model_type
    assert abs(counted - COUNTED[kind] + ROOMY) <= NODES, f"{kind}: {counted:.1f} nodes a layer"


def _hook(on, policies: str) -> PolicyHook:
    """How a router weighs is told from numbers, which nothing has here; where the clock stands is one as well."""
    with unset_fake_temporarily():
        logits = torch.randn(4, 8)
        weights, ids = logits.softmax(-1).topk(2)
        weigh = Weights(logits, ids, weights / weights.sum(1, keepdim=True))
    with mock.patch.object(torch.Tensor, "__int__", lambda tensor: 0):
        hook = PolicyHook(on.runtime, on.model, parse(policies))
    hook._weigh[:] = [weigh] * len(hook._weigh)
    return hook


@pytest.mark.parametrize("level, policies", [
    ("fast", "predict=next:2,evict=hobbit,admit=third"), ("fast", "predict=repeat,free=layer,evict=lfu"),
    ("fast", "route=near:0.2:1,fidelity=score:0.4:0.8"), ("fast", "predict=popularity,route=skip:0.5,fidelity=bits:2"),
    ("exact", "predict=profile,evict=popularity,route=drop:0.3"), ("exact", "route=near-only")])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b"])
def test_policies_in_a_step_cross_nothing_and_wait_for_nothing(name, level, policies):
    """What they take is theirs: without them a layer's nodes are those counted above."""
    assert nodes_of(name, level, LAYERS, policies=policies) > nodes_of(name, level, LAYERS)


@models
def test_prefill_takes_what_is_planned(name):
    shape = synthetic.shape_named(name, LAYERS)
    model = nowhere(shape)
    with fake_card() as watch, torch.no_grad():
        on = opened(shape, model, "fast")
        prefill(on)
    parts = dict(on.plan.memory)
    planned = on.plan.vram_bytes - sum(parts[part] for part in NOT_TORCHS)
    said = f"{watch.peak / 1e6:.0f} MB at the peak of a chunk of {on.plan.chunk}, {planned / 1e6:.0f} planned"
    assert watch.peak <= planned, f"{said}: {parts}"


@pytest.mark.parametrize("name", STEPWISE)
def test_what_cannot_be_recorded_says_so(name):
    shape = synthetic.shape_named(name, LAYERS)
    model = nowhere(shape)
    with fake_card(), torch.no_grad(), pytest.raises(NotCapturable, match="runs step by step"):
        opened(shape, model, "fast")


def test_the_watch_sees_what_it_watches():
    with fake_card() as watch, torch.no_grad():
        a = torch.empty(1 << 20, device=CARD)
        held = watch.bytes
        b = a + 1
        assert held == 4 << 20 and watch.bytes == 2 * held and watch.nodes == {"aten.add.Tensor": 1}
        del b
        assert (watch.bytes, watch.peak) == (held, 2 * held)
        a.view(2, -1)[0].copy_(torch.zeros(1 << 19))
        assert [name for name, _ in watch.crossings] == ["aten.copy_.default"]
        for waits in (torch.cuda.synchronize, torch.cuda.current_stream().synchronize, torch.cuda.Event().synchronize):
            with pytest.raises(Waits):
                waits()
        with pytest.raises(RuntimeError):
            a[0].item()
        with pytest.raises(RuntimeError):
            a.nonzero()
        with pytest.raises(RuntimeError):
            a + torch.zeros(1 << 20)


def shortcut_of(layers: int) -> synthetic.Shape:
    """LongCat-Flash, small: the catalogue has none, people do not run 560 billion weights."""
    config = AutoConfig.for_model(
        "longcat_flash", vocab_size=8192, hidden_size=1024, num_layers=layers, num_attention_heads=16,
        max_position_embeddings=8192, ffn_hidden_size=2048, expert_ffn_hidden_size=512, n_routed_experts=32,
        zero_expert_num=16, moe_topk=6, q_lora_rank=256, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128)
    skeleton = build_skeleton(config, "longcat")
    modules = experts_modules(skeleton, "longcat")
    spec = model_spec("longcat", skeleton, modules)
    layout = Layout(spec.hidden, spec.neurons, 128)
    return synthetic.Shape("longcat", "LongCat", config, skeleton, modules, spec, layout)


def step_of_shortcut(layers: int, level: str) -> tuple[int, list[int]]:
    """Nodes of a step, and of each fetch how many of them came between its launch beside the step and its join."""
    shape = shortcut_of(layers)
    model, beside, begun = nowhere(shape), [], []
    run, join = SideStream.run, SideStream.join
    with fake_card() as watch, torch.no_grad():
        def launched(self, *given) -> None:
            run(self, *given)
            begun.append(sum(watch.nodes.values()))

        def joined(self) -> None:
            if self._held:
                beside.append(sum(watch.nodes.values()) - begun[-1])
            join(self)
        on = opened(shape, model, level)
        on.step.start(5, frozenset(), 9)
        with mock.patch.multiple(SideStream, run=launched, join=joined):
            for _ in range(2):
                watch.nodes.clear()
                watch.crossings.clear()
                beside.clear()
                on.step.compute()
        assert not watch.crossings, "a step copies between the host and the card"
        return sum(watch.nodes.values()), list(beside)


@pytest.mark.parametrize("level", ["exact", "fast"])
def test_a_shortcuts_fetch_is_a_branch_beside_its_block(level):
    (less, _), (more, beside) = (step_of_shortcut(layers, level) for layers in (2, 4))
    planned = LAYER_NODES["longcat_flash"] + (SPARSE_NODES if level == "fast" else WHOLE_NODES)
    assert abs((more - less) / 2 - planned) <= (NODES if level == "fast" else 20)
    late = [n_nodes for n_nodes in beside if n_nodes > 50]  # a dense part, an attention, a dense part
    assert len(late) == 4 and len(beside) == (8 if level == "fast" else 4)
