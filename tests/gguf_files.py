"""Small GGUF files from transformers models, written with the gguf package and its own table of names.

`write` turns the model's tensors the way llama.cpp's converter does; the importer has to turn them back.
"""
from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize

from tests.folders import write_tokenizer

Tensor = torch.Tensor
ARCHITECTURES = {"qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE, "qwen3_5_moe_text": gguf.MODEL_ARCH.QWEN35MOE,
                 "gpt_oss": gguf.MODEL_ARCH.GPT_OSS, "mixtral": gguf.MODEL_ARCH.LLAMA,
                 "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2, "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2}


def write(path: Path, kind: str, model: torch.nn.Module, quantisation: str = "F32") -> None:
    """Experts as `quantisation` says, everything else in float32."""
    architecture = ARCHITECTURES[kind]
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_expert_used_count(config.num_experts_per_tok)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        for name, tensor in turned(kind, config, key, value.float()):
            name = name if name.startswith("blk.") else named(names, name)
            kinds = getattr(gguf.GGMLQuantizationType, quantisation if "_exps.weight" in name else "F32")
            writer.add_tensor(name, quantize(np.ascontiguousarray(tensor.numpy()), kinds), raw_dtype=kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named(names: gguf.TensorNameMap, key: str) -> str:
    found = names.get_name(key, try_suffixes=(".weight", ".bias"))
    assert found, key
    return found


def turned(kind: str, config, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """One parameter to (checkpoint name or blk. name, tensor) as a GGUF file has them."""
    block = f"blk.{key.split('.')[2]}." if key.startswith("model.layers.") else ""
    if ".experts." in key:
        return experts(kind, block, key, value)
    if kind == "mixtral" and ("q_proj" in key or "k_proj" in key):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        return [(key, value.reshape(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape))]
    if "e_score_correction_bias" in key:
        return [(block + "exp_probs_b.bias", value)]
    if kind == "deepseek_v3" and "kv_b_proj" in key:
        rows = value.unflatten(0, (config.num_attention_heads, -1))
        k, v = rows.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return [(block + "attn_k_b.weight", k.transpose(1, 2)), (block + "attn_v_b.weight", v)]
    if kind == "gpt_oss" and "sinks" in key:
        return [(block + "attn_sinks.weight", value)]
    if kind == "gpt_oss" and "post_attention_layernorm" in key:
        return [(block + "post_attention_norm.weight", value)]
    return qwen35(config, block, key, value) if kind == "qwen3_5_moe_text" else [(key, value)]


def experts(kind: str, block: str, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    suffix = "bias" if key.endswith("_bias") else "weight"
    if kind == "gpt_oss" and suffix == "weight":
        value = value.transpose(1, 2)
    if "down_proj" in key:
        return [(f"{block}ffn_down_exps.{suffix}", value)]
    gate, up = (value[:, 0::2], value[:, 1::2]) if kind == "gpt_oss" else value.chunk(2, 1)
    return [(f"{block}ffn_gate_exps.{suffix}", gate), (f"{block}ffn_up_exps.{suffix}", up)]


def qwen35(config, block: str, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """llama.cpp stores norms plus one, -exp(A_log), and value heads in the order of ggml's broadcast."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    size, first = config.linear_value_head_dim, 2 * config.linear_key_head_dim * keys

    def tiled(tensor: Tensor, width: int, axis: int = 0) -> Tensor:
        return tensor.unflatten(axis, (keys, values // keys, width)).transpose(axis, axis + 1).reshape(tensor.shape)
    if "linear_attn." not in key:
        if "shared_expert_gate" in key:
            return [(block + "ffn_gate_inp_shexp.weight", value.squeeze(0))]
        return [(key, value + 1 if key.endswith("norm.weight") else value)]
    own = key.partition("linear_attn.")[2]
    turn = {"in_proj_qkv.weight": ("attn_qkv.weight", lambda t: torch.cat((t[:first], tiled(t[first:], size)))),
            "conv1d.weight": ("ssm_conv1d.weight",
                              lambda t: torch.cat((t.squeeze()[:first], tiled(t.squeeze()[first:], size)))),
            "in_proj_z.weight": ("attn_gate.weight", lambda t: tiled(t, size)),
            "in_proj_b.weight": ("ssm_beta.weight", lambda t: tiled(t, 1)),
            "in_proj_a.weight": ("ssm_alpha.weight", lambda t: tiled(t, 1)),
            "A_log": ("ssm_a", lambda t: tiled(-torch.exp(t), 1)), "dt_bias": ("ssm_dt.bias", lambda t: tiled(t, 1)),
            "norm.weight": ("ssm_norm.weight", lambda t: t),
            "out_proj.weight": ("ssm_out.weight", lambda t: tiled(t, size, 1))}
    name, change = turn[own]
    return [(block + name, change(value))]


def like(folder: Path, model: torch.nn.Module) -> Path:
    """A folder with the configuration and a tokenizer alone."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
