"""An uncompressed checkpoint, whatever its layout on disk, as canonical expert layers and trunk tensors.

Canonical means: gate, up and down all [experts, neurons, hidden], so that row n of each belongs to neuron n (for down
it is column n of the usual matrix). Names and merging come from transformers' conversion mapping
(engine/files/key_map.py), bytes from any `TensorSource`; MXFP4 and block-fp8 sources are decoded on the way. One layer,
one expert or one trunk tensor is in memory at a time, and the rest stays in the memory-mapped files. transformers' code
is the only code that runs: a checkpoint that brings its own is refused.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch

from engine.core import ModelSpec, UserError
from engine.files.dequantize import Dequantized
from engine.files.key_map import Group, KeyMap
from engine.files.skeleton import build_skeleton, experts_modules, model_spec, read_config, text_config_of
from engine.files.tensor_source import SafetensorsFolder, TensorSource

Tensor = torch.Tensor


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer, or some of them. Shapes: E experts, I neurons, H hidden; dtype as in the checkpoint.

    gate, up, down [E, I, H]; gate_bias, up_bias [E, I]; down_bias [E, H]; post_norm: weight of the norm after every
    expert, shared by all [H]. Tensors may be strided views of a memory-mapped file: copy before changing them.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.gate.shape == self.up.shape == self.down.shape, (self.gate.shape, self.up.shape, self.down.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, neurons, hidden."""
        return tuple(self.gate.shape)


