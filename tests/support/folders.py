"""Folders for the tests: a small random model saved as a checkpoint with a tokenizer, and the same compressed."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from engine.core import Options
from engine.files.compressed import ExpertsFile
from engine.files.manifest import MANIFEST, Manifest, experts_name, file_entry
from engine.library.compress import compress
from engine.model.load import load
from kernels.planes import decode_down, decode_gate, decode_sketch, decode_up
from tests.support.architectures import build

Tensor = torch.Tensor


def write_tokenizer(folder: Path, apart: bool = False) -> None:
    """A word for each of 128 tokens: enough for `load`, which wants one. apart: it reads texts of such words."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    if apart:
        words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(folder)


def write_chat_parts(folder: Path) -> Path:
    """A tokenizer, and a template that says little."""
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def checkpoint(name: str, folder: Path, seed: int = 0, **changes) -> torch.nn.Module:
    """Save a random model of an architecture with its tokenizer; returns the model itself."""
    model = build(name, seed, **changes)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def compressed(name: str, folder: Path, trunk_bits: int = 16, seed: int = 0, **changes) -> tuple:
    """-> (the model, its checkpoint folder, its compressed folder)."""
    model = checkpoint(name, folder / "source", seed, **changes)
    compress(folder / "source", folder / "made", trunk_bits=trunk_bits, device="cpu")
    return model, folder / "source", folder / "made"


def edit(path: Path, **changes) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_format_1(folder: Path) -> Path:
    """As compressed folders were before their texts were listed: what stands in them is believed."""
    path = folder / MANIFEST
    raw = json.loads(path.read_text())
    raw.pop("checksum", None)
    listed = [entry for entry in raw["files"] if entry["path"].endswith(".safetensors")]
    path.write_text(json.dumps(raw | {"format_version": 1, "files": listed}))
    return folder


def listed_anew(folder: Path) -> Path:
    """The manifest for the files as they lie there now, as somebody would make it who made them so."""
    manifest = Manifest.load(folder)
    replace(manifest, files=tuple(file_entry(folder / entry.path) for entry in manifest.files)).save(folder)
    return folder


def stored_experts(folder: Path, layer: int, view: str = "fine") -> tuple[Tensor, Tensor, Tensor]:
    """gate, up, down float32 [E, I, H] as the experts file says; view "sketch" takes gate and up at 2 bits."""
    manifest = Manifest.load(folder)
    layout, blobs = manifest.layout, ExpertsFile(folder / experts_name(layer)).blobs
    found = []
    for blob in blobs:
        sketch = blob[:layout.neurons * layout.sketch_row].view(layout.neurons, layout.sketch_row)
        records = blob[layout.sketch_bytes:].view(layout.neurons, layout.record)
        if view == "sketch":
            gate, up = decode_sketch(sketch, layout)
        else:
            gate, up = decode_gate(sketch, records, layout), decode_up(sketch, records, layout)
        found.append([matrix[:, :layout.hidden] for matrix in (gate, up, decode_down(records, layout))])
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


@torch.no_grad()
def put_experts(module: torch.nn.Module, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Replace the weights of one of transformers' own experts modules; gate, up, down [E, I, H]."""
    both = torch.cat((gate, up), 1) if module.is_concatenated else torch.stack((gate, up), 2).flatten(1, 2)
    module.gate_up_proj.copy_(both.transpose(1, 2) if module.is_transposed else both)
    module.down_proj.copy_(down if module.is_transposed else down.transpose(1, 2))


@torch.no_grad()
def logits_by_steps(model: torch.nn.Module, tokens: Tensor, n_prefill: int) -> Tensor:
    """tokens [N] -> float32 [N, V]: the first n_prefill in one call, the others one by one with the cache."""
    out = model(tokens[None, :n_prefill], use_cache=True)
    rows, state = [out.logits[0]], out.past_key_values
    for token in tokens[n_prefill:]:
        out = model(token[None, None], past_key_values=state, use_cache=True)
        rows.append(out.logits[0])
    return torch.cat(rows).float()


@torch.no_grad()
def next_logits(folder: Path) -> Tensor:
    """What an opened folder says behind three tokens, float32 [V]."""
    return load(folder, Options("exact", device="cpu")).model(torch.tensor([[1, 2, 3]])).logits[0, -1].float()
