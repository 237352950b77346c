"""A synthetic model opened like any other, from no file at all, and the experts that its tokens pick.

A random router picks by chance and a cache would look worse than it is. Here every pick of the token before stays with
probability `repeat`, else another expert takes its place. The list of picks lies on the device and its position is a
tensor, so a recorded step follows it as well.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoTokenizer

from engine.bench.synthetic import FarSynthetic, Shape, bytes_of, trunk_of
from engine.core import MachineError, Options
from engine.experts.device import take_over
from engine.experts.host import LayerExperts, Runtime
from engine.machine import errors
from engine.machine.detect import machine_for
from engine.machine.pinned_memory import CudaDriver, Driver, HostMemory
from engine.model import load
from engine.model.host_embedding import leave_on_host
from engine.paths import demo_model
from engine.planning.planner import Planner

Tensor = torch.Tensor
Report = Callable[[str, float], None]
N_TOKENS = 1024  # picks; then the list begins again


def open_in_memory(shape: Shape, calibration: Mapping, options: Options,
                   report: Report = lambda text, share: None) -> load.Loaded:
    """Random trunk and experts on the device that `options` names. MachineError: a card that cannot be used."""
    if errors.device_for(options.device)[0] == "cuda":
        return open_on_gpu(shape, calibration, options, CudaDriver(), report)
    far = FarSynthetic(shape, torch.empty(bytes_of(shape), dtype=torch.uint8), _repeat(calibration), report=report)
    loaded = _loaded(_model(shape, "cpu", report), shape, calibration, far, "cpu")
    loaded.runtime.predict = options.predict
    loaded.runtime.set_level(options.level, loaded.room.near_bytes(options.level, options))
    return loaded


def open_on_gpu(shape: Shape, calibration: Mapping, options: Options, driver: Driver,
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
                                                quantization_config=load.UnboundConfig())


def _loaded(model: torch.nn.Module, shape: Shape, calibration: Mapping, far: FarSynthetic, device: str) -> load.Loaded:
    """The trunk onto the device; the host computes the experts until a device takes over."""
    room = Planner(shape.spec, machine_for(device, demo_model()), 16, shape.layout.group, calibration)
    runtime = load.bind(model, far, "exact", room)
    model.to(device)
    return load.Loaded(model.eval(), AutoTokenizer.from_pretrained(demo_model()), runtime, shape.spec, room)


def picks(layers: int, experts: int, top_k: int, repeat: float, n_tokens: int = N_TOKENS, seed: int = 0) -> Tensor:
    """int64 [N, L, k]: different experts within a row. repeat: share of a token's picks that the last one had."""
    draw = np.random.default_rng(seed)
    found = np.empty((n_tokens, layers, top_k), np.int64)
    found[0] = draw.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)[:, :top_k]
    for token in range(1, n_tokens):
        stays = draw.random((layers, top_k)) < repeat
        for layer in range(layers):
            last = found[token - 1, layer]
            others = np.setdiff1d(np.arange(experts), last)
            new = draw.choice(others, top_k, replace=len(others) < top_k)
            found[token, layer] = np.where(stays[layer] | (len(others) < top_k), last, new)
    return torch.from_numpy(found)


def follow_picks(runtime: Runtime, repeat: float, position: Tensor | None = None, seed: int = 0) -> None:
    """From now on decode steps of one token take their experts from such a list; the router's weights stay.

    position: a tensor that somebody else counts, such as the cache's; without one every step counts.
    """
    far, forward = runtime.far, runtime.forward
    table = picks(far.layers, far.experts, runtime.top_k, repeat, seed=seed).to(runtime.device)
    at = torch.zeros((), dtype=torch.int64, device=runtime.device) if position is None else position

    def following(layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if len(x) == 1 and runtime.phase != "prefill":
            if layer.index == 0 and position is None:
                at.add_(1)
            ids = table[:, layer.index].index_select(0, at[None] % len(table)).to(ids.device)
        return forward(layer, x, ids, weights)
    runtime.forward = following
