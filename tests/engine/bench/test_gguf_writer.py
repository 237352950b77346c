"""The file that llama.cpp is measured on holds the open model's own weights: our importer reads them back from it."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.bench.gguf_writer import write
from engine.core import Options, UserError
from engine.files.gguf.source import GgufSource
from engine.model.load import load
from engine.model.packed import plain
from tests.support import architectures, folders, small_model


def test_the_file_holds_the_same_weights(tmp_path: Path, demo_checkpoint: Path) -> None:
    _, compressed = small_model.make(tmp_path, demo_checkpoint)
    loaded = load(compressed, Options(level="exact", device="cpu"))
    far, model = loaded.runtime.far, loaded.model
    n_weights = write(tmp_path / "model.gguf", model, far)
    spec = loaded.spec
    assert n_weights == spec.trunk_params + spec.layers * spec.experts * spec.expert_params
    source, made = GgufSource.open([tmp_path / "model.gguf"], model.config), torch.empty(3, far.neurons, far.hidden)
    assert not source.left_out
    for key, value in model.state_dict(keep_vars=True).items():
        close(source.get(key), plain(value).detach())
    for layer in range(far.layers):
        gate_up, down = (source.get(f"model.layers.{layer}.mlp.experts.{part}_proj") for part in ("gate_up", "down"))
        for expert in range(far.experts):
            far.decode(layer, expert, *made)
            close(gate_up[expert], made[:2].flatten(0, 1))
            close(down[expert], made[2].T)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=float(expected.abs().max()) / 100)


def test_another_architecture_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folders.write_tokenizer(tmp_path)
    with pytest.raises(UserError, match="gpt_oss cannot be written for llama.cpp"):
        write(tmp_path / "model.gguf", architectures.build("gpt_oss", 0), None)
