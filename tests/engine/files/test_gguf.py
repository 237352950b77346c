"""GGUF files made with the gguf package: every parameter comes back, every kind is decoded, the result is the same."""
from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from engine.core import Options, UserError
from engine.files.checkpoint import Checkpoint
from engine.files.compressed import MappedFile
from engine.files.gguf.tokenizer import config_of
from engine.files.manifest import TRUNK, Manifest
from engine.files.skeleton import read_config
from engine.library.compress import compress
from engine.library.gguf_import import cost, import_gguf, parts_of
from engine.model import load
from tests.engine.library.test_compress import anonymous_bytes
from tests.support.architectures import build
from tests.support.folders import logits_by_steps, stored_experts, write_chat_parts

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize  # noqa: E402

from engine.files.gguf.source import TYPES, GgufSource  # noqa: E402
from tests.support.gguf_files import ARCHITECTURES, finish, like, write  # noqa: E402

CHANGES = {"qwen3_moe": dict(moe_intermediate_size=64, num_experts=4)}
SEEING = {"qwen3_moe": dict(norm_topk_prob=True)}   # which its seeing relative always does
MATRICES = ("gate", "up", "down")
TOKENS = torch.randint(3, 128, (9,), generator=torch.Generator().manual_seed(1))
K_KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FEW_BITS = ("NVFP4", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL",
            "IQ4_XS")


def file_of(kind: str, folder: Path, quantisation: str = "F32", **changes) -> tuple[torch.nn.Module, Path, Path]:
    """-> (the model, its GGUF file, a folder with its configuration and tokenizer)."""
    model = build(kind, **CHANGES.get(kind, {}) | changes)
    (path,) = write(folder / "model.gguf", kind, model, quantisation)
    return model, path, like(folder / "like", model)


def opened(path: Path, folder: Path, **changes) -> Checkpoint:
    config = read_config(folder)
    return Checkpoint(config, GgufSource.open(parts_of(path), config), "gguf")


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return write_chat_parts(folder)


def assert_same_experts(one: Checkpoint, other: Checkpoint) -> None:
    for layer in range(other.spec.layers):
        for name in (*MATRICES, "gate_bias", "up_bias", "down_bias"):
            a, b = (getattr(c.read_expert(layer, 1), name) for c in (one, other))
            assert (a is None and b is None) or torch.equal(a.float(), b.float()), name


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_parameter_comes_back(kind, tmp_path):
    model, path, folder = file_of(kind, tmp_path)
    checkpoint = opened(path, folder)
    checkpoint.check_shapes()
    found, expected = dict(checkpoint.trunk()), model.state_dict()
    assert found.keys() == {name for name in expected if ".experts." not in name} - set(checkpoint.map.tied())
    assert GgufSource.open([path], checkpoint.text_config).left_out == []
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-5, atol=1e-6, msg=name)
    assert_same_experts(checkpoint, Checkpoint.open(saved(model, tmp_path / "saved")))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_imported_model_gives_the_logits_of_the_compressed_original(kind, tmp_path):
    model, path, folder = file_of(kind, tmp_path)
    compress(saved(model, tmp_path / "saved"), tmp_path / "a", device="cpu")
    import_gguf(path, tmp_path / "b", folder, device="cpu")
    one, other = (logits_by_steps(load.load(tmp_path / name, Options("exact", device="cpu")).model, TOKENS, 6)
                  for name in "ab")
    scale = one.abs().max()
    assert scale > 0.1 and (one - other).abs().max() < 1e-5 * scale
    for layer in range(Manifest.load(tmp_path / "a").layers):
        for a, b in zip(*(stored_experts(tmp_path / name, layer) for name in "ab"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind, whole", [("qwen3_5_moe_text", "qwen3_5_moe"), ("gemma4_text", "gemma4"),
                                         ("qwen3_moe", "qwen3_vl_moe")])
