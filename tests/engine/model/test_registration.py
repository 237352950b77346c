"""Opening chooses the side that computes the experts, once; transformers' own way of opening gets the processor's."""
from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from engine.bench import synthetic, synthetic_model
from engine.core import Options
from engine.experts.device import DeviceRuntime
from engine.experts.host import HostRuntime
from engine.experts.runtime import Runtime
from engine.model import load
from engine.model.registration import FloeExperts
from tests.engine.bench.test_synthetic import tiny
from tests.engine.experts.test_far_locked import Ledger
from tests.support.folders import compressed


@pytest.fixture
def made(monkeypatch) -> list[type]:
    """Every runtime that is made, by its side."""
    found, init = [], Runtime.__init__
    monkeypatch.setattr(Runtime, "__init__", lambda self, *given, **named: found.append(type(self))
                        or init(self, *given, **named))
    return found


def is_bound(model, runtime: Runtime) -> bool:
    modules = [module for module in model.modules() if isinstance(module, FloeExperts)]
    return model.floe is runtime and all(module.runtime is runtime and module.layer is layer
                                         for module, layer in zip(modules, runtime.layers, strict=True))


def test_one_runtime_on_the_side_that_computes(made, tmp_path):
    folder = compressed("qwen3_moe", tmp_path)[2]
    loaded = load.load(folder, Options("exact", device="cpu"))
    assert made == [HostRuntime] and is_bound(loaded.model, loaded.runtime)
    made.clear()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert made == [HostRuntime] and is_bound(model, model.floe)
    made.clear()
    shape = synthetic.shape_of(tiny("qwen3-30b-a3b"))
    loaded = synthetic_model.open_on_gpu(shape, synthetic.calibration_of(shape), Options("exact"), Ledger(),
                                          device="cpu")
    assert made == [DeviceRuntime] and is_bound(loaded.model, loaded.runtime)
    loaded.runtime.close()
