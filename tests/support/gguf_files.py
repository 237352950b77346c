"""Small GGUF files from transformers models, written with the gguf package and its own table of names.

`write` turns the model's tensors the way llama.cpp's converter does (conversion/*.py there); the importer has to turn
them back.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from transformers import AutoTokenizer

from tests.support.architectures import build
from tests.support.folders import write_tokenizer

Tensor = torch.Tensor
Kind = gguf.GGMLQuantizationType
ARCHITECTURES = {
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE, "qwen3_5_moe_text": gguf.MODEL_ARCH.QWEN35MOE,
    "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT, "gpt_oss": gguf.MODEL_ARCH.GPT_OSS, "mixtral": gguf.MODEL_ARCH.LLAMA,
    "olmoe": gguf.MODEL_ARCH.OLMOE, "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2, "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "glm4_moe_lite": gguf.MODEL_ARCH.DEEPSEEK2, "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "gemma4_text": gguf.MODEL_ARCH.GEMMA4, "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE, "dots1": gguf.MODEL_ARCH.DOTS1,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2, "ernie4_5_moe": gguf.MODEL_ARCH.ERNIE4_5_MOE,
    "exaone_moe": gguf.MODEL_ARCH.EXAONE_MOE, "hunyuan_v1_moe": gguf.MODEL_ARCH.HUNYUAN_MOE,
    "afmoe": gguf.MODEL_ARCH.AFMOE, "phimoe": gguf.MODEL_ARCH.PHIMOE, "lfm2_moe": gguf.MODEL_ARCH.LFM2MOE,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE, "cohere2_moe": gguf.MODEL_ARCH.COHERE2}
CALLED = {"cohere2_moe": "cohere2moe"}      # what the package does not know yet; its names stand in PLAIN_BLOCKS
ALONE = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "gpt_oss")    # whose files say all of their model
# Whose names transformers has changed since the converter's table was written: the checkpoints' own stand there.
RENAMED = {"moe_statics.e_score_correction_bias": "exp_probs_b.bias", "block_sparse_moe.router.weight":
           "ffn_gate_inp.weight", "e_score_correction_bias": "exp_probs_b.bias", "expert_bias": "exp_probs_b.bias"}
PLAIN_BLOCKS = {"cohere2_moe": {"mlp.gate.weight": "ffn_gate_inp.weight"} | {
    f"shared_experts.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")}}
# DeepSeek-V2 stands for the files of 2024, whose latent matrix was not taken apart yet.
SPLIT_LATENT = ("deepseek_v3", "glm4_moe_lite")
SINGLE = {"ffn_gate_exps": "ffn_gate", "ffn_up_exps": "ffn_up", "ffn_down_exps": "ffn_down"}


def write(path: Path, kind: str, model: torch.nn.Module, quantisation: str = "F32", tokenizer: Path | None = None,
          single_experts: bool = False, part_bytes: int = 0, called: str = "",
          base: str = "", beside: str = "") -> list[Path]:
    """The model as a GGUF file, experts as `quantisation` says, everything else in float32; -> its files.

    tokenizer: folder of the one whose vocabulary goes into the metadata. single_experts: one tensor per expert, as in
    2023. part_bytes: split into parts of about this size. called: another architecture with the same tensors.
    base: what it says that it was made from. beside: name of one tensor more.
    """
    architecture = ARCHITECTURES[kind]
    called = called or CALLED.get(kind, gguf.MODEL_ARCH_NAMES[architecture])
    writer = gguf.GGUFWriter(path, called, split_max_size=part_bytes)
    add_metadata(writer, model.config)
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    if beside:
        writer.add_tensor(beside, np.ones(8, np.float32))
    if tokenizer:
        add_tokenizer(writer, tokenizer)
    else:
        writer.add_token_list([f"w{i}" for i in range(model.config.vocab_size)])
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for key, value in model.state_dict().items():
        for own, tensor in turned(kind, model.config, key, value.float()):
            name = own if own.startswith("blk.") else named(names, own)
            add(writer, name, tensor, quantisation if "_exps.weight" in name else "F32", single_experts)
    finish(writer)
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))


def add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, quantisation: str, single_experts: bool) -> None:
    kind = getattr(Kind, quantisation)
    stacked = name.removesuffix(".weight").rpartition(".")[2]
    if single_experts and stacked in SINGLE and name.endswith("weight"):
        for e, matrix in enumerate(tensor):
            own = name.replace(f"{stacked}.weight", f"{SINGLE[stacked]}.{e}.weight")
            writer.add_tensor(own, quantize(np.ascontiguousarray(matrix.numpy()), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, quantize(np.ascontiguousarray(tensor.numpy()), kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, config) -> None:
    """What the converter writes for every architecture (TextModel.set_gguf_parameters), and for those of Qwen and
    gpt-oss beside it (conversion/qwen.py, gpt_oss.py)."""
    told, rope = config.to_dict(), getattr(config, "rope_parameters", None) or {}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if told.get("intermediate_size"):
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(told.get("rms_norm_eps") or told.get("norm_eps") or config.layer_norm_eps)
    writer.add_expert_used_count(told.get("top_k_experts") or config.num_experts_per_tok)
    if config.model_type not in ALONE:
        return
    add_rope(writer, rope)
    writer.add_expert_count(told.get("num_experts") or config.num_local_experts)
    writer.add_expert_feed_forward_length(told.get("moe_intermediate_size") or config.intermediate_size)
    if told.get("head_dim"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if told.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
    if told.get("linear_num_value_heads"):
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
        writer.add_full_attention_interval(2)
        writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))


def add_rope(writer: gguf.GGUFWriter, rope: dict) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0, 0, 0][:4])


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, split: str = "gpt-2") -> None:
    """A byte-level vocabulary with its merges and its chat template, as the converter writes them."""
    tokenizer, written = AutoTokenizer.from_pretrained(folder), json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token["special"] for token in written["added_tokens"]}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    kinds = (gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([kinds[added[i]] if i in added else gguf.TokenType.NORMAL for _, i in vocabulary])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge)
                             for merge in written["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def named(names: gguf.TensorNameMap, key: str) -> str:
    found = names.get_name(key, try_suffixes=(".weight", ".bias"))
    assert found, key
    return found


def turned(kind: str, config, key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One parameter as a GGUF file has it; names that its converter writes by itself begin with blk."""
    block = f"blk.{key.split('.')[2]}." if key.startswith("model.layers.") else ""
    if key == "lm_head.weight" and config.tie_word_embeddings:
        return
    if ".experts." in key:
        yield from experts(kind, key, value)
    elif kind in ("mixtral", "granitemoe") and ("q_proj" in key or "k_proj" in key):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        yield key, value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    elif own := next((name for end, name in (RENAMED | PLAIN_BLOCKS.get(kind, {})).items() if key.endswith(end)), ""):
        yield block + own, value.squeeze()
    elif "conv.conv" in key:
        yield key, value.squeeze(1)
    elif kind in SPLIT_LATENT and "kv_b_proj" in key:
        rows = value.view(config.num_attention_heads, -1, value.shape[-1])
        keys, values = rows.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield key.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2)
        yield key.replace("kv_b_proj", "v_b_proj"), values
    elif key.endswith(("sinks", "layer_scalar")):
        yield key + ".weight", value
    elif key.endswith("router.scale"):
        yield block + "ffn_gate_inp.scale", value
    elif key.endswith("per_expert_scale"):
        yield block + "ffn_down_exps.scale", value
    elif kind in ("qwen3_next", "qwen3_5_moe_text"):
        yield from linear_attention(kind, config, key, value)
    else:
        yield key, value