def test_the_original_may_see_as_well(kind, whole, tmp_path):
    """Its config.json is that of a model with vision; the file and the import have the language model alone."""
    model, path, folder = file_of(kind, tmp_path, **SEEING.get(kind, {}))
    text = {key: value for key, value in model.config.to_dict().items() if key != "architectures"}
    if whole == "qwen3_vl_moe":
        (path,) = write(tmp_path / "model.gguf", kind, model, called="qwen3vlmoe")
        text |= {"model_type": "qwen3_vl_moe_text", "rope_parameters": text["rope_parameters"] | {
            "mrope_section": [4, 2, 2], "mrope_interleaved": True}}
    AutoConfig.for_model(whole, text_config=text, tie_word_embeddings=model.config.tie_word_embeddings
                         ).save_pretrained(tmp_path / "seeing")
    for name, original in (("a", folder), ("b", write_chat_parts(tmp_path / "seeing"))):
        import_gguf(path, tmp_path / name, original, device="cpu")
    one, other = (load.load(tmp_path / name, Options("exact", device="cpu")).model for name in "ab")
    assert torch.equal(logits_by_steps(one, TOKENS, 6), logits_by_steps(other, TOKENS, 6))


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe_text"])
def test_transformers_reads_the_same_file_alike(kind, tmp_path):
    """Its own reader of GGUF files, written by others, for the architectures that it knows: an independent witness."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate")
    from transformers import AutoModelForCausalLM
    model, path, folder = file_of(kind, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=model.config,
                                                  dtype=torch.float32).state_dict()
    for name, tensor in opened(path, folder).trunk():
        torch.testing.assert_close(tensor.float(), theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_experts_are_decoded_as_the_package_does(quantisation, tmp_path):
    model, path, folder = file_of("qwen3_moe", tmp_path, quantisation)
    checkpoint = opened(path, folder)
    gate_up = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_gate_exps.weight")
    expected = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
    found = torch.cat([checkpoint.read_expert(1, e).gate for e in range(4)])
    assert torch.equal(found.float(), expected.float())
    error = (found.float() - gate_up[:, :64]).norm() / gate_up[:, :64].norm()
    assert 0 < error < {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.01, "Q4_0": 0.15, "Q4_1": 0.15, "Q5_0": 0.07,
                        "Q5_1": 0.06}[quantisation]


@pytest.mark.parametrize("kind, quantisation, dtype", [("qwen3_moe", "F16", torch.float16),
                                                       ("qwen3_5_moe_text", "BF16", torch.bfloat16)])
def test_half_precision_loses_nothing_of_a_half_precision_model(kind, quantisation, dtype, tmp_path):
    model = build(kind, **CHANGES.get(kind, {})).to(dtype).float()
    (path,) = write(tmp_path / "model.gguf", kind, model, quantisation)
    assert_same_experts(opened(path, like(tmp_path / "like", model)),
                        Checkpoint.open(saved(model, tmp_path / "saved")))


def random_blocks(quantisation: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Codes of the kind, uint8 [..., bytes of a row]; scales are finite, whatever their place in a block."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, quantisation)]
    return np.random.default_rng(seed).integers(1, 60, (*shape[:-1], shape[-1] // block * n_bytes), dtype=np.uint8)


@pytest.mark.parametrize("quantisation", [*K_KINDS, "MXFP4", *FEW_BITS])
def test_kinds_that_the_package_only_decodes(quantisation, tmp_path):
    """Random blocks of the kind in the place of the experts and of the embedding, decoded and imported."""
    kind = getattr(gguf.GGMLQuantizationType, quantisation)
    model = build("qwen3_moe", hidden_size=256, moe_intermediate_size=256, num_experts=4, num_hidden_layers=1)
    raw = {f"ffn_{name}_exps": random_blocks(quantisation, 4, 256, 256, seed=seed)
           for seed, name in enumerate(MATRICES)}
    embedding = random_blocks(quantisation, 128, 256)
    with_blocks(tmp_path / "k.gguf", model, kind, raw, embedding)
    checkpoint = opened(tmp_path / "k.gguf", like(tmp_path / "like", model))
    expected = {name: torch.from_numpy(dequantize(data, kind)) for name, data in raw.items()}
    expert = checkpoint.read_expert(0, 2)
    assert torch.equal(expert.gate[0], expected["ffn_gate_exps"][2])
    assert torch.equal(expert.up[0], expected["ffn_up_exps"][2])
    assert torch.equal(expert.down[0], expected["ffn_down_exps"][2].T)
    found = dict(checkpoint.trunk())["model.embed_tokens.weight"]
    assert torch.equal(found, torch.from_numpy(dequantize(embedding, kind)).to(torch.bfloat16))
    made = import_gguf(tmp_path / "k.gguf", tmp_path / "made", tmp_path / "like", device="cpu")
    assert made.kinds == (quantisation,) and quantisation in TYPES
    gate, up, down = stored_experts(tmp_path / "made", 0)
    for matrix, found, wanted in zip(MATRICES, (gate[0], up[0], down[0].T), expected.values(), strict=True):
        assert made.added_error[matrix] == pytest.approx(float((found - wanted[0]).norm() / wanted[0].norm()), rel=1e-3)


def test_the_scales_beside_nvfp4(tmp_path):
    """One of a whole tensor, one of each expert (conversion/base.py of llama.cpp); those of inputs are not used."""
    kind = gguf.GGMLQuantizationType.NVFP4
    model = build("qwen3_moe", hidden_size=256, moe_intermediate_size=256, num_experts=4, num_hidden_layers=1)
    raw = {f"ffn_{name}_exps": random_blocks("NVFP4", 4, 256, 256, seed=i) for i, name in enumerate(MATRICES)}
    embedding = random_blocks("NVFP4", 128, 256)
    scales = {"blk.0.ffn_up_exps.scale": np.array([1, 2, 0.5, 4], np.float32), "token_embd.scale":
              np.array([0.25], np.float32), "blk.0.ffn_gate_exps.input_scale": np.array([9, 9, 9, 9], np.float32)}
    with_blocks(tmp_path / "k.gguf", model, kind, raw, embedding, scales)
    checkpoint = opened(tmp_path / "k.gguf", like(tmp_path / "like", model))
    gate, up = (torch.from_numpy(dequantize(raw[f"ffn_{name}_exps"], kind)) for name in ("gate", "up"))
    for e, scale in enumerate((1, 2, 0.5, 4)):
        expert = checkpoint.read_expert(0, e)
        assert torch.equal(expert.gate[0], gate[e]) and torch.equal(expert.up[0], scale * up[e])
    found = dict(checkpoint.trunk())["model.embed_tokens.weight"]
    assert torch.equal(found, torch.from_numpy(0.25 * dequantize(embedding, kind)).to(torch.bfloat16))
    assert GgufSource.open([tmp_path / "k.gguf"], checkpoint.text_config).left_out == []


def with_blocks(path: Path, model: torch.nn.Module, kind, raw: dict[str, np.ndarray], embedding: np.ndarray,
                beside: dict[str, np.ndarray] | None = None) -> None:
    """The model's file with these blocks as experts of layer 0 and as embedding, and with tensors beside them."""
    write(path, "qwen3_moe", model)
    old = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "qwen3moe")
    for tensor in old.tensors:
        name = tensor.name.removeprefix("blk.0.").removesuffix(".weight")
        if name in raw or name == "token_embd":
            writer.add_tensor(tensor.name, raw.get(name, embedding), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, values in (beside or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    os.replace(path.with_suffix(".new"), path)


def test_mxfp4_of_a_gguf_file_is_mxfp4_of_the_original(tmp_path):
    """The same 4-bit floats in the nibble order of either file give the same experts."""
    model, path, folder = file_of("gpt_oss", tmp_path, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                  layer_types=["full_attention"])
    codes = torch.randint(0, 16, (4, 128, 2, 32), dtype=torch.uint8)
    scales = torch.randint(118, 128, (4, 128, 2), dtype=torch.uint8)
    ours = torch.cat((scales[..., None], codes[..., :16] | codes[..., 16:] << 4), -1).flatten(2)
    theirs = codes[..., ::2] | codes[..., 1::2] << 4
    from engine.files.dequantize import mxfp4
    expected = mxfp4(theirs, scales).float()                # [E, H, 2I], as transformers wants it
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt-oss")
    for tensor in gguf.GGUFReader(path).tensors:
        part = tensor.name.removeprefix("blk.0.ffn_").removesuffix("_exps.weight")
        if part in ("gate", "up"):
            rows = ours[:, ::2] if part == "gate" else ours[:, 1::2]
            writer.add_tensor(tensor.name, rows.contiguous().numpy(), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    finish(writer)
    source = GgufSource.open([tmp_path / "m.gguf"], read_config(folder))
    assert torch.equal(source.get("model.layers.0.mlp.experts.gate_up_proj"), expected)
    assert source.kinds == ("F32", "MXFP4")


def test_a_head_of_its_own_is_used_whatever_the_configuration_says(tmp_path):
    model, said = build("ernie4_5_moe", tie_word_embeddings=False), []
    (path,) = write(tmp_path / "model.gguf", "ernie4_5_moe", model)
    model.config.tie_word_embeddings = True
    import_gguf(path, tmp_path / "made", like(tmp_path / "like", model), device="cpu",
                report=lambda progress: said.append(progress.text))
    made = load.load(tmp_path / "made", Options("exact", device="cpu")).model
    logits = [each(TOKENS[None]).logits.float().flatten() for each in (made, model)]
    assert torch.cosine_similarity(*logits, dim=0) > 0.9
    assert sum("ties lm_head.weight to another tensor" in text for text in said) == 1


def test_one_tensor_per_expert_as_in_2023(tmp_path):
    model = build("mixtral")
    (path,) = write(tmp_path / "old.gguf", "mixtral", model, single_experts=True)
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    assert "blk.1.ffn_down.3.weight" in names and not any("_exps" in name for name in names)
    checkpoint = opened(path, like(tmp_path / "like", model))
    checkpoint.check_shapes()
    assert_same_experts(checkpoint, Checkpoint.open(saved(model, tmp_path / "saved")))


def test_next_token_layers_of_the_file_are_left_out(tmp_path):
    """Blocks behind the last layer predict further tokens; the text model has no place for them."""
    model, path, folder = file_of("glm4_moe", tmp_path)
    config = read_config(folder)
    config.num_hidden_layers -= 1
    source = GgufSource.open([path], config)
    assert source.left_out and all(name.startswith("blk.2.") for name in source.left_out)


def test_import_makes_what_compress_makes_from_the_same_weights(tmp_path):
    model, path, folder = file_of("qwen3_moe", tmp_path)
    compress(saved(model, tmp_path / "saved"), tmp_path / "a", device="cpu")
    said = []
    made = import_gguf(path, tmp_path / "b", folder, device="cpu", report=lambda progress: said.append(progress.text))
    one, other = MappedFile(tmp_path / "a" / TRUNK), MappedFile(tmp_path / "b" / TRUNK)
    for key in one.header.keys() - {"__metadata__"}:
        assert torch.equal(one.tensor(key), other.tensor(key)), key
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}
    assert made.manifest == Manifest.load(tmp_path / "b") and made.kinds == ("F32",)
    reading, sentence = said[:2]
    assert reading == "Reading model.gguf"
    assert "stored as F32; 4 bits cost a relative weight error of gate" in sentence


def test_the_warning_says_what_quantising_twice_costs(tmp_path):
    _, path, folder = file_of("qwen3_moe", tmp_path, "Q4_0")
    checkpoint, said = opened(path, folder), []
    added = cost(checkpoint)
    made = import_gguf(path, tmp_path / "made", folder, device="cpu", report=lambda heard: said.append(heard.text))
    assert made.added_error == added and list(added) == list(MATRICES)
    stored = [stored_experts(tmp_path / "made", layer) for layer in (0, 1)]
    for i, kind in enumerate(MATRICES):
        wanted = torch.stack([getattr(checkpoint.read_expert(layer, 0), kind)[0] for layer in (0, 1)]).float()
        found = torch.stack([layer[i][0] for layer in stored])
        assert added[kind] == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-4)
        assert 0.02 < added[kind] < 0.2 and f"{kind} {100 * added[kind]:.1f} %" in said[1]
    assert "second time" in said[1]


def test_other_architectures_are_refused_by_name(tmp_path):
    model = build("qwen3_moe", num_hidden_layers=1)
    for architecture, words in (("grok", "architecture grok, which is not imported; these are: afmoe, cohere2moe"),
                                ("gpt-oss", "architecture gpt-oss, but the configuration describes qwen3_moe")):
        writer = gguf.GGUFWriter(tmp_path / f"{architecture}.gguf", architecture)
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
        finish(writer)
        with pytest.raises(UserError, match=words):
            GgufSource.open([tmp_path / f"{architecture}.gguf"], model.config)
    build("jamba").config.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="files of jamba models are not imported; these are: afmoe"):
        config_of(tmp_path / "other")


