"""A norm behind every expert, before the router's weight (muse_spark has one): the host's path and the device's."""
from __future__ import annotations

import pytest
import torch

from engine.core import Options
from engine.experts.layer import LevelPlan
from engine.model import load
from tests.engine.experts.on_device import take_over
from tests.support.folders import compressed, stored_experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compressed("gpt_oss", tmp_path_factory.mktemp("norms"))[2]


def opened(folder, level: str, on_device: bool, norms: list[torch.nn.Module]):
    """gpt_oss, whose experts have biases and clamps, with a norm behind them."""
    loaded = load.load(folder, Options("exact", device="cpu"))
    loaded.runtime.plans["fast"] = LevelPlan(((20, 30),) * loaded.runtime.far.layers)
    runtime = take_over(loaded, loaded.runtime.far, "cpu", tokens=3) if on_device else loaded.runtime
    runtime.tokens = 3  # side by side, with one budget
    for layer, norm in zip(runtime.layers, norms, strict=True):
        layer.post_norm = norm
    runtime.set_level(level)
    return runtime


@pytest.mark.parametrize("level", ["exact", "fast"])
@torch.no_grad()
def test_a_norm_behind_every_expert(level, folder):
    draw = torch.Generator().manual_seed(0)
    norms = [torch.nn.RMSNorm(64) for _ in range(2)]
    for norm in norms:
        norm.weight.copy_(0.5 + torch.rand(64, generator=draw))
    x, weights = torch.randn(3, 64, generator=draw), torch.rand(3, 2, generator=draw)
    ids, out = torch.tensor([[0, 1], [3, 2], [1, 3]]), {}
    for on_device in (False, True):
        runtime = opened(folder, level, on_device, norms)
        runtime.phase = "decode"
        decode = [runtime.forward(layer, x, ids, weights) for layer in runtime.layers]
        runtime.phase = "prefill"
        out[on_device] = decode, [runtime.forward(layer, x, ids, weights) for layer in runtime.layers]
    torch.testing.assert_close(out[True], out[False], rtol=1e-3, atol=1e-3)     # 16-bit activations against float32
    for index, layer in enumerate(runtime.layers):
        gate, up, down = stored_experts(folder, index)
        expected = torch.zeros_like(x)
        for t in range(3):
            for expert, weight in zip(ids[t].tolist(), weights[t], strict=True):
                g = gate[expert] @ x[t] + layer.biases["gate_bias"][expert]
                u = up[expert] @ x[t] + layer.biases["up_bias"][expert]
                y = layer.gate(g, u) @ down[expert] + layer.biases["down_bias"][expert]
                expected[t] += weight * norms[index](y)
        torch.testing.assert_close(out[True][1][index], expected, rtol=1e-4, atol=1e-5)  # prefill leaves nothing out
        if level == "exact":
            torch.testing.assert_close(out[True][0][index], expected, rtol=1e-3, atol=1e-3)
