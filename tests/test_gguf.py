"""GGUF files made with the gguf package: every parameter comes back, quantised experts within their error."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.compress import compress
from engine.fetch import Choice, download
from engine.format import TRUNK, Manifest, MappedFile
from engine.gguf_import import cost, import_gguf, parts_of
from engine.gguf_source import TYPES, GgufSource
from engine.hub import Hub
from engine.skeleton import read_config
from engine.spec import UserError
from tests.architectures import build
from tests.folders import stored_experts
from tests.loopback_hub import LoopbackHub

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize  # noqa: E402

from tests.gguf_files import ARCHITECTURES, like, write  # noqa: E402

CHANGES = {"qwen3_moe": dict(moe_intermediate_size=64, num_experts=4)}


def file_of(kind: str, folder: Path, quantisation: str = "F32", **changes) -> tuple[torch.nn.Module, Path, Path]:
    model = build(kind, **CHANGES.get(kind, {}) | changes)
    write(folder / "model.gguf", kind, model, quantisation)
    return model, folder / "model.gguf", like(folder / "like", model)


def opened(path: Path, folder: Path) -> Checkpoint:
    config = read_config(folder)
    return Checkpoint(config, GgufSource([path], config), "gguf")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_parameter_comes_back(kind, tmp_path):
    model, path, folder = file_of(kind, tmp_path)
    checkpoint = opened(path, folder)
    checkpoint.check_shapes()
    found = dict(checkpoint.trunk())
    expected = model.state_dict()
    assert found.keys() == {name for name in expected if ".experts." not in name}
    assert GgufSource([path], checkpoint.text_config).left_out == []
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-5, atol=1e-6, msg=name)
    model.save_pretrained(tmp_path / "saved")
    original = Checkpoint.open(tmp_path / "saved")
    for layer in range(checkpoint.spec.layers):
        for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
            one, other = (getattr(c.read_expert(layer, 1), name) for c in (checkpoint, original))
            assert (one is None and other is None) or torch.equal(one, other), name


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_experts_are_decoded_as_the_package_does(quantisation, tmp_path):
    model, path, folder = file_of("qwen3_moe", tmp_path, quantisation)
    checkpoint = opened(path, folder)
    gate_up = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_gate_exps.weight")
    expected = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
    found = torch.cat([checkpoint.read_expert(1, e).gate for e in range(4)])
    assert torch.equal(found.float(), expected.float())
    error = (found.float() - gate_up[:, :64]).norm() / gate_up[:, :64].norm()
    assert 0 < error < {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.01, "Q4_0": 0.15, "Q5_1": 0.06}[quantisation]


@pytest.mark.parametrize("quantisation", sorted({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"}))
def test_kinds_that_the_package_only_decodes(quantisation, tmp_path):
    """Random blocks of the kind in the place of one layer's experts."""
    kind = getattr(gguf.GGMLQuantizationType, quantisation)
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    model = build("qwen3_moe", hidden_size=256, moe_intermediate_size=256, num_experts=4, num_hidden_layers=1)
    raw = np.random.default_rng(0).integers(1, 60, (4, 256, 256 // block * n_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "qwen3moe")
    for name in ("gate", "up", "down"):
        writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource([tmp_path / "k.gguf"], model.config)
    expected = torch.from_numpy(np.array(dequantize(raw, kind)))
    assert torch.equal(source.get_slice("model.layers.0.mlp.experts.down_proj", 1, 3), expected[1:3])
    both = source.get_slice("model.layers.0.mlp.experts.gate_up_proj", 2, 3)
    assert torch.equal(both, torch.cat((expected[2:3], expected[2:3]), 1))
    assert source.kinds() == {quantisation} and quantisation in TYPES


def test_import_makes_what_compress_makes_from_the_same_weights(tmp_path):
    model, path, folder = file_of("qwen3_moe", tmp_path)
    model.save_pretrained(tmp_path / "saved")
    compress(tmp_path / "saved", tmp_path / "a", device="cpu")
    said = []
    import_gguf(path, tmp_path / "b", folder, device="cpu", say=said.append)
    for layer in range(2):
        pair = (stored_experts(tmp_path / name, layer) for name in "ab")
        for one, other in zip(*pair, strict=True):
            assert torch.equal(one, other)
    one, other = MappedFile(tmp_path / "a" / TRUNK), MappedFile(tmp_path / "b" / TRUNK)
    for key in one.header.keys() - {"__metadata__"}:
        assert torch.equal(one.tensor(key), other.tensor(key)), key
    assert any("second time: that adds a relative weight error of gate" in sentence for sentence in said)


def test_the_warning_says_what_quantising_twice_costs(tmp_path):
    _, path, folder = file_of("qwen3_moe", tmp_path, "Q4_0")
    checkpoint = opened(path, folder)
    added = cost(checkpoint)
    assert set(added) == {"gate", "up", "down"}
    import_gguf(path, tmp_path / "made", folder, device="cpu")
    expert, stored = checkpoint.read_expert(0, 0), stored_experts(tmp_path / "made", 0)
    last, stored_last = checkpoint.read_expert(1, 0), stored_experts(tmp_path / "made", 1)
    for kind, one, other in zip(("gate", "up", "down"), stored, stored_last, strict=True):
        wanted = torch.stack((getattr(expert, kind)[0], getattr(last, kind)[0])).float()
        found = torch.stack((one[0], other[0]))
        assert added[kind] == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-4)
        assert 0.02 < added[kind] < 0.2


def test_other_architectures_are_refused_by_name(tmp_path):
    model = build("qwen3_moe", num_hidden_layers=1)
    for architecture, words in (("grok", "architecture grok, which is not imported; these are: deepseek2, gpt-oss"),
                                ("gpt-oss", "architecture gpt-oss, but the configuration describes qwen3_moe")):
        writer = gguf.GGUFWriter(tmp_path / f"{architecture}.gguf", architecture)
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=words):
            GgufSource([tmp_path / f"{architecture}.gguf"], model.config)


