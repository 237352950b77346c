"""A synthetic model opened like any other, from a folder's or from no file at all."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import AutoTokenizer

from engine import card_errors, hf
from engine.paths import demo_model
from engine.room import Room, machine_for
from engine.spec import Options
from engine.synthetic import FarSynthetic, Shape, bytes_of, trunk_of


def open_in_memory(shape: Shape, calibration: Mapping, options: Options,
                   report: Callable[[str, float], None] = lambda text, share: None) -> hf.Loaded:
    """Random trunk and experts on the device that `options` names."""
    memory = torch.empty(bytes_of(shape), dtype=torch.uint8)
    far = FarSynthetic(shape, memory, calibration["synthetic"]["repeat_neurons"], report=report)
    return around(shape, calibration, far, options, report)


def around(shape: Shape, calibration: Mapping, far: FarSynthetic, options: Options,
           report: Callable[[str, float], None] = lambda text, share: None) -> hf.Loaded:
    """A random trunk around experts that are there."""
    device, _ = card_errors.device_for(options.device)
    machine = machine_for(device, demo_model())
    report("Making up the trunk", 0.0)
    trunk = {name: parts[name] for name, parts in trunk_of(shape, 16, seed=0)}
    model = type(shape.skeleton).from_pretrained(None, config=shape.config, state_dict=trunk,
                                                 dtype=hf.trunk_dtype(device),
                                                 quantization_config=hf.FloeConfig(from_checkpoint=True))
    room = Room(shape.spec, machine, 16, shape.layout.group, calibration)
    runtime = hf.bind(model, far, "exact", room)
    model.to(device)
    runtime.predict = options.predict
    if device == "cpu":  # on a card the caller puts the device's own runtime in its place
        runtime.set_level(options.level, room.near_bytes(options.level, options))
    return hf.Loaded(model.eval(), AutoTokenizer.from_pretrained(demo_model()), runtime, shape.spec, room)
