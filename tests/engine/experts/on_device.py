"""The device's side behind a model that a test opened for the processor, with the plans that the test gave it."""
from __future__ import annotations

from engine.experts.device import DeviceRuntime
from engine.experts.store import FarBlobs
from engine.model.load import Loaded
from engine.model.registration import bind


def take_over(loaded: Loaded, far: FarBlobs | None = None, device: str = "cpu", tokens: int = 1) -> DeviceRuntime:
    """far: locked, for a card. The trunk is where it was."""
    before = loaded.runtime
    runtime = bind(loaded.model, DeviceRuntime, far or before.far, loaded.planner, "exact", None, before.predict,
                   device=device, tokens=tokens, dtype=loaded.model.dtype)
    runtime.plans.update(before.plans)
    runtime.set_level(before.level, before.near_wish)
    loaded.runtime = runtime
    return runtime
