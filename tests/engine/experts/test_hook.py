"""The one hook, on either side: told of every layer; what it returns is what runs; idle it changes nothing."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.core import Options
from engine.experts.hook import Hook
from engine.experts.layer import LayerExperts
from engine.experts.runtime import Runtime
from engine.model import load
from engine.quality.traces import Trace
from kernels.select import DOWN_ONLY
from tests.engine.experts.on_device import take_over
from tests.engine.experts.test_host import HIDDEN, PLANS, E, K, L, N
from tests.support.folders import compressed
from tests.support.recorded import asks_the_host, record

Tensor = torch.Tensor
X = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(7))
IDS = torch.tensor([[0, 1], [5, 2], [5, 0], [7, 3], [1, 7], [2, 6]])
WEIGHTS = torch.rand(6, K, generator=torch.Generator().manual_seed(8))
OTHER = (IDS + 1) % E


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return compressed("qwen3_moe", tmp_path_factory.mktemp("hook"), num_hidden_layers=L)[2]


@pytest.fixture(params=["host", "device"])
def runtime(request, folder) -> Runtime:
    loaded = load.load(folder, Options("exact", device="cpu", predict=False))
    loaded.runtime.plans.update(PLANS)
    return loaded.runtime if request.param == "host" else take_over(loaded)


def run(runtime: Runtime, level: str, ids: Tensor = IDS, hook: Hook | None = None) -> tuple[Tensor, int]:
    """Outputs of six steps and one prefill from an empty near memory, and the bytes that the steps needed."""
    runtime.set_level(level)
    before, out, runtime.hook = runtime.counters(), [], hook
    for runtime.phase, parts in (("decode", [slice(t, t + 1) for t in range(len(X))]), ("prefill", [slice(None)])):
        for at in parts:
            out += [runtime.forward(layer, X[at], ids[at], WEIGHTS[at]) for layer in runtime.layers]
    return torch.cat(out), (runtime.counters() - before).needed_bytes


class Watching(Hook):
    """Every call in order, and the records that were asked for as a trace."""

    def __init__(self) -> None:
        self.calls, self.trace, self.records = [], Trace(E * N), 0

    def routed(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(("routed", layer.index, len(x)))
        assert x.shape[1] == HIDDEN and ids.shape == weights.shape == (len(x), K)
        return ids, weights

    def selected(self, layer: LayerExperts, ids: Tensor, weights: Tensor, neurons: Tensor, fidelity: Tensor):
        self.calls.append(("selected", layer.index, len(ids)))
        assert neurons.dtype == torch.int32 and fidelity.dtype == torch.int8 and neurons.shape == fidelity.shape
        chosen = neurons[0][neurons[0] >= 0].long()
        assert bool((chosen.diff() > 0).all()) and int(chosen.max()) < K * N
        self.trace.add(layer.index, ids[0][chosen // N] * N + chosen % N, torch.ones_like(chosen))
        self.records += len(chosen)
        return neurons, fidelity


@pytest.mark.parametrize("level", ["exact", "fast", "floe"])
@torch.no_grad()
def test_a_hook_that_only_looks_sees_every_layer_and_changes_nothing(runtime, level):
    plain, watching = run(runtime, level), Watching()
    found = run(runtime, level, hook=watching)
    assert torch.equal(found[0], plain[0]) and found[1] == plain[1] > 0
    steps = [("routed", "selected") if level != "exact" else ("routed",)] * len(X)
    expected = [(name, layer, 1) for names in steps for layer in range(L) for name in names]
    assert watching.calls == expected + [("routed", layer, len(X)) for layer in range(L)]
    if level == "fast":
        kept = [len(items) for token in range(watching.trace.tokens) for items in (
            watching.trace.items[layer][token] for layer in range(L))]
        assert kept == [sum(pair) for pair in PLANS["fast"].budgets] * len(X)
    if level == "floe":  # whole records, beside the sketches
        layout = runtime.far.layout
        assert found[1] == len(X) * L * K * layout.sketch_bytes + watching.records * layout.record


@pytest.mark.parametrize("level", ["exact", "fast"])
@torch.no_grad()
def test_other_experts_than_the_routers(runtime, level):
    class Elsewhere(Hook):
        def routed(self, layer, x, ids, weights):
            return (ids + 1) % E, weights
    found, needed = run(runtime, level, hook=Elsewhere())
    expected, as_many = run(runtime, level, OTHER)
    assert torch.equal(found, expected) and needed == as_many and not torch.equal(found, run(runtime, level)[0])


@torch.no_grad()
def test_another_fidelity_fetches_other_bytes(runtime):
    class Coarse(Hook):
        def selected(self, layer, ids, weights, neurons, fidelity):
            return neurons, torch.full_like(fidelity, DOWN_ONLY)
    layout, n_kept = runtime.far.layout, sum(sum(pair) for pair in PLANS["fast"].budgets)
    found, needed = run(runtime, "fast", hook=Coarse())
    assert needed == len(X) * (L * K * layout.sketch_bytes + n_kept * layout.prefix)
    assert not torch.equal(found, run(runtime, "fast")[0])


@torch.no_grad()
def test_in_place_of_the_experts_nothing_moves(runtime):
    class Twice(Hook):
        def instead(self, layer, x, ids, weights):
            return 2 * x
    found, needed = run(runtime, "fast", hook=Twice())
    assert torch.equal(found, torch.cat([2 * X[t:t + 1] for t in range(6) for _ in range(L)] + [2 * X] * L))
    assert needed == 0 and runtime.prefill_far_bytes == 0


def test_the_hook_before_comes_back_however_the_block_ends(runtime):
    outer = runtime.hook = Hook()
    with pytest.raises(KeyboardInterrupt), runtime.hooked(Watching()):
        assert runtime.hook is not outer
        raise KeyboardInterrupt
    assert runtime.hook is outer


@torch.no_grad()
def test_a_recorded_step_holds_its_hook(folder):
    """The hook's own tensors are part of the recording: what it reads is read anew at every replay."""
    loaded = load.load(folder, Options("exact", device="cpu", predict=False))
    loaded.runtime.plans.update(PLANS)
    runtime, shift, out = take_over(loaded), torch.zeros((), dtype=torch.int64), torch.empty(L, 1, HIDDEN)
    runtime.set_level("fast")
    runtime.phase = "decode"

    class Shifted(Hook):
        def routed(self, layer, x, ids, weights):
            return (ids + shift) % E, weights

    def step() -> None:
        for layer in runtime.layers:
            out[layer.index] = runtime.forward(layer, X[:1], IDS[:1], WEIGHTS[:1])
    step()
    plain = out.clone()
    shift += 1
    with runtime.hooked(Shifted()):
        graph, names = record(step)
    shifted = out.clone()
    assert not asks_the_host(names) and not torch.equal(shifted, plain)
    for amount, expected in ((0, plain), (1, shifted)):
        shift.fill_(amount)
        graph()
        assert torch.equal(out, expected)
