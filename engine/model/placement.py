"""The experts of an open model onto a graphics card; where that cannot be, the processor computes them and says so."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from engine.experts.device import DeviceRuntime, NoDevicePath, take_over
from engine.experts.far_locked import FarLocked
from engine.experts.host import Runtime
from engine.files.manifest import Manifest, is_compressed
from engine.machine.pinned_memory import Driver

Report = Callable[[str, float], None]


def experts_on_card(model: torch.nn.Module, folder: Path, level: str, near_bytes: int, report: Report,
                    driver: Driver, device: str = "cuda") -> Runtime:
    """Page-lock the folder's experts and let the device compute them, at `level` with `near_bytes` of its memory.

    -> the runtime that the model has now; the host's own where the card cannot compute such experts.
    """
    try:
        return _locked(model, folder, level, near_bytes, report, driver, device)
    except NoDevicePath as error:
        report(str(error), 0.9)
        model.floe.note = str(error)
        model.floe.set_level(level, near_bytes)
        return model.floe


def _locked(model: torch.nn.Module, folder: Path, level: str, near_bytes: int, report: Report, driver: Driver,
            device: str) -> DeviceRuntime:
    if not is_compressed(folder):
        raise NoDevicePath("An uncompressed checkpoint: the processor computes its experts, which is slow.")
    far = FarLocked(folder, Manifest.load(folder), driver,
                    lambda share: report("Reading the experts into page-locked memory", 0.8 + 0.1 * share))
    try:
        runtime = take_over(model, far, device, level=level, near_bytes=near_bytes)
    except BaseException:
        far.close()
        raise
    runtime.note = far.sentence
    if far.sentence:
        report(far.sentence, 0.9)
    return runtime
