"""A synthetic model opened like any other, from no file at all, and the experts that its tokens pick.

A random router picks by chance and a cache would look worse than it is. Here every pick of the token before stays with
probability `repeat`, else another expert takes its place. The list of picks lies on the device and its position is a
tensor, so a recorded step follows it as well.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from transformers import AutoTokenizer

from engine.bench.synthetic import FarSynthetic, Shape, bytes_of, trunk_of
from engine.core import MachineError, Options
from engine.experts.device import DeviceRuntime
from engine.experts.hook import Hook
from engine.experts.host import HostRuntime
from engine.experts.layer import LayerExperts
from engine.experts.runtime import Runtime
from engine.machine import errors
from engine.machine.detect import machine_for
from engine.machine.pinned_memory import CudaDriver, Driver, HostMemory
from engine.model.blocks import is_known
from engine.model.host_embedding import leave_on_host
from engine.model.load import Loaded
from engine.model.packed import nest_head
from engine.model.placement import trunk_dtype
from engine.model.registration import Report, UnboundConfig, bind
from engine.paths import demo_model
from engine.planning.planner import Planner
from engine.planning.sizes import DEFAULT_TRUNK_BITS

Tensor = torch.Tensor
N_TOKENS = 1024  # picks; then the list begins again


def open_in_memory(shape: Shape, calibration: Mapping, options: Options,
                   report: Report = lambda text, share: None) -> Loaded:
    """Random trunk and experts on the device that `options` names. MachineError: a card that cannot be used."""
    if errors.device_for(options.device)[0] == "cuda":
        return open_on_gpu(shape, calibration, options, CudaDriver(), report)
    far = FarSynthetic(shape, torch.empty(bytes_of(shape), dtype=torch.uint8), _repeat(calibration), report=report)
    return _loaded(_model(shape, "cpu", report), HostRuntime, shape, calibration, far, options)


def open_on_gpu(shape: Shape, calibration: Mapping, options: Options, driver: Driver,
                report: Report = lambda text, share: None, device: str = "cuda") -> Loaded:
    """Experts in page-locked memory, computed by the device, and the embedding beside them, as of any other model;
    `runtime.close` gives the memory back.

    MachineError when the system locks too little.
    """
    memories = [HostMemory(bytes_of(shape), driver)]
    try:
        if memories[0].reason:
            raise MachineError(memories[0].reason)
        far = FarSynthetic(shape, memories[0].bytes, _repeat(calibration), report=report, release=memories[0].close)
        model = _model(shape, device, report)
        embedding = leave_on_host(model, driver)
        memories += [embedding] if embedding else []
        loaded = _loaded(model, DeviceRuntime, shape, calibration, far, options, device=device, dtype=model.dtype)
    except BaseException:
        for memory in memories:
            memory.close()
        raise
    runtime = loaded.runtime
    runtime.memories, runtime.link_bytes_per_second = memories[1:], loaded.planner.machine.link_bytes_per_second
    return loaded


def _repeat(calibration: Mapping) -> float:
    return calibration["synthetic"]["repeat_neurons"]


def _model(shape: Shape, device: str, report: Report) -> torch.nn.Module:
    """A random trunk, in main memory and in the codes that the device's plan takes, around experts that are not there
    yet."""
    report("Making up the trunk", 0.0)
    stored = trunk_of(shape, DEFAULT_TRUNK_BITS[device], seed=0)
    trunk = {name: tensor for _, parts in stored for name, tensor in parts.items()}
    return type(shape.skeleton).from_pretrained(None, config=shape.config, state_dict=trunk,
                                                dtype=trunk_dtype(device),
                                                quantization_config=UnboundConfig())


def _loaded(model: torch.nn.Module, side: type[Runtime], shape: Shape, calibration: Mapping, far: FarSynthetic,
            options: Options, device: str = "cpu", **given) -> Loaded:
    """Trunk and experts on the device. given: what the device's side wants to know besides."""
    bits, machine = DEFAULT_TRUNK_BITS[device], machine_for(device, demo_model())
    planner = Planner(shape.spec, machine, bits, shape.layout.group, calibration)
    if is_known(model):
        nest_head(model)
    model.to(device)
    near_bytes = planner.near_bytes(options.level, options)
    runtime = bind(model, side, far, planner, options.level, near_bytes, options.predict, device=device, **given)
    return Loaded(model.eval(), AutoTokenizer.from_pretrained(demo_model()), runtime, shape.spec, planner)


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


class FollowPicks(Hook):
    """Decode steps of one token take their experts from such a list; the router's weights stay.

    position: a tensor that somebody else counts, such as the cache's; without one every step counts.
    """

    def __init__(self, runtime: Runtime, repeat: float, position: Tensor | None = None, seed: int = 0) -> None:
        far, self.runtime, self.counts = runtime.far, runtime, position is None
        self.table = picks(far.layers, far.experts, runtime.top_k, repeat, seed=seed).to(runtime.device)
        self.at = torch.zeros((), dtype=torch.int64, device=runtime.device) if self.counts else position

    def routed(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) > 1 or self.runtime.phase == "prefill":
            return ids, weights
        if layer.index == 0 and self.counts:
            self.at.add_(1)
        return self.table[:, layer.index].index_select(0, self.at[None] % len(self.table)), weights