def test_kinds_that_are_not_imported_are_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "iq.gguf", "qwen3moe")
    writer.add_tensor("blk.0.ffn_down_exps.weight", random_blocks("Q8_K", 4, 256, 256),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    finish(writer)
    with pytest.raises(UserError, match="ffn_down_exps.weight as Q8_K, which is not imported; get a file in Q4_K_M"):
        GgufSource.open([tmp_path / "iq.gguf"], build("qwen3_moe").config)


def test_damaged_foreign_and_mismatched_files(tmp_path):
    model, path, folder = file_of("qwen3_moe", tmp_path)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UserError, match="not a GGUF file"):
        GgufSource.open([tmp_path / "text.gguf"], model.config)
    data = path.read_bytes()
    for length in (4, 40, 400, 4000, len(data) // 2, len(data) - 9):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged or incomplete"):
            GgufSource.open([tmp_path / "cut.gguf"], model.config)
    with pytest.raises(UserError, match="embedding_length is 64, the configuration says 128"):
        GgufSource.open([path], build("qwen3_moe", hidden_size=128).config)
    with pytest.raises(UserError, match="There is no file .*nothing.gguf; give the path"):
        import_gguf(tmp_path / "nothing.gguf", tmp_path / "made", folder)


def test_a_header_with_flipped_bytes_never_ends_in_anything_but_a_sentence(tmp_path):
    """Counts, types, names, offsets: refused in words, or of no matter for what is read."""
    model, path, _ = file_of("qwen3_moe", tmp_path, num_hidden_layers=1)
    data, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(80):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 3))):
            broken[rng.randrange(data.find(b"blk.0.attn_norm") + 2000)] = rng.choice((0, 255, rng.randrange(256)))
        (tmp_path / "broken.gguf").write_bytes(broken)
        try:
            checkpoint = Checkpoint(model.config, GgufSource.open([tmp_path / "broken.gguf"], model.config))
            checkpoint.check_shapes()
            assert dict(checkpoint.trunk()) and checkpoint.read_expert(0, 0)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 10 < refused < 80


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model, _, folder = file_of("qwen3_moe", tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("nan")
    (path,) = write(tmp_path / "nan.gguf", "qwen3_moe", model)
    with pytest.raises(UserError, match="not finite"):
        import_gguf(path, tmp_path / "made", folder, device="cpu")


def test_a_split_file(tmp_path):
    model = build("qwen3_moe", **CHANGES["qwen3_moe"])
    folder = like(tmp_path / "like", model)
    (whole,) = write(tmp_path / "whole.gguf", "qwen3_moe", model)
    parts = write(tmp_path / "m.gguf", "qwen3_moe", model, part_bytes=150_000)
    assert len(parts) > 2 and parts[0].name == f"m-00001-of-0000{len(parts)}.gguf"
    assert parts_of(parts[1]) == parts and parts_of(whole) == [whole]
    for name in ("a", "b"):
        import_gguf({"a": whole, "b": parts[-1]}[name], tmp_path / name, folder, device="cpu")
    assert [(e.path, e.sha256) for e in Manifest.load(tmp_path / "a").files if e.path != TRUNK] == [
        (e.path, e.sha256) for e in Manifest.load(tmp_path / "b").files if e.path != TRUNK]
    parts[1].unlink()
    with pytest.raises(UserError, match=f"m-00002-of-0000{len(parts)}.gguf is missing beside m-00001"):
        import_gguf(parts[0], tmp_path / "c", folder)


def test_parts_that_do_not_belong_together(tmp_path):
    model = build("qwen3_moe", **CHANGES["qwen3_moe"])
    parts = write(tmp_path / "m.gguf", "qwen3_moe", model, part_bytes=150_000)
    shutil.copyfile(parts[1], parts[2])
    with pytest.raises(UserError, match="do not belong together"):
        GgufSource.open(parts, model.config)


def test_a_stopped_import_goes_on_at_the_first_layer_that_is_not_whole(tmp_path):
    _, path, folder = file_of("qwen3_moe", tmp_path, num_hidden_layers=3)
    reads, all_reads = [], []
    import_gguf(path, tmp_path / "once", folder, device="cpu", check=lambda: all_reads.append(1))

    def check(limit: int) -> None:
        reads.append(1)
        if len(reads) > limit:
            raise KeyboardInterrupt
    for limit in (2, 14, 14):
        reads.clear()
        with pytest.raises(KeyboardInterrupt):
            import_gguf(path, tmp_path / "often", folder, device="cpu", check=lambda limit=limit: check(limit))
        assert not (tmp_path / "often" / "floe.json").exists()
    reads.clear()
    import_gguf(path, tmp_path / "often", folder, device="cpu", check=lambda: check(99))
    assert len(reads) == len(all_reads) - 24                   # two layers of four experts of three matrices were whole
    assert Manifest.load(tmp_path / "often") == Manifest.load(tmp_path / "once")


def test_without_the_package_one_sentence(tmp_path, monkeypatch):
    model, path, folder = file_of("qwen3_moe", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf: pip install gguf"):
        import_gguf(path, tmp_path / "made", folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads anonymous memory from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """An embedding of 268 million weights: as bfloat16 once, never as float32."""
    from transformers import Qwen3MoeConfig
    config = Qwen3MoeConfig(vocab_size=131072, hidden_size=2048, moe_intermediate_size=256, num_hidden_layers=1,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=4,
                            num_experts_per_tok=2, tie_word_embeddings=True)
    config.save_pretrained(tmp_path / "like")
    write_chat_parts(tmp_path / "like")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    shapes = {"token_embd": (131072, 2048), "output_norm": (2048,), "blk.0.attn_norm": (2048,),
              "blk.0.ffn_norm": (2048,), "blk.0.attn_q": (256, 2048), "blk.0.attn_k": (128, 2048),
              "blk.0.attn_v": (128, 2048), "blk.0.attn_output": (2048, 256), "blk.0.attn_q_norm": (64,),
              "blk.0.attn_k_norm": (64,), "blk.0.ffn_gate_inp": (4, 2048), "blk.0.ffn_gate_exps": (4, 256, 2048),
              "blk.0.ffn_up_exps": (4, 256, 2048), "blk.0.ffn_down_exps": (4, 2048, 256)}
    for name, shape in shapes.items():
        data = np.ones(shape, np.float32) if len(shape) == 1 else random_blocks("Q4_K", *shape)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=None if len(shape) == 1 else gguf.GGMLQuantizationType.Q4_K)
    finish(writer)
    child = subprocess.Popen([sys.executable, "-m", "engine", "import_gguf", str(tmp_path / "m.gguf"),
                              str(tmp_path / "made"), "--like", str(tmp_path / "like"), "--trunk-bits", "8", "--device",
                              "cpu"], stderr=subprocess.PIPE, cwd=Path(__file__).resolve().parents[3])
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.01)
    assert child.returncode == 0, child.stderr.read().decode()
    assert 131072 * 2048 * 2 < peak < 131072 * 2048 * 2 + (1 << 30), f"{peak / 2**30:.2f} GiB"
    print(f"peak {peak / 2**20:.0f} MiB of anonymous memory")