class Checkpoint:
    """Read access to one checkpoint. Build it with `open(folder)`, or from any source of named tensors.

    expert_layers: names of the routed-experts modules in order of depth. skeleton: the model on the meta device.
    left_out: parts of the checkpoint that the text model has no place for, in words. warning: what a user
    should know of weights that config.json does not speak of truly, "" mostly; found by `whole`. copies: see
    `arriving`.
    """

    warning = ""
    copies: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config, source: TensorSource, name: str = "model") -> None:
        self.name = name
        self.source = Dequantized(source)
        self.text_config = text_config_of(config)
        self.skeleton = build_skeleton(self.text_config, name)
        self._experts = experts_modules(self.skeleton, name)
        self.expert_layers = list(self._experts)
        self.map = KeyMap(self.skeleton, self.source.keys(), config.model_type)
        self._shapes = {key: tuple(value.shape) for key, value in self.skeleton.state_dict().items()}
        self.left_out = self.map.left_out_summary()
        self._refuse_gaps()

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """UserError, in one sentence, for anything that is not a Mixture-of-Experts checkpoint in safetensors."""
        folder = Path(folder)
        checkpoint = cls.whole(read_config(folder), SafetensorsFolder(folder), folder.name)
        if not checkpoint.spec.table_bytes:
            checkpoint.read_expert(0, 0)
        return checkpoint

    @classmethod
    def whole(cls, config, source: TensorSource, name: str) -> Checkpoint:
        """Of weights that are all here: a head that is stored is used even where config.json ties it to the embedding,
        as transformers does. UserError for shapes that are not config.json's."""
        checkpoint = cls(config, source, name)
        checkpoint.check_shapes()
        if own := [head for head in checkpoint._stored_twice() if checkpoint._differs(head)]:
            checkpoint = cls(_untied(config), source, name)
            checkpoint.check_shapes()
            checkpoint.warning = own_values(own)
        return checkpoint

    @classmethod
    def arriving(cls, config, source: TensorSource, name: str) -> Checkpoint:
        """Of weights that are still to come. A parameter that config.json ties to another one, and that is stored all
        the same, has a place of its own and stands in `copies`, name -> the other's name, until both are here."""
        checkpoint = cls(config, source, name)
        if copies := checkpoint._stored_twice():
            checkpoint = cls(_untied(config), source, name)
            checkpoint.copies = copies
        return checkpoint

    def check_shapes(self) -> None:
        """UserError if a tensor that is stored as the model wants it has another shape. Reads no weights."""
        for group in self.map.groups:
            if group.converter is None:
                self._check_shape(group.targets[0], self.source.shape(group.keys[0]), self._shapes[group.targets[0]])

    @cached_property
    def spec(self) -> ModelSpec:
        return model_spec(self.name, self.skeleton, self._experts)

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the files: what `read_expert` reads."""
        module = self.expert_layers[0]
        keys = {key for name in self._expert_parameters(module) for key in self.map.of[name].keys}
        return sum(map(self.source.stored_bytes, keys)) // self._experts[module].down_proj.shape[0]

    def layer_keys(self, i: int) -> list[str]:
        """Keys of the source that make layer i, scales included: what must have arrived before it can be read."""
        parameters = self._expert_parameters(self.expert_layers[i])
        plain = {key for name in parameters for key in self.map.of[name].keys}
        return sorted(part for key in plain for part in self.source.parts(key))

    def read_layer(self, i: int, experts: range | None = None) -> ExpertLayer:
        """The experts of MoE layer i (0 is the first that has experts), or a contiguous range of them."""
        name = self.expert_layers[i]
        module = self._experts[name]
        experts = experts if experts is not None else range(module.down_proj.shape[0])
        parts = {parameter.removeprefix(name + "."): self._read(parameter, experts)
                 for parameter in self._expert_parameters(name)}
        post_norm = self._post_norm(name) if getattr(module, "has_post_expert_norm", False) else None
        return canonical(module, parts, post_norm)

    def read_expert(self, i: int, e: int) -> ExpertLayer:
        """Expert e of MoE layer i alone, [1, I, H], reading its own bytes only where the layout allows."""
        return self.read_layer(i, range(e, e + 1))

    def trunk(self) -> Iterator[tuple[str, Tensor]]:
        """Everything but the routed experts as (parameter name, tensor), one conversion at a time, tied ones once."""
        for group in self.trunk_groups():
            yield from self.read_group(group).items()

    def trunk_groups(self) -> list[Group]:
        """The conversions that make the trunk; `group.keys` says what each of them reads."""
        experts = {name for module in self.expert_layers for name in self._expert_parameters(module)}
        skipped = experts | set(self.map.tied())
        return [group for group in self.map.groups if not skipped.issuperset(group.targets)]

    def read_group(self, group: Group) -> dict[str, Tensor]:
        """Parameter name -> tensor of one conversion, whole."""
        tensors = {pattern: [self.source.get(key) for key in keys] for pattern, keys in group.sources.items()}
        made = self.map.convert(group, tensors)
        for parameter, value in made.items():
            self._check_shape(parameter, value.shape, self._shapes[parameter])
        return made

    def _stored_twice(self) -> dict[str, str]:
        """Parameters that config.json ties to another one and that are stored all the same: mostly a copy of it."""
        return {name: first for name, first in self.map.tied().items() if name in self.map.of}

    def _differs(self, name: str) -> bool:
        """Whether a tied parameter is stored with other values than the one it is tied to."""
        first = self.map.tied()[name]
        own, other = (self.read_group(self.map.of[each])[each] for each in (name, first))
        return not torch.equal(own, other)

    def _expert_parameters(self, name: str) -> list[str]:
        return [f"{name}.{own}" for own, _ in self._experts[name].named_parameters(recurse=False)]

    def _read(self, parameter: str, experts: range) -> Tensor:
        group, (n_experts, *matrix) = self.map.of[parameter], self._shapes[parameter]
        if group.keeps_experts_apart:
            tensors = {pattern: self._of_experts(keys, experts, n_experts) for pattern, keys in group.sources.items()}
            value = self.map.convert(group, tensors)[parameter]
        else:
            value = self.read_group(group)[parameter][experts.start:experts.stop]
        self._check_shape(parameter, value.shape, (len(experts), *matrix))
        return value

    def _check_shape(self, parameter: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(found) != tuple(expected):
            raise UserError(f"{self.name}: {parameter} has the shape {tuple(found)}, but config.json says "
                            f"{tuple(expected)}; config and weights do not belong together.")

    def _of_experts(self, keys: list[str], experts: range, n_experts: int) -> list[Tensor]:
        if len(keys) == n_experts and (n_experts > 1 or len(self.source.shape(keys[0])) == 2):
            return [self.source.get(keys[e]) for e in experts]
        return [self.source.get_slice(keys[0], experts.start, experts.stop)]

    def _post_norm(self, name: str) -> Tensor:
        parameter = f"{name}.post_expert_norm.weight"
        return self.read_group(self.map.of[parameter])[parameter]

    def _refuse_gaps(self) -> None:
        missing = self.map.missing()
        for module in self.expert_layers:
            missing += [name for name in self._expert_parameters(module)
                        if name in self.map.of and not self._complete(name)]
        if missing:
            refuse_foreign(self.name, set(self.source.keys()))
            raise UserError(f"{self.name} is incomplete: {len(missing)} tensors are missing, the first is "
                            f"{missing[0]}; download the checkpoint again.")

    def _complete(self, parameter: str) -> bool:
        group = self.map.of[parameter]
        if group.converter is None:
            return True
        n_experts = self._shapes[parameter][0]
        return (len(group.sources) == len(group.converter.source_patterns)
                and all(len(keys) in (1, n_experts) for keys in group.sources.values()))


def own_values(names: Iterable[str]) -> str:
    return (f"config.json ties {', '.join(names)} to another tensor, but the weights hold values of its own; these are "
            "used, as transformers does.")


def _untied(config):
    config.tie_word_embeddings = text_config_of(config).tie_word_embeddings = False
    return config


def refuse_foreign(name: str, keys: set[str]) -> None:
    """UserError for weights in the codes of another program, by the names that these have."""
    kinds = {"NVFP4": ".weight_scale_2", "GPTQ or AWQ": ".qweight", "MLX": ".scales"}
    for kind, ending in kinds.items():
        if any(key.endswith(ending) for key in keys):
            raise UserError(f"{name} is quantised for {kind}, which is not read here; take the unquantised checkpoint, "
                            "or a GGUF file.")


def canonical(module, parts: dict[str, Tensor], post_norm: Tensor | None = None) -> ExpertLayer:
    """A module's own parameters (some leading experts) to canonical shape, by the module's own flags. Views only."""
    gate_up, down = parts["gate_up_proj"], parts["down_proj"]
    if module.is_transposed:                        # [E, H, 2I] and [E, I, H]
        gate_up = gate_up.transpose(1, 2)
    else:                                           # [E, 2I, H] and [E, H, I]
        down = down.transpose(1, 2)
    gate, up = _halves(module, gate_up)
    gate_bias = up_bias = None
    if module.has_bias:
        gate_bias, up_bias = _halves(module, parts["gate_up_proj_bias"])
    return ExpertLayer(gate, up, down, gate_bias, up_bias, parts.get("down_proj_bias"), post_norm)


def _halves(module, both: Tensor) -> tuple[Tensor, Tensor]:
    if module.is_concatenated:
        gate, up = both.chunk(2, dim=1)
        return gate, up
    return both[:, 0::2], both[:, 1::2]
