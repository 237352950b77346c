"""Whatever is wrong with a checkpoint folder, the answer is one sentence that says what to do, and nothing is run."""
from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine import UserError
from engine.files.chat_parts import LFS, check_chat_parts
from engine.files.checkpoint import Checkpoint
from engine.files.tensor_source import INDEX, open_safetensors
from tests.support.architectures import build


@pytest.fixture
def good(tmp_path) -> Path:
    build("qwen3_moe").save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint = Checkpoint.open(folder)
        for i in range(len(checkpoint.expert_layers)):
            checkpoint.read_layer(i)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 400, text
    for word in words:
        assert word in text, text


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


class Trap:
    """Unpickling this writes a file: the sign that something was executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def test_no_folder_and_no_configuration(tmp_path):
    refuse(tmp_path / "nothing", "config.json")
    refuse(tmp_path, "config.json")


@pytest.mark.parametrize("text", ["{", "[]", "\x00\x01", "", "[" * 100_000, '{"a": ' * 50_000, " " * 3_000_000])
def test_a_configuration_that_is_none(good, text):
    (good / "config.json").write_text(text)
    refuse(good, "config.json")


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 1e9}, {"num_labels": 3_000_000}, {"num_experts": 10**9},
    {"num_attention_heads": 10**9}, {"head_dim": 10**6}, {"head_dim": 10**30}, {"moe_intermediate_size": 10**9},
    {"vocab_size": 3_000_000}, {"layer_types": ["x"] * 100_000}, {"vision_config": {"depth": 10**9}},
    {"text_config": [1]}, {"quantization_config": "x"}, {"text_config": {"quantization_config": 7}}])
def test_a_configuration_with_numbers_that_no_model_has(good, changes):
    """transformers would make a list, a layer or a matrix of as many."""
    edit(good / "config.json", **changes)
    refuse(good)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes among files")
@pytest.mark.parametrize("how", ["pipe", "device", "loop"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json", "model-00001-of-00003.safetensors"])
def test_a_file_that_is_none(good, name, how):
    """Whoever opens it waits for ever, or reads without end."""
    (good / name).unlink(missing_ok=True)
    os.mkfifo(good / name) if how == "pipe" else (good / name).symlink_to({"device": "/dev/zero", "loop": name}[how])
    refuse(good, name)


def test_a_text_of_a_hundred_megabytes(good):
    with (good / "tokenizer_config.json").open("w") as file:
        file.truncate(100 << 20)
    refuse(good, "tokenizer_config.json", "104,857,600 bytes")


def test_no_weights(good):
    for path in [*good.glob("*.safetensors"), good / INDEX]:
        path.unlink()
    refuse(good, "safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "last.ckpt"])
def test_a_pickle_is_refused_by_name(good, tmp_path_factory, name):
    for path in [*good.glob("*.safetensors"), good / INDEX]:
        path.unlink()
    sign = tmp_path_factory.mktemp("sign") / "executed"
    (good / name).write_bytes(pickle.dumps(Trap(sign)))
    refuse(good, name, "pickle")
    assert not sign.exists()


@pytest.mark.parametrize("how", ["protocol 2", "protocol 4", "protocol 5", "torch", "torch without zip"])
def test_a_pickle_is_refused_by_content(good, tmp_path_factory, how):
    sign, path = tmp_path_factory.mktemp("sign") / "executed", shard(good)
    if how.startswith("protocol"):
        path.write_bytes(pickle.dumps(Trap(sign), protocol=int(how[-1])))
    else:
        torch.save(Trap(sign), path, _use_new_zipfile_serialization=how == "torch")
    refuse(good, path.name, "pickle")
    assert not sign.exists()


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path):
    path = tmp_path / "model.safetensors"
    for padding in range(400, 700):
        save_file({"a": torch.zeros(2)}, path, metadata={"note": "x" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(open_safetensors(path).keys()) == ["a"]


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_shard(good, keep):
    path = shard(good)
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * keep) if isinstance(keep, float) else keep])
    refuse(good, path.name, "download")


def test_a_shard_that_is_not_there(good):
    path = shard(good)
    path.unlink()
    refuse(good, path.name, "download")


def test_a_shard_without_what_the_index_promises(good):
    path = shard(good)
    stored = load_file(path)
    gone = sorted(stored)[0]
    stored.pop(gone)
    save_file(stored, path)
    refuse(good, path.name, gone)


@pytest.mark.parametrize("pattern", ["experts.3.up_proj", "self_attn.q_proj", "lm_head", "mlp.gate.weight",
                                     "experts.7.", "layers.1."])
def test_tensors_missing_from_the_index(good, pattern):
    index = json.loads((good / INDEX).read_text())
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if pattern not in key}
    (good / INDEX).write_text(json.dumps(index))
    refuse(good, "incomplete", "missing")


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
def test_a_damaged_index(good, text):
    (good / INDEX).write_text(text)
    refuse(good, INDEX)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_that_points_elsewhere(good, name):
    index = json.loads((good / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (good / INDEX).write_text(json.dumps(index))
    refuse(good, name)


def test_weights_of_another_size(good):
    edit(good / "config.json", moe_intermediate_size=96)
    refuse(good, "do not belong together")


def test_trunk_weights_of_another_size(good):
    edit(good / "config.json", vocab_size=256)
    refuse(good, "do not belong together")


def test_a_dense_model(tmp_path):
    config = AutoConfig.for_model("llama", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                  num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    refuse(tmp_path, "Mixture-of-Experts")


def test_experts_without_a_gate(tmp_path):
    config = AutoConfig.for_model(
        "nemotron_h", vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_groups=1,
        mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, layers_block_type=["mamba", "moe"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    refuse(tmp_path, "without a gate")


def test_an_odd_hidden_size(tmp_path):
    build("mixtral", hidden_size=96).save_pretrained(tmp_path)
    refuse(tmp_path, "96", "multiple of 64")


def test_an_unknown_architecture(good):
    edit(good / "config.json", model_type="nobody_knows")
    refuse(good, "nobody_knows", "transformers")


def test_an_architecture_without_a_text_model(good):
    edit(good / "config.json", model_type="vit")
    refuse(good, "vit")


def test_code_of_its_own_is_never_run(good, tmp_path_factory):
    sign = tmp_path_factory.mktemp("sign") / "executed"
    (good / "configuration_own.py").write_text(f"open({str(sign)!r}, 'w').write('executed')\n")
    edit(good / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    refuse(good, "own", "code")
    assert not sign.exists()


def test_a_configuration_with_impossible_numbers(good):
    edit(good / "config.json", num_attention_heads="four")
    refuse(good, "config.json")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_other_quantisations(good, method):
    edit(good / "config.json", quantization_config={"quant_method": method})
    refuse(good, method)


def test_a_folder_that_is_compressed_already(good):
    edit(good / "config.json", quantization_config={"quant_method": "floe"})
    refuse(good, "already compressed")


def test_fp8_without_scales(good):
    path = shard(good)
    stored = load_file(path)
    key = next(key for key in stored if "experts" in key)
    stored[key] = stored[key].to(torch.float8_e4m3fn)
    save_file(stored, path)
    refuse(good, key, "fp8")


def test_what_a_chat_needs_is_looked_at_before_hours_of_work(tmp_path):
    def wrong(match):
        with pytest.raises(UserError, match=match):
            check_chat_parts(tmp_path)
    wrong("has no tokenizer")
    (tmp_path / "tokenizer.json").write_bytes(LFS + b"v1\noid sha256:0\nsize 7000000\n")
    wrong("tokenizer.json is not there, only the note of Git LFS")
    (tmp_path / "tokenizer.json").write_text("{}")
    wrong("has no chat template")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    check_chat_parts(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(LFS + b"v1\n")
    with pytest.raises(UserError, match="only the note of Git LFS"):
        open_safetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("ending, kind", [(".qweight", "GPTQ or AWQ"), (".scales", "MLX"),
                                          (".weight_scale_2", "NVFP4")])
def test_weights_of_other_programs_are_named(tmp_path, ending, kind):
    build("qwen3_moe").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({key.replace(".weight", ending) if ".experts." in key else key: value
               for key, value in load_file(path).items()}, path)
    refuse(tmp_path, f"quantised for {kind}")


def test_the_names_of_a_model_that_was_compiled_or_spread_over_cards_are_read(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    save_file({f"module._orig_mod.{key}": value for key, value in stored.items()}, path)
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(dict(checkpoint.trunk())["lm_head.weight"], stored["lm_head.weight"])
    assert checkpoint.left_out == [] and len(checkpoint.expert_layers) > 0
