"""A catalogue model's first layers on the fake card: transformers' own modules and our runtime, no weights at all."""
from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from engine.bench import synthetic
from engine.core import Options
from engine.decode.device_sampling import DeviceSampler
from engine.decode.step import Step
from engine.experts import layer
from engine.experts.device import DeviceRuntime
from engine.experts.runtime import Runtime
from engine.experts.store import FarMemory
from engine.files.manifest import EXPERTS
from engine.files.skeleton import build_skeleton, experts_modules
from engine.files.trunk import GROUP, bits_of
from engine.machine import table
from engine.model.host_embedding import HostEmbedding, host_bytes
from engine.model.packed import nest_head, packed_parameter
from engine.model.registration import FloeExperts, bind
from engine.model.static_cache import StepCache, forward
from engine.planning.plan import Plan
from engine.planning.planner import Planner
from engine.planning.sizes import DEFAULT_TRUNK_BITS

RECOGNISED = layer.recognised
CARD = "cuda:0"  # with its number: torch asks the driver for one that is left out
LAYERS = 6      # the fewest with which every kind of layer of every architecture is there


class FarNothing(FarMemory):
    """As much far memory as the experts take, without a byte in it."""

    def __init__(self, shape: synthetic.Shape) -> None:
        spec = shape.spec
        self.layout, self.layers, self.experts = shape.layout, spec.layers, spec.experts
        self.neurons, self.hidden, self.expert_bytes = spec.neurons, spec.hidden, shape.layout.blob_bytes
        self._blobs = torch.empty(spec.layers, spec.experts, 1, self.expert_bytes, dtype=torch.uint8)
        self._biases = [synthetic.biases_of(shape, layer, 0) for layer in range(spec.layers)]


@dataclass
class OnFakeCard:
    """An open model with the plan that was made for it on an RTX 3060."""

    shape: synthetic.Shape
    model: torch.nn.Module
    runtime: Runtime
    step: Step
    plan: Plan


def opened(shape: synthetic.Shape, model: torch.nn.Module, level: str, is_roomy: bool = False) -> OnFakeCard:
    """Inside `fake_card`. Near memory for two thirds of the sketches, so that everything has to be looked up; or roomy,
    for all of them and some records."""
    calibration = synthetic.calibration_of(shape)
    _onto_card(shape, model)
    nest_head(model)
    small = table.described("rtx-3060-12gb")
    planner = Planner(shape.spec, small, DEFAULT_TRUNK_BITS["cuda"], shape.layout.group, calibration)
    n_near = shape.spec.n_experts_total * shape.layout.sketch_bytes * (6 if is_roomy else 2) // 3
    with mock.patch.object(layer, "recognised", _recognised):
        runtime = bind(model, DeviceRuntime, FarNothing(shape), planner, level, n_near, device=CARD,
                       dtype=torch.bfloat16)
    plan = planner.plan(level, Options(level, runtime.near_bytes))
    cache = StepCache(model.config, plan.context, CARD)
    step = Step(model, runtime, cache, DeviceSampler(shape.spec.vocabulary, plan.context, CARD))
    return OnFakeCard(shape, model.eval(), runtime, step, plan)


def _recognised(*gate):
    """Which gate it is shows in numbers, so they are real ones."""
    with unset_fake_temporarily():
        return RECOGNISED(*gate)


def nowhere(shape: synthetic.Shape) -> torch.nn.Module:
    """Outside `fake_card`: the model in 16 bits on the meta device, experts without weights."""
    model = build_skeleton(shape.config, shape.name).to(torch.bfloat16)
    for path, module in experts_modules(model, shape.name).items():
        FloeExperts.put(model, path, module)
    model.config._experts_implementation = EXPERTS
    return model


def _onto_card(shape: synthetic.Shape, model: torch.nn.Module) -> None:
    """Its embedding, where nothing else uses it, into the host's memory."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is torch.nn.Embedding and head.weight is not embedding.weight:
        weight = _stored(shape, "embed_tokens.weight", embedding.weight, "cpu")
        memory = SimpleNamespace(bytes=torch.empty(host_bytes(weight), dtype=torch.uint8))
        model.set_input_embeddings(HostEmbedding(weight, memory))
    for name, weight in list(model.named_parameters()):
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, _stored(shape, name, weight, CARD))
    for name, buffer in list(model.named_buffers()):
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, torch.empty_like(buffer, device=CARD))
    model.tie_weights()     # they were two for a moment


def _stored(shape: synthetic.Shape, name: str, weight: torch.Tensor, where: str) -> torch.nn.Parameter:
    """A weight as the plan takes it on a card: large matrices in their codes, but for routers, which are decoded."""
    bits = bits_of(name, weight, DEFAULT_TRUNK_BITS["cuda"], shape.spec.decoder_layers)
    if bits == 16 or tuple(weight.shape) == (shape.spec.experts, shape.spec.hidden):
        return torch.nn.Parameter(torch.empty(weight.shape, dtype=torch.bfloat16, device=where), requires_grad=False)
    rows, width = weight.shape
    codes = torch.empty(rows, width * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device=where)
    scales = torch.empty(rows, width // GROUP, *((2,) if bits == 4 else ()), dtype=torch.float16, device=where)
    return packed_parameter(codes, scales, torch.bfloat16)


def prefill(on: OnFakeCard) -> None:
    """One chunk as planned, through StepPrefix's own forward. Two numbers are asked of the card there, by design: how
    many tokens each expert has, here all the same, and which experts are near, here none."""
    spec, chunk, runtime = on.shape.spec, on.plan.chunk, on.runtime
    each = [chunk * spec.top_k // spec.experts] * spec.experts
    each[0] += chunk * spec.top_k - sum(each)
    counted = SimpleNamespace(tolist=lambda: each)
    runtime.phase = "prefill"
    with (mock.patch.object(torch, "bincount", lambda picks, minlength: counted),
          mock.patch.object(runtime, "_near_slots", lambda layer: [-1] * spec.experts)):
        ids = torch.zeros(1, chunk, dtype=torch.int64, device=CARD)
        forward(on.model, ids, on.step.cache, logits_to_keep=1)
