"""Checkpoints of every architecture, layout and storage type read back as what transformers would have loaded."""
from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.core import Options
from engine.files import dequantize
from engine.files.checkpoint import Checkpoint, ExpertLayer
from engine.files.dequantize import block_fp8, mxfp4
from engine.files.key_map import KeyMap
from engine.files.skeleton import TRANSFORMERS, check_transformers, experts_modules
from engine.files.tensor_source import INDEX
from engine.library.compress import compress
from engine.model.load import load
from tests.support import folders
from tests.support.architectures import COMMON, DELTA, MOE, SMALL, build

NAMES = sorted(SMALL)


def save(model, folder: Path, layout: str) -> Path:
    """transformers writes the original names of the architecture; `shards` has no index, as some uploads."""
    model.save_pretrained(folder, max_shard_size="10GB" if layout == "single" else "60KB")
    if layout == "shards":
        (folder / INDEX).unlink()
    return folder


def layout_of(name: str) -> str:
    return ("single", "indexed", "shards")[NAMES.index(name) % 3]


def plain_experts(module, layer: ExpertLayer, x, index, weights):
    """What the experts of one layer compute, from canonical tensors and the module's own activation."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for e, weight in zip(index[t].tolist(), weights[t], strict=True):
            gate, up = layer.gate[e] @ x[t], layer.up[e] @ x[t]
            if layer.gate_bias is not None:
                gate, up = gate + layer.gate_bias[e], up + layer.up_bias[e]
            both = torch.cat((gate, up)) if module.is_concatenated else torch.stack((gate, up), -1).flatten()
            y = module._apply_gate(both[None])[0] @ layer.down[e]
            if layer.down_bias is not None:
                y = y + layer.down_bias[e]
            out[t] += weight * (y if layer.post_norm is None else module.post_expert_norm(y))
    return out


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_architecture_comes_back(name, tmp_path):
    model = build(name, seed=NAMES.index(name))
    checkpoint = Checkpoint.open(save(model, tmp_path, layout_of(name)))
    spec, top_k = checkpoint.spec, checkpoint.spec.top_k
    assert checkpoint.left_out == [] and list(checkpoint.map.mtp) == []
    for i, (path, module) in enumerate(experts_modules(model, name).items()):
        layer = checkpoint.read_layer(i)
        assert path == checkpoint.expert_layers[i]
        assert layer.shape == (spec.experts, spec.neurons, spec.hidden)
        x, weights = torch.randn(5, spec.hidden), torch.rand(5, top_k)
        index = torch.stack([torch.randperm(spec.experts)[:top_k] for _ in range(5)])
        torch.testing.assert_close(plain_experts(module, layer, x, index, weights), module(x, index, weights),
                                   rtol=1e-4, atol=1e-5)
    assert_trunk_equals(checkpoint, model)


def assert_trunk_equals(checkpoint: Checkpoint, model) -> None:
    """Every stored parameter and buffer exactly once, bit for bit, but the routed experts and tied names."""
    routed = {f"{path}.{own}" for path in checkpoint.expert_layers
              for own, _ in model.get_submodule(path).named_parameters(recurse=False)}
    expected = model.state_dict()
    tied = set(checkpoint.map.tied())
    names = []
    for name, value in checkpoint.trunk():
        assert torch.equal(value, expected[name]), name
        names.append(name)
    assert sorted(names) == sorted(set(expected) - routed - tied)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "jamba", "aria_text"])
def test_one_expert_is_a_slice_of_its_layer(name, tmp_path):
    checkpoint = Checkpoint.open(save(build(name), tmp_path, "indexed"))
    whole, some, one = checkpoint.read_layer(1), checkpoint.read_layer(1, range(1, 3)), checkpoint.read_expert(1, 2)
    for field in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        if getattr(whole, field) is None:
            continue
        assert torch.equal(getattr(some, field), getattr(whole, field)[1:3])
        assert torch.equal(getattr(one, field), getattr(whole, field)[2:3])


class Counting:
    """A source that remembers the bytes it was asked for."""

    def __init__(self, source):
        self._source, self.read_bytes = source, 0

    def __getattr__(self, name):
        return getattr(self._source, name)

    def get(self, key):
        return self._count(self._source.get(key))

    def get_slice(self, key, start, stop):
        return self._count(self._source.get_slice(key, start, stop))

    def _count(self, value):
        self.read_bytes += value.nbytes
        return value


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_reads_its_own_bytes_only(name, tmp_path):
    checkpoint = Checkpoint.open(save(build(name), tmp_path, "single"))
    checkpoint.source = source = Counting(checkpoint.source)
    checkpoint.read_expert(0, 1)
    assert source.read_bytes == checkpoint.expert_bytes


def test_layers_can_be_planned_from_names_alone(tmp_path):
    checkpoint = Checkpoint.open(save(build("mixtral"), tmp_path, "indexed"))
    names = list(json.loads((tmp_path / INDEX).read_text())["weight_map"])
    random.Random(0).shuffle(names)
    again = KeyMap(checkpoint.skeleton, names, "mixtral")
    keys = checkpoint.layer_keys(1)
    assert len(keys) == 3 * 4 and all(key.startswith("model.layers.1.block_sparse_moe.experts.") for key in keys)
    assert again.of["model.layers.1.mlp.experts.gate_up_proj"].sources == \
        checkpoint.map.of["model.layers.1.mlp.experts.gate_up_proj"].sources


# --- parts that a text model has no place for -----------------------------------------------------------------


def test_vision_is_left_out_and_said_so(tmp_path):
    text = COMMON | MOE | DELTA | SMALL["qwen3_5_moe_text"]
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, patch_size=4)
    config = AutoConfig.for_model("qwen3_5_moe", text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    checkpoint = Checkpoint.open(save(model, tmp_path, "single"))
    assert [line.split(" ")[0] for line in checkpoint.left_out] == ["model.visual"]
    whole = {name.replace("model.language_model.", "model."): value for name, value in model.state_dict().items()}
    for name, value in checkpoint.trunk():
        assert torch.equal(value, whole[name]), name
    assert torch.equal(checkpoint.read_layer(0).up, whole["model.layers.0.mlp.experts.gate_up_proj"][:, 48:])


def test_a_composite_says_whether_the_head_is_tied(tmp_path):
    text = COMMON | SMALL["gemma4_text"]
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config=None, audio_config=None,
                                  tie_word_embeddings=False, dtype="bfloat16")
    model = build("gemma4_text")
    stored = {key.replace("model.", "model.language_model.", 1): value.clone() for key, value in
              model.state_dict().items()} | {"lm_head.weight": torch.randn(128, 64)}
    config.save_pretrained(tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(dict(checkpoint.trunk())["lm_head.weight"], stored["lm_head.weight"])
    assert checkpoint.text_config.dtype in ("bfloat16", torch.bfloat16)
    assert checkpoint.spec.embedding_params == 128 * 64


def test_the_language_model_of_gemma4_is_found_under_its_prefix(tmp_path):
    model = build("gemma4_text")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {key.replace("model.", "model.language_model.", 1): value for key, value in stored.items()}
    save_file(renamed | {"model.vision_tower.std_bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.left_out == ["model.vision_tower"]
    assert_trunk_equals(checkpoint, model)


@pytest.mark.parametrize("name, extra", [
    ("qwen3_next", ["mtp.fc.weight", "mtp.layers.0.mlp.experts.0.gate_proj.weight", "mtp.norm.weight"]),
    ("deepseek_v3", ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.down_proj.weight"]),
])
def test_multi_token_prediction_is_kept_under_its_own_names(name, extra, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    added = {key: torch.randn(4, 4) for key in extra}
    save_file(load_file(tmp_path / "model.safetensors") | added, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    kept = {key: checkpoint.source.get(key) for key in checkpoint.map.mtp}
    assert sorted(kept) == sorted(extra) and all(torch.equal(kept[key], added[key]) for key in extra)
    assert checkpoint.left_out == []
    assert_trunk_equals(checkpoint, model)


def test_a_tied_head_is_stored_once(tmp_path):
    model = build("ernie4_5_moe")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()      # some uploads hold both
    save_file(stored, tmp_path / "model.safetensors")
    names = [name for name, _ in Checkpoint.open(tmp_path).trunk()]
    assert names.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in names
    del stored["model.embed_tokens.weight"]  # and some the head alone
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    trunk = dict(Checkpoint.open(tmp_path).trunk())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.embed_tokens.weight
    assert "lm_head.weight" not in trunk and torch.equal(trunk["model.embed_tokens.weight"], theirs)


def test_a_head_of_its_own_is_used_whatever_the_configuration_says(tmp_path):
    source, made, said = tmp_path / "source", tmp_path / "made", []
    model = folders.checkpoint("ernie4_5_moe", source)
    assert model.config.tie_word_embeddings
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = torch.randn(stored["model.embed_tokens.weight"].shape)
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    compress(source, made, device="cpu", report=lambda progress: said.append(progress.text))
    theirs, ids = AutoModelForCausalLM.from_pretrained(source), torch.tensor([[3, 1, 4, 1, 5]])
    full = load(source, Options(device="cpu", level="full"), lambda text, share: said.append(text)).model
    for found, close in ((full, 0.999), (load(made, Options(device="cpu", level="exact")).model, 0.9)):
        logits = [each(ids).logits.float().flatten() for each in (found, theirs)]
        assert torch.cosine_similarity(*logits, dim=0) > close
    assert sum("ties lm_head.weight to another tensor" in text and "these are used" in text for text in said) == 2


# --- quantised sources ----------------------------------------------------------------------------------------


def test_mxfp4_of_an_expert_alone_is_its_part_of_all(monkeypatch):
    blocks = torch.randint(0, 256, (3, 40, 2, 16), dtype=torch.uint8)
    scales = torch.randint(0, 255, (3, 40, 2), dtype=torch.uint8)
    whole = mxfp4(blocks, scales)
    monkeypatch.setattr(dequantize, "MXFP4_BLOCKS", 7)              # whatever is decoded at a time
    assert all(torch.equal(mxfp4(blocks[e:e + 1], scales[e:e + 1]), whole[e:e + 1]) for e in range(3))
    blocks[0, 5, 1, 3], scales[0, 5, 1] = 0xE3, 129                 # codes 3 (1.5) and 14 (-4) times 2^2
    assert mxfp4(blocks, scales)[0, 32 + 6:32 + 8, 5].tolist() == [6, -16]


def transformers_fp8(weight, scales):
    value = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scales})["weight"]
    return (value[0] if isinstance(value, list) else value).to(torch.bfloat16)      # a list before 5.20


@pytest.mark.parametrize("shape, grid", [((256, 384), (2, 3)), ((2, 256, 128), (2, 2, 1)), ((96, 64), (1, 1))])
def test_block_fp8_is_transformers_own(shape, grid):
    weight, scales = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(grid)
    assert torch.equal(block_fp8(weight, scales), transformers_fp8(weight, scales))


def test_block_fp8_with_exponents_for_scales():
    weight, scales = torch.randn(64, 64).to(torch.float8_e4m3fn), torch.randint(120, 130, (64, 2), dtype=torch.uint8)
    assert torch.equal(block_fp8(weight, scales), transformers_fp8(weight, scales))


def test_the_last_fp8_block_may_be_cut_short():
    weight, scales = torch.randn(576, 192).to(torch.float8_e4m3fn), torch.rand(5, 2)
    got = block_fp8(weight, scales)
    for row, column in ((0, 0), (127, 127), (128, 128), (575, 191), (511, 100), (512, 130)):
        expected = (weight[row, column].float() * scales[row // 128, column // 128]).to(torch.bfloat16)
        assert got[row, column] == expected


def test_a_gpt_oss_checkpoint_in_mxfp4(tmp_path):
    build("gpt_oss", intermediate_size=96).to(torch.bfloat16).save_pretrained(tmp_path)
    stored, expected = load_file(tmp_path / "model.safetensors"), {}
    for key in [key for key in stored if key.endswith("_proj") and "experts" in key]:
        experts, inner, rows = stored.pop(key).shape
        blocks = torch.randint(0, 256, (experts, rows, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 130, (experts, rows, inner // 32), dtype=torch.uint8)
        stored |= {key + "_blocks": blocks, key + "_scales": scales}
        expected[key] = convert_moe_packed_tensors(blocks, scales)
    checkpoint = reopen(tmp_path, stored, {"quant_method": "mxfp4"})
    assert len(checkpoint.layer_keys(0)) == 2 * 2 + 2
    layer, name = checkpoint.read_layer(1), "model.layers.1.mlp.experts."
    assert torch.equal(layer.gate, expected[name + "gate_up_proj"][:, :, 0::2].transpose(1, 2))
    assert torch.equal(layer.up, expected[name + "gate_up_proj"][:, :, 1::2].transpose(1, 2))
    assert torch.equal(layer.down, expected[name + "down_proj"])
    assert torch.equal(checkpoint.read_expert(1, 3).up, layer.up[3:4])
    n_weights, n_biases = 3 * 64 * 96, 2 * 96 + 64
    assert checkpoint.expert_bytes == n_weights // 2 + n_weights // 32 + n_biases * 2


def test_a_qwen3_checkpoint_in_block_fp8(tmp_path):
    build("qwen3_moe", hidden_size=192, moe_intermediate_size=160).to(torch.bfloat16).save_pretrained(tmp_path)
    stored, expected = load_file(tmp_path / "model.safetensors"), {}
    for key in [key for key in stored if "_proj" in key]:
        value = stored[key] = torch.randn(stored[key].shape).to(torch.float8_e4m3fn)
        scales = stored[key + "_scale_inv"] = torch.rand(-(-value.shape[0] // 128), -(-value.shape[1] // 128))
        spread = scales.repeat_interleave(128, 0)[:value.shape[0]].repeat_interleave(128, 1)[:, :value.shape[1]]
        expected[key] = (value.float() * spread).to(torch.bfloat16)
    checkpoint = reopen(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    one, name = checkpoint.read_expert(1, 5), "model.layers.1.mlp.experts.5."
    assert torch.equal(one.gate[0], expected[name + "gate_proj.weight"])
    assert torch.equal(one.down[0], expected[name + "down_proj.weight"].T)
    trunk = dict(checkpoint.trunk())
    assert torch.equal(trunk["model.layers.0.self_attn.q_proj.weight"],
                       expected["model.layers.0.self_attn.q_proj.weight"])
    assert not any("scale" in key for key in trunk) and checkpoint.left_out == []
    assert checkpoint.expert_bytes == 3 * 160 * 192 + 3 * 4 * 4         # one byte a weight, four scales a matrix


def reopen(folder: Path, stored: dict, quantization: dict) -> Checkpoint:
    save_file(stored, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": quantization}))
    checkpoint = Checkpoint.open(folder)
    assert not hasattr(checkpoint.text_config, "quantization_config")
    return checkpoint


def test_the_trained_demonstration_model(shared):
    checkpoint = Checkpoint.open(shared / "models" / "tiny-chat")
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "tiny-chat")
    both = model.model.layers[5].mlp.experts.gate_up_proj
    layer = checkpoint.read_layer(5)
    assert layer.gate.dtype == torch.bfloat16 and torch.equal(torch.cat((layer.gate, layer.up), 1), both)
    assert checkpoint.spec.kv_bytes_per_token == 2 * 2 * 6 * 2 * 64
    assert_trunk_equals(checkpoint, model)


@pytest.mark.parametrize("verb", [["chat", "assets/demo", "--prompt", "Hi"], ["compress", "assets/demo", "x"]])
def test_a_transformers_that_is_too_old_is_named_and_no_folder_is(verb, repository):
    """An environment's own transformers, made to look as 5.17 does."""
    code = ("import sys, transformers, transformers.cache_utils as caches\n"
            "transformers.__version__ = '5.17.0'\n"
            "del caches.DummyLayer\n"
            "from engine.__main__ import main\n"
            f"sys.exit(main({verb!r}))")
    ended = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("Floe Chat needs transformers 5.23 or newer"), ended.stderr


def test_the_requirement_is_what_is_asked_at_the_start(repository):
    check_transformers(".".join(map(str, TRANSFORMERS)) + ".0")
    for newer in ("5.24.0.dev0", "6.0rc1"):
        check_transformers(newer)
    assert f'"transformers>={".".join(map(str, TRANSFORMERS))}"' in (repository / "pyproject.toml").read_text()
