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
from engine.experts import device
from engine.experts.device import DeviceRuntime
from engine.experts.layer import recognised
from engine.experts.runtime import Runtime
from engine.experts.store import FarBlobs
from engine.files.skeleton import build_skeleton, experts_modules
from engine.machine import table
from engine.model.host_embedding import HostEmbedding
from engine.model.registration import FloeExperts, bind
from engine.model.static_cache import StepCache, forward
from engine.planning.plan import Plan
from engine.planning.planner import Planner

CARD = "cuda:0"  # with its number: torch asks the driver for one that is left out
LAYERS = 6      # the fewest with which every kind of layer of every architecture is there


class FarNothing(FarBlobs):
    """As much far memory as the experts take, without a byte in it."""

    def __init__(self, shape: synthetic.Shape) -> None:
        spec = shape.spec
        self.layout, self.layers, self.experts = shape.layout, spec.layers, spec.experts
        self.neurons, self.hidden, self.expert_bytes = spec.neurons, spec.hidden, shape.layout.blob_bytes
        self._blobs = torch.empty(spec.layers, spec.experts, 1, self.expert_bytes, dtype=torch.uint8)
        self._biases = [synthetic.biases_of(shape, layer, 0) for layer in range(spec.layers)]

    def blobs(self, layer: int) -> torch.Tensor:
        return self._blobs[layer]

    def biases(self, layer: int) -> dict[str, torch.Tensor]:
        return self._biases[layer]

    def verify(self, layer: int, expert: int) -> None:
        """Nothing is there that could be damaged."""


@dataclass
class OnFakeCard:
    """An open model with the plan that was made for it on an RTX 3060."""

    shape: synthetic.Shape
    model: torch.nn.Module
    runtime: Runtime
    step: Step
    plan: Plan


def opened(shape: synthetic.Shape, model: torch.nn.Module, level: str) -> OnFakeCard:
    """Inside `fake_card`. Near memory for two thirds of the sketches, so that everything has to be looked up."""
    calibration = synthetic.calibration_of(shape)
    _onto_card(model)
    room = Planner(shape.spec, table.described("rtx-3060-12gb"), 16, shape.layout.group, calibration)
    n_near = shape.spec.n_experts_total * shape.layout.sketch_bytes * 2 // 3
    with mock.patch.object(device, "recognised", _recognised):
        runtime = bind(model, DeviceRuntime, FarNothing(shape), room, level, n_near, device=CARD, dtype=torch.bfloat16)
    plan = room.plan(level, Options(level, runtime.near_bytes))
    cache = StepCache(model.config, plan.context, CARD)
    step = Step(model, runtime, cache, DeviceSampler(shape.spec.vocabulary, plan.context, CARD))
    return OnFakeCard(shape, model.eval(), runtime, step, plan)


def _recognised(*gate):
    """Which gate it is shows in numbers, so they are real ones."""
    with unset_fake_temporarily():
        return recognised(*gate)


def nowhere(shape: synthetic.Shape) -> torch.nn.Module:
    """Outside `fake_card`: the model in 16 bits on the meta device, experts without weights."""
    model = build_skeleton(shape.config, shape.name).to(torch.bfloat16)
    for path, module in experts_modules(model, shape.name).items():
        model.set_submodule(path, FloeExperts(module))
    model.set_experts_implementation("floe")
    return model


def _onto_card(model: torch.nn.Module) -> None:
    """Its embedding, where nothing else uses it, into the host's memory."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is torch.nn.Embedding and head.weight is not embedding.weight:
        weight = torch.empty(embedding.weight.shape, dtype=torch.bfloat16)
        memory = SimpleNamespace(bytes=torch.empty(weight.nbytes, dtype=torch.uint8))
        model.set_input_embeddings(HostEmbedding(weight, memory))
    model.to_empty(device=CARD)
    model.tie_weights()     # to_empty made two of them


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
