"""The device's own step of the experts, with the Triton kernels in place of their references: run by
tests/engine/experts/test_device.py in a process whose Triton interprets.

The kernels themselves are compared elsewhere; here it is what the step hands them: dtypes, strides, padding, empty
places, tables changed in place.
"""
from __future__ import annotations

from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch

from engine.core import Options
from engine.experts import device, window
from engine.experts import runtime as experts_runtime
from engine.experts.layer import LevelPlan
from engine.model import load
from kernels.gpu import apply as gpu_apply
from kernels.gpu import fill as gpu_fill
from kernels.gpu import score as gpu_score
from tests.engine.experts.on_device import take_over
from tests.support.folders import compressed

OF = {"age": "evict", "apply": "apply", "dense": "apply", "fill": "fill", "quantize": "activation",
      "score": "score", "score_up": "score", "select": "select", "select_above": "select", "resolve_experts": "pool",
      "resolve_neurons": "pool",
      "look_ahead": "fetch", "choose_neurons": "fetch"}
LEVELS = ("exact", "fast", "floe")


QUICK = [("qwen3_moe", "fast", 1), ("gpt_oss", "exact", 2)]
SLOW = [case for case in product(("qwen3_moe", "gpt_oss"), LEVELS, (1, 3)) if case not in QUICK]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter's time goes by operations, not by their width."""
    monkeypatch.setattr(gpu_score, "ROWS", 64)
    monkeypatch.setattr(gpu_apply, "PRODUCT_ROWS", 128)
    monkeypatch.setattr(gpu_apply, "DOWN_ROWS", 128)
    monkeypatch.setattr(gpu_fill, "WARPS", 2)


def run(folder, level: str, tokens: int, far=None, device: str = "cpu") -> tuple[list, list[int], list]:
    """Outputs, counters and tables of a few steps through all layers, near memory for about half. far: locked, for a
    card."""
    loaded = load.load(folder, Options("exact", device="cpu"))
    far, plans = far or loaded.runtime.far, loaded.runtime.plans
    wanted = {"fast": LevelPlan(((9, 14),) * far.layers), "floe": LevelPlan((), ((0.4,) * far.experts,) * far.layers)}
    plans.update({name: plan for name, plan in wanted.items() if name == level})
    loaded.model.to(device)
    runtime = take_over(loaded, far, device, tokens)
    runtime.set_level(level)
    runtime.set_level(level, (2 * runtime.smallest_bytes() + runtime.everything_bytes()) // 3)
    runtime.phase = "decode"
    draw, out = torch.Generator().manual_seed(1), []
    for _ in range(3):
        x = torch.randn(tokens, far.hidden, generator=draw)
        for layer in runtime.layers:
            ids = torch.stack([torch.randperm(far.experts, generator=draw)[:runtime.top_k] for _ in range(tokens)])
            weights = torch.rand(tokens, runtime.top_k, generator=draw)
            out.append(runtime.forward(layer, x.to(device), ids.to(device), weights.to(device)).cpu())
    pools = [pool._asdict() for pool, _ in runtime.near.pools()]
    tables = [table.cpu() for pool in pools for name, table in pool.items() if name != "free"]
    return out, runtime.counts.tolist(), tables


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: compressed(name, tmp_path_factory.mktemp(name))[2] for name in ("qwen3_moe", "gpt_oss")}


@pytest.mark.parametrize("name, level, tokens", QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
@torch.no_grad()
def test_the_step_is_the_same_with_the_kernels_of_the_card(name, level, tokens, folders, monkeypatch):
    expected = run(folders[name], level, tokens)
    for kernel, module in OF.items():
        for user in (window, experts_runtime, device):
            if hasattr(user, kernel):
                monkeypatch.setattr(user, kernel, getattr(import_module(f"kernels.gpu.{module}"), kernel))
    found = run(folders[name], level, tokens)
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert found[1] == expected[1] and found[1][2] > 0
    assert all(map(torch.equal, found[2], expected[2]))