def experts(kind: str, key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    base, _, own = key.rpartition(".")
    suffix = "bias" if own.endswith("_bias") else "weight"
    if kind == "gpt_oss" and suffix == "weight":
        value = value.transpose(-1, -2)
    if kind in ("lfm2_moe", "granitemoe", "cohere2_moe"):
        block, parts = f"blk.{key.split('.')[2]}.", value.chunk(2, 1) if own == "gate_up_proj" else (value,)
        yield from ((f"{block}ffn_{part}_exps.weight", tensor)
                    for part, tensor in zip(("gate", "up") if len(parts) == 2 else ("down",), parts, strict=True))
        return
    if "down_proj" in own or kind == "gemma4_text":
        yield f"{base}.{own.removesuffix('_bias')}.{suffix}", value
        return
    gate, up = (value[:, ::2], value[:, 1::2]) if kind == "gpt_oss" else value.chunk(2, 1)
    yield f"{base}.gate_proj.{suffix}", gate
    yield f"{base}.up_proj.{suffix}", up


def linear_attention(kind: str, config, key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Norms plus one, -exp(A_log), the convolution without its middle axis; Qwen3.5: value heads from groups to tiles;
    Qwen3-Next: query, key, value and z of all heads one behind the other."""
    keys, values, size = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    first = 2 * config.linear_key_head_dim * keys

    def tiled(tensor: Tensor, width: int, axis: int = 0) -> Tensor:
        if kind == "qwen3_next":
            return tensor
        return tensor.unflatten(axis, (keys, values // keys, width)).transpose(axis, axis + 1).reshape(tensor.shape)
    own = key.rpartition("linear_attn.")[2]
    if key.endswith("norm.weight") and own != "norm.weight":
        yield key, value + 1
    elif own == "A_log":
        yield key, tiled(-torch.exp(value), 1)
    elif own == "dt_bias":
        yield key.replace("dt_bias", "dt_proj.bias"), tiled(value, 1)
    elif own == "in_proj_qkvz.weight":
        ratio = values // keys * size
        parts = value.unflatten(0, (keys, -1)).split([first // keys // 2, first // keys // 2, ratio, ratio], 1)
        q, k, v, z = (part.flatten(0, 1) for part in parts)
        block = f"blk.{key.split('.')[2]}."
        yield block + "attn_qkv.weight", torch.cat((q, k, v))
        yield block + "attn_gate.weight", z
    elif own in ("in_proj_qkv.weight", "conv1d.weight"):
        value = value.squeeze()
        yield key, torch.cat((value[:first], tiled(value[first:], size)))
    elif own in ("in_proj_z.weight", "out_proj.weight"):
        yield key, tiled(value, size, int(own == "out_proj.weight"))
    elif own in ("in_proj_a.weight", "in_proj_b.weight"):
        yield key, tiled(value, 1)
    else:
        yield key, value.squeeze(0) if "shared_expert_gate" in key else value


def tiny(folder: Path, name: str) -> tuple[Path, Path]:
    """-> (a GGUF file of that name with a random model, a folder like its original)."""
    torch.manual_seed(0)
    model = build("qwen3_moe", moe_intermediate_size=64, num_experts=4)
    (file,) = write(folder / name, "qwen3_moe", model)
    return file, like(folder / "original", model)


def like(folder: Path, model: torch.nn.Module, tokenizer: bool = True) -> Path:
    """A folder with configuration and chat template, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    if tokenizer:
        write_tokenizer(folder)
    return folder
