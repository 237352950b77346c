"""The table of a Mixture of Lookup Experts: made of the training form block by block, and mapped from a folder.

The row of a token is what all experts of all layers give for it, float16 [layer, expert, hidden], and rows lie one
behind the other: the row of a token begins at token * layers * experts * hidden * 2 bytes. In the file a tensor is a
block of rows, named by its first token.
"""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from engine.core import ModelSpec, UserError
from engine.files.checkpoint import Checkpoint
from engine.files.compressed import MappedFile
from engine.files.lookup.modeling import ROW_TYPE
from engine.files.manifest import TABLE, Manifest
from engine.files.tensor_source import DTYPES

Tensor = torch.Tensor
BLOCK_BYTES = 128 << 20  # each reads the weights of all experts once more
EMBEDDING = "model.embed_tokens.weight"


def blocks(spec: ModelSpec) -> list[range]:
    """The tokens of each block."""
    step = max(1, BLOCK_BYTES // spec.token_table_bytes)
    return [range(first, min(first + step, spec.vocabulary)) for first in range(0, spec.vocabulary, step)]


def block_name(tokens: range) -> str:
    return f"rows.{tokens.start}"


def table_keys(checkpoint: Checkpoint) -> list[str]:
    """Tensors of the training form that a row is made of. UserError for one that is missing."""
    spec, there = checkpoint.spec, set(checkpoint.source.keys())
    wanted = [EMBEDDING, *(key for layer in range(spec.layers) for key in (
        _norm(layer), *(key for expert in range(spec.experts) for key in _expert(layer, expert))))]
    if missing := [key for key in wanted if key not in there]:
        raise UserError(f"{checkpoint.name} is incomplete: {len(missing)} tensors are missing, the first is "
                        f"{missing[0]}; take the training form of the model, whole.")
    return wanted


@torch.inference_mode()
def block(checkpoint: Checkpoint, tokens: range) -> Tensor:
    """ROW_TYPE [tokens, layers * experts * hidden]: expert j of a layer gives down(gelu(up x)), x the token's embedding
    under the layer's own norm. UserError for tensors of other shapes and for numbers that float16 does not hold."""
    spec, source = checkpoint.spec, checkpoint.source
    embedded = source.get_slice(EMBEDDING, tokens.start, tokens.stop).float()
    out = torch.empty(len(tokens), spec.layers, spec.experts, spec.hidden, dtype=ROW_TYPE)
    for layer in range(spec.layers):
        norm = _read(checkpoint, _norm(layer), (spec.hidden,))
        x = F.rms_norm(embedded, (spec.hidden,), norm, checkpoint.text_config.rms_norm_eps)
        for expert in range(spec.experts):
            up, down = _expert(layer, expert)
            h = F.gelu(F.linear(x, _read(checkpoint, up, (spec.neurons, spec.hidden))))
            out[:, layer, expert] = F.linear(h, _read(checkpoint, down, (spec.hidden, spec.neurons)))
    if not out.isfinite().all():
        raise UserError(f"{checkpoint.name} has experts whose results 16 bits do not hold; get an intact checkpoint.")
    return out.flatten(1)


def open_table(folder: Path, manifest: Manifest) -> Tensor:
    """ROW_TYPE [V, layers * experts * hidden], a view of the file. UserError for a file of other blocks."""
    file = MappedFile(folder / TABLE)
    entries = sorted((entry["data_offsets"], entry["dtype"], entry["shape"], name)
                     for name, entry in file.header.items() if name != "__metadata__")
    width, at, rows = manifest.layers * manifest.experts * manifest.hidden, 0, 0
    for (low, high), dtype, shape, name in entries:
        if (name, low, shape[1:]) != (f"rows.{rows}", at, [width]) or DTYPES.get(dtype) != ROW_TYPE:
            raise UserError(f"{file.path} is damaged; download or compress the model again.")
        at, rows = high, rows + shape[0]
    return file.flat(ROW_TYPE, at).view(rows, width)


def _norm(layer: int) -> str:
    return f"model.layers.{layer}.expert_layernorm.weight"


def _expert(layer: int, expert: int) -> tuple[str, str]:
    return tuple(f"model.layers.{layer}.experts.{expert}.{part}_proj.weight" for part in ("up", "down"))


def _read(checkpoint: Checkpoint, key: str, shape: tuple[int, ...]) -> Tensor:
    """float32"""
    value = checkpoint.source.get(key)
    if tuple(value.shape) != shape:
        raise UserError(f"{checkpoint.name}: {key} has the shape {tuple(value.shape)}, but config.json says {shape}; "
                        "config and weights do not belong together.")
    return value.float()