def test_damaged_foreign_and_mismatched_files(tmp_path):
    model, path, folder = file_of("qwen3_moe", tmp_path)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UserError, match="not a GGUF file"):
        GgufSource([tmp_path / "text.gguf"], model.config)
    data = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match="damaged or incomplete"):
        GgufSource([tmp_path / "cut.gguf"], model.config)
    with pytest.raises(UserError, match="embedding_length is 64, the configuration says 128"):
        GgufSource([path], build("qwen3_moe", hidden_size=128).config)


def test_parts_of_a_split_file(tmp_path):
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00003.gguf").touch()
    with pytest.raises(UserError, match="m-00003-of-00003.gguf is missing"):
        parts_of(tmp_path / "m-00001-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").touch()
    assert len(parts_of(tmp_path / "m-00002-of-00003.gguf")) == 3
    assert parts_of(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]


def test_downloaded_by_name_and_imported(tmp_path):
    _, path, folder = file_of("qwen3_moe", tmp_path, "Q8_0")
    with LoopbackHub() as loopback:
        loopback.add("me/Model-GGUF", {"Model-Q8_0.gguf": path.read_bytes(), "Model-Q4_K_M.gguf": b"x",
                                       **{p.name: p.read_bytes() for p in folder.iterdir()}})
        hub = Hub(loopback.endpoint)
        with pytest.raises(UserError, match="name one with --file"):
            download("me/Model-GGUF", source="gguf", data=tmp_path, hub=hub)
        texts = []
        found = download("me/Model-GGUF", source="gguf", data=tmp_path, hub=hub, file="Model-Q8_0.gguf",
                         choice=Choice(16, "cpu"), report=lambda progress: texts.append(progress.text))
    assert Manifest.load(found).experts == 4
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["Model-GGUF"]
    assert any("stored as Q8_0" in text for text in texts) and any("Compressing layer 2" in text for text in texts)
