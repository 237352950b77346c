"""A synthetic model opened like any other, from a folder's or from no file at all."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from transformers import AutoTokenizer

from engine import card_errors, hf
from engine.device_runtime import take_over
from engine.host_memory import CudaDriver, Driver, HostMemory
from engine.paths import demo_model
from engine.room import Room, machine_for
from engine.spec import MachineError, Options
from engine.synthetic import FarSynthetic, Shape, bytes_of, trunk_of

Report = Callable[[str, float], None]


def open_in_memory(shape: Shape, calibration: Mapping, options: Options,
                   report: Report = lambda text, share: None) -> hf.Loaded:
    """Random trunk and experts on the device that `options` names. MachineError: a card that cannot be used."""
    if card_errors.device_for(options.device)[0] == "cuda":
        return open_on_card(shape, calibration, options, CudaDriver(), report)
    far = FarSynthetic(shape, torch.empty(bytes_of(shape), dtype=torch.uint8), _repeat(calibration), report=report)
    loaded = _around(shape, calibration, far, "cpu", report)
    loaded.runtime.predict = options.predict
    loaded.runtime.set_level(options.level, loaded.room.near_bytes(options.level, options))
    return loaded


def open_on_card(shape: Shape, calibration: Mapping, options: Options, driver: Driver,
                 report: Report = lambda text, share: None, device: str = "cuda") -> hf.Loaded:
    """Experts in page-locked memory, computed by the device; `runtime.close` gives the memory back.

    MachineError when the system locks too little.
    """
    memory = HostMemory(bytes_of(shape), driver)
    try:
        if memory.sentence:
            raise MachineError(memory.sentence)
        far = FarSynthetic(shape, memory.bytes, _repeat(calibration), report=report, release=memory.close)
        loaded = _around(shape, calibration, far, device, report)
        loaded.runtime.predict = options.predict
        near_bytes = loaded.room.near_bytes(options.level, options)
        runtime = take_over(loaded.model, far, device, level=options.level, near_bytes=near_bytes)
        return replace(loaded, runtime=runtime)
    except BaseException:
        memory.close()
        raise


def _repeat(calibration: Mapping) -> float:
    return calibration["synthetic"]["repeat_neurons"]


def _around(shape: Shape, calibration: Mapping, far: FarSynthetic, device: str, report: Report) -> hf.Loaded:
    """A random trunk around experts that are there, which the host computes until a device takes over."""
    machine = machine_for(device, demo_model())
    report("Making up the trunk", 0.0)
    trunk = {name: parts[name] for name, parts in trunk_of(shape, 16, seed=0)}
    model = type(shape.skeleton).from_pretrained(None, config=shape.config, state_dict=trunk,
                                                 dtype=hf.trunk_dtype(device),
                                                 quantization_config=hf.FloeConfig(from_checkpoint=True))
    room = Room(shape.spec, machine, 16, shape.layout.group, calibration)
    runtime = hf.bind(model, far, "exact", room)
    model.to(device)
    return hf.Loaded(model.eval(), AutoTokenizer.from_pretrained(demo_model()), runtime, shape.spec, room)
