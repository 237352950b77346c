"""A compressed folder's model with other experts: as many as a `Mixture` has, each decoded and mixed when it is asked
for. The trunk is the folder's own, the router's rows those of the mixture.

What is counted and compared here is whole texts on the processor; a specialist that is chosen is written as a folder
(make.py) and opened like any other.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from engine.core import UserError
from engine.experts.layer import LayerExperts
from engine.experts.prefill import expert_by_expert
from engine.experts.store import FarBlobs
from engine.files.compressed import MappedFile
from engine.files.manifest import TRUNK, Manifest
from engine.files.skeleton import build_skeleton, experts_modules, read_config, text_config_of
from engine.files.trunk import CODES, SCALES
from engine.model.registration import FloeExperts, UnboundConfig, layer_experts
from engine.quality.specialists.mixture import Mixture
from kernels.trunk.linear import decode

Tensor = torch.Tensor
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # names in configurations
GROUPS = ("n_group", "num_expert_group")  # of experts, of which a router first chooses some
DECODED_BYTES = 1 << 30  # of experts that stay decoded beside the ones that are mixed


class Source:
    """A compressed folder that specialists are made of. router: names of the trunk's tensors that have a row for each
    expert, with their layer. UserError for a folder that is none, or whose router cannot have fewer rows."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        self.far, self.trunk = FarBlobs(folder, self.manifest), MappedFile(folder / TRUNK)
        config = text_config_of(read_config(folder, ("floe",)))
        if any((getattr(config, name, 1) or 1) > 1 for name in GROUPS):
            raise UserError(f"The router of {folder.name} chooses among groups of experts, which have to stay whole; "
                            "make a specialist of another model.")
        self._config, n = config, self.manifest.experts
        self.skeleton = build_skeleton(config, folder.name)
        self.paths = list(experts_modules(self.skeleton, folder.name))
        fewer = {name: tuple(value.shape) for name, value in self.skeleton_of(n - 1).state_dict().items()}
        self.router = {name: self._layer_of(name) for name, value in self.skeleton.state_dict().items()
                       if self._layer_of(name) is not None and not self._is_expert(name)
                       and tuple(value.shape) != fewer.get(name, ())}
        if any(self.skeleton.state_dict()[name].shape[0] != n for name in self.router):
            raise UserError(f"The router of {folder.name} has no row for each expert; make a specialist of another "
                            "model.")
        size = 3 * self.manifest.neurons * self.manifest.hidden * 4
        self.expert = lru_cache(max(1, DECODED_BYTES // size))(self._decoded)

    def config_of(self, experts: int):
        """The configuration of a specialist of so many experts."""
        config = copy.deepcopy(self._config)
        for name in EXPERTS:
            if getattr(config, name, None) == self.manifest.experts:
                setattr(config, name, experts)
        return config

    def skeleton_of(self, experts: int) -> torch.nn.Module:
        """UserError where the configuration does not say how many experts there are in a way that is known."""
        skeleton = build_skeleton(self.config_of(experts), self.folder.name)
        found = next(iter(experts_modules(skeleton, self.folder.name).values())).down_proj.shape[0]
        if found != experts:
            raise UserError(f"How {self.folder.name} numbers its experts is not known here; make a specialist of "
                            "another model.")
        return skeleton

    def stored(self, name: str) -> dict[str, Tensor]:
        """A tensor of the trunk as it is stored: under its own name, or as codes and scales."""
        return {part: self.trunk.tensor(part) for part in (name, name + CODES, name + SCALES) if part in self.trunk}

    def values(self, name: str) -> Tensor:
        """A tensor of the trunk, decoded."""
        parts = self.stored(name)
        return decode(parts[name + CODES], parts[name + SCALES]) if name + CODES in parts else parts[name]

    def rows(self) -> list[Tensor]:
        """The matrix of every layer's router [E, H], in order of depth."""
        found = {layer: self.values(name) for name, layer in self.router.items()
                 if self.skeleton.state_dict()[name].dim() == 2}
        return [found[layer] for layer in range(self.manifest.layers)]

    def _decoded(self, layer: int, expert: int) -> Tensor:
        """float32 [3, I, H]: gate, up, down."""
        made = torch.empty(3, self.manifest.neurons, self.manifest.hidden)
        self.far.decode(layer, expert, *made)
        return made

    def _layer_of(self, name: str) -> int | None:
        """The MoE layer in whose block a tensor of the trunk lies."""
        return next((i for i, path in enumerate(self.paths) if name.startswith(path.rpartition(".")[0] + ".")), None)

    def _is_expert(self, name: str) -> bool:
        return any(name.startswith(path + ".") for path in self.paths)


class MixedModel:
    """transformers' model of `experts` experts a layer, in place of a runtime behind its experts modules: `take` a
    mixture of as many, then call `model`."""

    def __init__(self, source: Source, experts: int) -> None:
        self.source, self.model = source, _opened(source, experts)
        self.experts, self.hidden = experts, source.manifest.hidden  # what a layer asks of far memory, with `biases`
        self._tensors = self.model.state_dict()

    def take(self, mixture: Mixture) -> None:
        """From now on these are the experts, and this the router."""
        assert mixture.shape[1] == self.experts
        self.mixture = mixture
        for name, rows in routers_of(self.source, mixture):
            self._tensors[name].copy_(rows)
        for index, path in enumerate(self.source.paths):
            module: FloeExperts = self.model.get_submodule(path)
            module.runtime, module.layer = self, layer_experts(self.model, path, index, self, "cpu")

    def biases(self, layer: int) -> dict[str, Tensor]:
        return {name: self.mixture.experts[layer] @ own for name, own in self.source.far.biases(layer).items()}

    def forward(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """In place of `Runtime.forward`."""
        return expert_by_expert(x, ids, weights, lambda j, rows: self.whole(layer, j, rows))

    def whole(self, layer: LayerExperts, j: int, x: Tensor) -> Tensor:
        """One expert: x [n, H] -> [n, H], before the router's weight."""
        gate, up, down = matrices_of(self.source, self.mixture, layer.index, j)
        return layer.whole(x, layer.join(gate.T, up.T).T, down, j)


def matrices_of(source: Source, mixture: Mixture, layer: int, j: int) -> Tensor:
    """Expert j of a mixture: float32 [3, I, H], gate, up, down. Not to be written to."""
    own = mixture.single(layer, j)
    if own is not None:
        return source.expert(layer, own)
    parts = mixture.experts[layer, j]
    return sum(share * source.expert(layer, i) for i, share in enumerate(parts.tolist()) if share)


def routers_of(source: Source, mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
    """The trunk's tensors with a row for each expert, float32, as a mixture has them."""
    for name, layer in source.router.items():
        values = source.values(name).float()
        yield name, (mixture.router[layer] @ values.flatten(1) if values.dim() > 1
                     else mixture.router[layer] @ values).view(-1, *values.shape[1:])


def _opened(source: Source, experts: int) -> torch.nn.Module:
    """With the folder's trunk, in its codes; the router's rows are still to come."""
    skeleton = source.skeleton_of(experts)
    weights = {}
    for name, value in skeleton.state_dict().items():
        weights |= {name: torch.zeros(value.shape)} if name in source.router else source.stored(name)
    return type(skeleton).from_pretrained(None, config=source.config_of(experts), state_dict=weights,
                                          dtype=torch.float32, quantization_config=UnboundConfig()).eval()
