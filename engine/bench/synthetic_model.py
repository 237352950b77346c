"""A synthetic model opened like any other, from a folder's or from no file at all."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from transformers import AutoTokenizer

from engine.bench.synthetic import FarSynthetic, Shape, bytes_of, trunk_of
from engine.core import MachineError, Options
from engine.experts.device import take_over
from engine.machine import errors
from engine.machine.pinned_memory import CudaDriver, Driver, HostMemory
from engine.model import load
from engine.model.host_embedding import leave_on_host
from engine.paths import demo_model
from engine.planning.room import Room, machine_for

Report = Callable[[str, float], None]


def open_in_memory(shape: Shape, calibration: Mapping, options: Options,
                   report: Report = lambda text, share: None) -> load.Loaded:
    """Random trunk and experts on the device that `options` names. MachineError: a card that cannot be used."""
    if errors.device_for(options.device)[0] == "cuda":
        return open_on_card(shape, calibration, options, CudaDriver(), report)
    far = FarSynthetic(shape, torch.empty(bytes_of(shape), dtype=torch.uint8), _repeat(calibration), report=report)
    loaded = _loaded(_model(shape, "cpu", report), shape, calibration, far, "cpu")
    loaded.runtime.predict = options.predict
    loaded.runtime.set_level(options.level, loaded.room.near_bytes(options.level, options))
    return loaded


def open_on_card(shape: Shape, calibration: Mapping, options: Options, driver: Driver,
                 report: Report = lambda text, share: None, device: str = "cuda") -> load.Loaded:
    """Experts in page-locked memory, computed by the device, and the embedding beside them, as of any other model;
    `runtime.close` gives the memory back.

    MachineError when the system locks too little.
    """
    memories = [HostMemory(bytes_of(shape), driver)]
    try:
        if memories[0].sentence:
            raise MachineError(memories[0].sentence)
        far = FarSynthetic(shape, memories[0].bytes, _repeat(calibration), report=report, release=memories[0].close)
        model = _model(shape, device, report)
        embedding = leave_on_host(model, driver)
        memories += [embedding] if embedding else []
        loaded = _loaded(model, shape, calibration, far, device)
        loaded.runtime.predict = options.predict
        near_bytes = loaded.room.near_bytes(options.level, options)
        runtime = take_over(loaded.model, far, device, level=options.level, near_bytes=near_bytes)
    except BaseException:
        for memory in memories:
            memory.close()
        raise
    runtime.memories, runtime.link_bytes_per_second = memories[1:], loaded.room.machine.link_bytes_per_second
    return replace(loaded, runtime=runtime)


def _repeat(calibration: Mapping) -> float:
    return calibration["synthetic"]["repeat_neurons"]


def _model(shape: Shape, device: str, report: Report) -> torch.nn.Module:
    """A random trunk, in main memory, around experts that are not there yet."""
    report("Making up the trunk", 0.0)
    trunk = {name: parts[name] for name, parts in trunk_of(shape, 16, seed=0)}
    return type(shape.skeleton).from_pretrained(None, config=shape.config, state_dict=trunk,
                                                dtype=load.trunk_dtype(device),
                                                quantization_config=load.FloeConfig(from_checkpoint=True))


def _loaded(model: torch.nn.Module, shape: Shape, calibration: Mapping, far: FarSynthetic, device: str) -> load.Loaded:
    """The trunk onto the device; the host computes the experts until a device takes over."""
    room = Room(shape.spec, machine_for(device, demo_model()), 16, shape.layout.group, calibration)
    runtime = load.bind(model, far, "exact", room)
    model.to(device)
    return load.Loaded(model.eval(), AutoTokenizer.from_pretrained(demo_model()), runtime, shape.spec, room)
