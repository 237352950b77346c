"""A GGUF file (or its parts) as a source of named tensors, like a checkpoint folder: decoded one tensor at a time.

Decodes with the `gguf` package, an extra; the file is memory-mapped, of stacked experts only the wanted ones are
decoded, and a large matrix is decoded some rows at a time. Keys are the parameters of the transformers model
(engine/files/gguf/names.py). The configuration comes from the original's config.json; the file's own numbers must
agree.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from engine.core import UserError
from engine.files.gguf.header import GgufHeader, joined, read_header
from engine.files.gguf.names import ARCHITECTURES, Shape, recipes

Tensor = torch.Tensor
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = (*FLOATS, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4",
         "NVFP4", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL",
         "IQ4_XS")
# Beside what is NVFP4: a scale of the whole tensor, or one of each expert; what its inputs were scaled by is not used.
SCALES = (".scale", ".input_scale")
# Numbers of the file that must be those of the configuration, where both have them.
NUMBERS = {"embedding_length": "hidden_size", "expert_used_count": "num_experts_per_tok",
           "attention.head_count": "num_attention_heads"}
# One tensor per expert, as converters of 2023 wrote Mixtral; read as if it were stacked.
SINGLE_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight$")
DECODED_AT_ONCE = 1 << 24       # weights; their float32 and the package's temporaries are a few hundred megabytes


class GgufSource:
    """`TensorSource` over one GGUF model, all of its parts `joined`. name: in sentences. config: transformers'
    configuration of the language model. left_out: tensors of the file that the model has no place for. texts: some of
    the metadata (`GgufHeader`).

    UserError for another architecture, an unknown kind of quantisation, a configuration of another model.
    """

    def __init__(self, name: str, header: GgufHeader, config) -> None:
        self.name, self.texts = name, header.texts
        self.architecture = self.texts["general.architecture"][:40]
        _check(self.name, self.architecture, header.fields, config)
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._check_tensors(header.fields.get("split.tensors.count"))
        self._stacks = _stacks(self._tensors)
        stacked = {name for names in self._stacks.values() for name in names}
        names = [name for name in self._tensors if name not in stacked]
        self._recipes, left_out = recipes(self.architecture, [*names, *self._stacks], Shape.of(config))
        self.left_out = [name for name in left_out if not self._is_scale(name)]

    @classmethod
    def open(cls, paths: Iterable[Path], config) -> GgufSource:
        """The parts of one model, in order. UserError also for a damaged file and for the missing package."""
        paths = list(paths)
        return cls(paths[0].name, joined([read_header(path) for path in paths]), config)

    def keys(self) -> Iterable[str]:
        return self._recipes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._empty(key).shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._empty(key).dtype

    def stored_bytes(self, key: str) -> int:
        return sum(self._tensors[own].data.nbytes for name in self._recipes[key].parts
                   for own in self._stacks.get(name, (name,)))

    def get(self, key: str) -> Tensor:
        """Floats as they are stored; what was quantised as bfloat16 (experts as float32: see `get_slice`)."""
        recipe = self._recipes[key]
        return recipe.make(*(self._read(name, self._decoded_dtype(key)) for name in recipe.parts))

    def get_slice(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of the first axis; of stacked experts only these are decoded, in float32: they are quantised again."""
        recipe = self._recipes[key]
        if not recipe.by_expert:
            return self.get(key)[start:stop]
        return recipe.make(*(self._read(name, torch.float32, start, stop) for name in recipe.parts))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """How the experts' weights are stored: Q4_K, MXFP4, ..."""
        return tuple(sorted({self._kind(name) for recipe in self._recipes.values() if recipe.by_expert
                             for name in recipe.parts if name.endswith("weight")}))

    def _empty(self, key: str) -> Tensor:
        """The parameter made from tensors without memory: how shape and dtype are found."""
        decoded = self._decoded_dtype(key)
        return self._recipes[key].make(*(torch.empty(self._shape(name), dtype=FLOATS.get(self._kind(name), decoded),
                                                     device="meta") for name in self._recipes[key].parts))

    def _decoded_dtype(self, key: str) -> torch.dtype:
        return torch.float32 if self._recipes[key].by_expert else torch.bfloat16

    def _kind(self, name: str) -> str:
        return self._tensors[self._stacks.get(name, (name,))[0]].kind

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._stacks:
            return len(self._stacks[name]), *self._shape(self._stacks[name][0])
        return self._tensors[name].shape[::-1]

    def _read(self, name: str, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of one tensor of the file; dtype: of what has to be decoded."""
        if name in self._stacks:
            return torch.stack([self._read(own, dtype) for own in self._stacks[name][start:stop]])
        tensor = self._tensors[name]
        try:
            made = _decoded(tensor.data[start:stop], tensor.kind, dtype)
            return made if tensor.kind != "NVFP4" else self._scaled(name, made, start, stop)
        except (ValueError, IndexError) as error:
            raise UserError(f"The tensor {name} of {self.name} cannot be decoded ({error}); get the file "
                            "again.") from error

    def _is_scale(self, name: str) -> bool:
        """Of a tensor that is NVFP4."""
        owner = self._tensors.get(re.sub(r"\.(input_)?scale$", ".weight", name))
        return name.endswith(SCALES) and owner is not None and owner.kind == "NVFP4"

    def _scaled(self, name: str, made: Tensor, start: int, stop: int | None) -> Tensor:
        scale = self._tensors.get(name.removesuffix(".weight") + SCALES[0])
        if scale is None or any(scale.name in recipe.parts for recipe in self._recipes.values()):  # Gemma 4's router
            return made
        values = _decoded(scale.data, scale.kind, torch.float32).flatten()
        if len(values) > 1:
            values = values[start:stop].view(-1, *[1] * (made.dim() - 1))
        return (made.float() * values).to(made.dtype)

    def _check_tensors(self, promised) -> None:
        if isinstance(promised, int) and promised not in (0, len(self._tensors)):
            raise UserError(f"The parts of {self.name} hold {len(self._tensors)} tensors instead of {promised}; they "
                            "do not belong together, get them again.")
        for name, tensor in self._tensors.items():
            if tensor.kind not in TYPES:
                raise UserError(f"{self.name} holds {name} as {tensor.kind}, which is not imported; get a "
                                "file in Q4_K_M, IQ4_XS, Q5_K_M, Q6_K, Q8_0, MXFP4, F16 or BF16.")


def refuse_unknown(name: str, architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{name} is of the architecture {architecture or 'unknown'}, which is not imported; these are: "
                        f"{known}. Take the original checkpoint instead.")


def _check(name: str, architecture: str, fields: dict, config) -> None:
    """UserError for an architecture without a table, or numbers that are not the configuration's."""
    refuse_unknown(name, architecture)
    if config.model_type not in ARCHITECTURES[architecture]:
        raise UserError(f"{name} is of the architecture {architecture}, but the configuration describes "
                        f"{config.model_type}; give the original that the file was made from.")
    for key, attribute in NUMBERS.items():
        found, wanted = fields.get(f"{architecture}.{key}"), getattr(config, attribute, None)
        if isinstance(found, int) and wanted and found != int(wanted):
            raise UserError(f"{name} says {key} is {found}, the configuration says {wanted}; give the original that "
                            "the file was made from.")


def _stacks(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name of the stacked tensor -> the tensors of single experts that make it, in order."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        match = SINGLE_EXPERT.match(name)
        if match:
            found.setdefault(f"{match[1]}_exps.weight", {})[int(match[2])] = name
    return {stack: tuple(own[e] for e in sorted(own)) for stack, own in found.items()}


def _decoded(data: np.ndarray, kind: str, dtype: torch.dtype) -> Tensor:
    """data: what the file holds, quantised rows as bytes -> floats as they are, all else in `dtype`."""
    if kind in FLOATS:
        bits = data.view(np.int16) if kind == "BF16" else data
        return torch.from_numpy(bits.copy()).view(FLOATS[kind])
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize
    kind = GGMLQuantizationType[kind]
    block, n_bytes = GGML_QUANT_SIZES[kind]
    width = data.shape[-1] // n_bytes * block
    rows = data.reshape(-1, data.shape[-1])
    made = torch.empty(len(rows), width, dtype=dtype)
    step = max(1, DECODED_AT_ONCE // max(1, width))
    for at in range(0, len(rows), step):
        made[at:at + step] = torch.from_numpy(dequantize(rows[at:at + step], kind))
    return made.view(*data.shape[:-1], width)
