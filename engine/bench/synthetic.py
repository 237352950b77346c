"""Models of real shape with made-up weights, to measure speed where no weights can be had; what they say is nonsense.

Names and shapes are those of the catalogue's model, on transformers' meta device. The experts are random bytes of our
own format, where any bytes are valid codes, with scales that keep the numbers in range: 18 GB take as long as writing
them. What speed depends on is made to order: how often a token picks an expert of the last one again (a list of picks,
engine/bench/synthetic_model.py), and how often a neuron is chosen again (some neurons are louder than others).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from engine.bench.blobs import Blobs, random_matrix
from engine.core import ModelSpec, UserError
from engine.experts.store import FarMemory
from engine.files.folder_writer import FolderWriter
from engine.files.manifest import Manifest
from engine.files.skeleton import build_skeleton, experts_modules, model_spec, text_config_of
from engine.files.trunk import CODES, SCALES, bits_of
from engine.library import catalogue
from engine.paths import demo_model
from kernels.layout import Layout, default_group_size

Tensor = torch.Tensor
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Shares of k*I neurons, refined and down-only: what the pilot model needed for about the levels' promises.
SHARES = {"quality": (0.3, 0.2), "balanced": (0.15, 0.3), "fast": (0.1, 0.2)}
DRAWN = 262_147     # numbers of a matrix that are drawn, then they repeat; prime, so that no two rows are the same
REPEAT, REPEAT_NEURONS = 0.42, 0.45    # measured on the pilot model's own text; neurons: in an expert picked again


@dataclass(frozen=True)
class Shape:
    """The architecture to make up weights for. modules: routed experts on the meta device, by name."""

    name: str
    title: str
    config: object
    skeleton: torch.nn.Module
    modules: dict[str, torch.nn.Module]
    spec: ModelSpec
    layout: Layout


def shape_of(entry: catalogue.Entry, layers: int | None = None) -> Shape:
    """The catalogue's model, or its first `layers` decoder layers. UserError for more layers than it has."""
    given = dict(entry.config)
    config = text_config_of(AutoConfig.for_model(given.pop("model_type"), **given))
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise UserError(f"{entry.title} has {config.num_hidden_layers} layers; choose 1 to that many.")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    skeleton = build_skeleton(config, entry.name)
    modules = experts_modules(skeleton, entry.name)
    spec = model_spec(entry.name, skeleton, modules)
    return Shape(entry.name, entry.title, config, skeleton, modules, spec,
                 Layout(spec.hidden, spec.neurons, default_group_size(spec.hidden)))


def shape_named(name: str, layers: int | None = None) -> Shape:
    """UserError for a name that is not in the catalogue, or has fewer layers."""
    entry = catalogue.find(name)
    if entry is None:
        raise UserError(f"There is no model {name!r} in the catalogue; choose one of "
                        f"{', '.join(catalogue.entries())}.")
    return shape_of(entry, layers)


def calibration_of(shape: Shape, repeat: float = REPEAT, repeat_neurons: float = REPEAT_NEURONS) -> dict:
    """What stands in floe.json where a real model has its calibration."""
    n = shape.spec.top_k * shape.spec.neurons
    levels = {level: {"budgets": [[int(refined * n), int(rest * n)]] * shape.spec.layers}
              for level, (refined, rest) in SHARES.items()}
    return {"levels": levels, "synthetic": {"repeat": repeat, "repeat_neurons": repeat_neurons}}


