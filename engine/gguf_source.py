"""A GGUF file (or its parts) as a source of named tensors, like a checkpoint folder: dequantised one tensor at a time.

Reads with the `gguf` package, an extra; the file is memory-mapped, and of stacked experts only the wanted ones are
decoded. Keys are the parameters of the transformers model (engine/gguf_names.py). The configuration comes from the
original's config.json; the file's own numbers must agree with it.
"""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from engine.gguf_names import ARCHITECTURES, Shape, recipes
from engine.spec import UserError

Tensor = torch.Tensor
MAGIC = b"GGUF"
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
FLOATS = {"F32": torch.float32, "F16": torch.float16}
# Numbers of the file that must be those of the configuration, where both have them.
NUMBERS = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size", "expert_used_count":
           "num_experts_per_tok", "attention.head_count": "num_attention_heads"}


class GgufSource:
    """`TensorSource` over the parts of one GGUF model. config: transformers' configuration of the language model.

    left_out: tensors of the file that the model has no place for. UserError for another architecture, an unknown kind
    of quantisation, a damaged file, a configuration of another model.
    """

    def __init__(self, paths: Iterable[Path], config) -> None:
        self._readers = [_reader(path) for path in paths]
        self.name = Path(next(iter(paths))).name
        self.architecture = _text(self._readers[0], "general.architecture")
        _check(self.name, self.architecture, self._readers[0], config)
        self._tensors = {tensor.name: tensor for reader in self._readers for tensor in reader.tensors}
        self._refuse_unknown()
        self._recipes, self.left_out = recipes(self.architecture, self._tensors, Shape.of(config))

    def keys(self) -> Iterable[str]:
        return self._recipes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Of what `get` returns; found by making the parameter from empty tensors."""
        parts = [torch.empty(self._shape(name), device="meta") for name in self._recipes[key].parts]
        return tuple(self._recipes[key].make(*parts).shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.get_slice(key, 0, 1).dtype if self._recipes[key].by_expert else self.get(key).dtype

    def stored_bytes(self, key: str) -> int:
        return sum(int(self._tensors[name].n_bytes) for name in self._recipes[key].parts)

    def get(self, key: str) -> Tensor:
        """Floats as they are stored; what was quantised as bfloat16."""
        recipe = self._recipes[key]
        made = recipe.make(*(self._read(name) for name in recipe.parts))
        return made if all(self._kind(name) in FLOATS for name in recipe.parts) else made.to(torch.bfloat16)

    def get_slice(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of the first axis; of stacked experts only these are decoded, in float32 (they are quantised again)."""
        recipe = self._recipes[key]
        if not recipe.by_expert:
            return self.get(key)[start:stop]
        return recipe.make(*(self._read(name, start, stop) for name in recipe.parts))

    def kinds(self) -> set[str]:
        """How the experts' weights are stored: Q4_K, MXFP4, ..."""
        return {self._kind(name) for recipe in self._recipes.values() if recipe.by_expert for name in recipe.parts
                if name.endswith("weight")}

    def _kind(self, name: str) -> str:
        return self._tensors[name].tensor_type.name

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        from gguf.quants import dequantize
        tensor = self._tensors[name]
        try:
            data = tensor.data[start:stop]
            if self._kind(name) in FLOATS:
                return torch.from_numpy(data.copy())
            return torch.from_numpy(dequantize(data, tensor.tensor_type).copy())
        except (ValueError, IndexError, NotImplementedError) as error:
            raise UserError(f"The tensor {name} of {self.name} cannot be decoded ({error}); get the file "
                            "again.") from error

    def _refuse_unknown(self) -> None:
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name not in TYPES:
                raise UserError(f"{self.name} holds {name} as {tensor.tensor_type.name}, which is not imported; get a "
                                "file in Q4_K_M, Q5_K_M, Q6_K, Q8_0, MXFP4, F16 or BF16.")
        if any(".ffn_gate.0." in name for name in self._tensors):
            raise UserError(f"{self.name} has one tensor per expert, as old converters wrote it; get a file that was "
                            "made since 2024.")


def _reader(path: Path):
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("Reading GGUF files needs the package gguf: pip install gguf.") from error
    try:
        with Path(path).open("rb") as file:
            if file.read(4) != MAGIC:
                raise UserError(f"{path} is not a GGUF file.")
        return GGUFReader(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is damaged or incomplete ({error}); get it again.") from error


def _text(reader, key: str) -> str:
    field = reader.get_field(key)
    return str(field.contents()) if field else ""


def _check(name: str, architecture: str, reader, config) -> None:
    """UserError for an architecture without a table, or numbers that are not the configuration's."""
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{name} is of the architecture {architecture or 'unknown'}, which is not imported; these are: "
                        f"{known}. Take the original checkpoint instead.")
    if config.model_type not in ARCHITECTURES[architecture]:
        raise UserError(f"{name} is of the architecture {architecture}, but the configuration describes "
                        f"{config.model_type}; give the original that the file was made from.")
    for key, attribute in NUMBERS.items():
        field, wanted = reader.get_field(f"{architecture}.{key}"), getattr(config, attribute, None)
        if field and wanted and key != "block_count" and int(field.contents()) != int(wanted):
            raise UserError(f"{name} says {key} is {field.contents()}, the configuration says {wanted}; give the "
                            "original that the file was made from.")