def spread_for(repeat: float, kept: float, n: int = 4096) -> float:
    """The spread at which a share `repeat` of the kept neurons was kept by the token before, for unrelated inputs.

    Without any spread that share is `kept`, the share of neurons that is kept at all.
    """
    draw = np.random.default_rng(0)
    products = np.abs(draw.standard_normal((16, n)) * np.maximum(draw.standard_normal((16, n)), 0.1))
    loud, low, high = draw.standard_normal(n), 0.0, 6.0
    for _ in range(20):
        spread = (low + high) / 2
        best = np.argsort(-products * np.exp(spread * loud))[:, :int(kept * n)]
        chosen = np.zeros((16, n), bool)
        np.put_along_axis(chosen, best, True, 1)
        again = (chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum()
        low, high = (spread, high) if again < repeat else (low, spread)
    return low


def blobs_for(shape: Shape, repeat_neurons: float, seed: int) -> Blobs:
    refined, rest = SHARES["fast"]
    return Blobs(shape.layout, spread_for(repeat_neurons, refined + rest), seed)


def biases_of(shape: Shape, layer: int, seed: int) -> dict[str, Tensor]:
    """float32 gate_bias, up_bias [E, I], down_bias [E, H], where the architecture has them."""
    if not list(shape.modules.values())[layer].has_bias:
        return {}
    spec, draw = shape.spec, torch.Generator().manual_seed(seed + layer)
    sizes = {"gate_bias": spec.neurons, "up_bias": spec.neurons, "down_bias": spec.hidden}
    return {name: 0.02 * torch.randn(spec.experts, n, generator=draw) for name, n in sizes.items()}


def trunk_of(shape: Shape, trunk_bits: int, seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every other tensor by name, as trunk.safetensors stores it: random, quantised ones as random codes."""
    draw, routed = torch.Generator().manual_seed(seed), tuple(f"{path}." for path in shape.modules)
    tied = getattr(shape.config, "tie_word_embeddings", False)
    for name, tensor in shape.skeleton.state_dict().items():
        if name.startswith(routed) and ".post_expert_norm" not in name or (tied and name == "lm_head.weight"):
            continue
        yield name, _stored(name, tensor, bits_of(name, tensor, trunk_bits, shape.spec.decoder_layers), draw)


def _stored(name: str, tensor: Tensor, bits: int, draw: torch.Generator) -> dict[str, Tensor]:
    if bits == 16:
        return {name: _plain(name, tensor, draw)}
    codes, scales = random_matrix(*tensor.shape, bits, draw)
    return {name + CODES: codes, name + SCALES: scales}


def _plain(name: str, tensor: Tensor, draw: torch.Generator) -> Tensor:
    """Matrices keep the size of what they multiply; norms and scales are one, the rest is small."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    dtype = torch.bfloat16 if tensor.ndim > 1 else torch.float32
    if tensor.ndim > 1:
        fan = tensor[0].numel() if tensor.ndim > 2 else tensor.shape[1]
        few = torch.randn(min(DRAWN, tensor.numel()), generator=draw) / math.sqrt(fan)
        return few.to(dtype).repeat(-(-tensor.numel() // len(few)))[:tensor.numel()].view(tensor.shape)
    if any(word in name for word in ("norm", "scal")):
        return torch.ones(tensor.shape, dtype=dtype)
    return 0.1 * torch.randn(tensor.shape, generator=draw, dtype=dtype)


def write(shape: Shape, dest: Path, trunk_bits: int = 4, calibration: dict | None = None, seed: int = 0,
          report: Callable[[str, float], None] = lambda text, share: None) -> Manifest:
    """A compressed folder that opens like any other, with the demonstration model's tokenizer: any will do. UserError
    where `dest` holds something already."""
    calibration = calibration or calibration_of(shape)
    spec = shape.spec
    blobs = blobs_for(shape, calibration["synthetic"]["repeat_neurons"], seed)
    with FolderWriter.begin(dest, spec, len(shape.skeleton.state_dict()), f"{shape.name} made up, seed {seed}",
                            shape.layout.group, trunk_bits) as writer:
        for layer in range(spec.layers):
            writer.layer(layer, made_up(shape, layer, blobs, seed))
            report(f"Made up layer {layer + 1} of {spec.layers}", (layer + 1) / (spec.layers + 1))
        for _, parts in trunk_of(shape, trunk_bits, seed):
            writer.trunk.add(parts)
        return writer.seal(shape.config, shape.skeleton, demo_model(), TOKENIZER, calibration)


def made_up(shape: Shape, layer: int, blobs: Blobs, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Blob and biases [1, n] of each expert; the blob is the same memory each time."""
    blob, biases = torch.empty(shape.layout.blob_bytes, dtype=torch.uint8), biases_of(shape, layer, seed)
    for expert in range(shape.spec.experts):
        blobs.fill(blob)
        yield blob, {name: bias[expert:expert + 1] for name, bias in biases.items()}


class FarSynthetic(FarMemory):
    """Experts made up in memory. memory: uint8 of at least `bytes_of(shape)`, page-locked for a card."""

    def __init__(self, shape: Shape, memory: Tensor, repeat_neurons: float = REPEAT_NEURONS, seed: int = 0,
                 report: Callable[[str, float], None] = lambda text, share: None,
                 release: Callable[[], None] = lambda: None) -> None:
        """release: gives `memory` back."""
        spec = shape.spec
        self._release = release
        self.layout, self.layers, self.experts = shape.layout, spec.layers, spec.experts
        self.neurons, self.hidden, self.expert_bytes = spec.neurons, spec.hidden, shape.layout.blob_bytes
        self._blobs = memory[:bytes_of(shape)].view(self.layers, self.experts, 1, self.expert_bytes)
        self._biases = [biases_of(shape, layer, seed) for layer in range(self.layers)]
        blobs = blobs_for(shape, repeat_neurons, seed)
        for expert in range(self.experts):
            blobs.fill(self._blobs[0, expert, 0])
        for layer in range(self.layers):
            if layer:   # other places, the same numbers: drawing 18 GB takes most of a minute
                self._blobs[layer].copy_(self._blobs[0])
            report(f"Made up layer {layer + 1} of {self.layers}", (layer + 1) / self.layers)

    def close(self) -> None:
        self._blobs = None
        self._release()


def bytes_of(shape: Shape) -> int:
    """Bytes of all experts, packed."""
    return shape.spec.n_experts_total * shape.layout.blob_bytes
