"""Which tensors of a GGUF file make which parameter of a transformers model, for the architectures that are imported.

GGUF files carry the names and the conventions of llama.cpp: experts stacked, rotary halves interleaved for Mixtral and
Granite, norms shifted by one for Qwen3-Next and Qwen3.5, value heads re-ordered for the latter, gpt-oss's gate and up
apart, DeepSeek's latent matrix split per head. `recipes` undoes all of it. A recipe names its parts and says how to put
them together; `by_expert` recipes may be made for a range of experts from those rows alone. Knows no file and no
quantisation. Source: conversion/*.py of llama.cpp, tensor_mapping.py of the gguf package.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
Make = Callable[..., Tensor]
# general.architecture of the file -> the model types of transformers that it may hold.
ARCHITECTURES = {"qwen3moe": ("qwen3_moe",), "qwen35moe": ("qwen3_5_moe_text", "qwen3_5_moe"),
                 "qwen3next": ("qwen3_next",), "gpt-oss": ("gpt_oss",), "llama": ("mixtral",), "olmoe": ("olmoe",),
                 "deepseek2": ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), "glm4moe": ("glm4_moe",),
                 "gemma4": ("gemma4_text", "gemma4"), "qwen2moe": ("qwen2_moe",), "dots1": ("dots1",),
                 "minimax-m2": ("minimax_m2",), "ernie4_5-moe": ("ernie4_5_moe",), "exaone-moe": ("exaone_moe",),
                 "hunyuan-moe": ("hunyuan_v1_moe",), "afmoe": ("afmoe",), "phimoe": ("phimoe",),
                 "lfm2moe": ("lfm2_moe",), "granitemoe": ("granitemoe",), "cohere2moe": ("cohere2_moe",),
                 "qwen3vlmoe": ("qwen3_moe",)}
MODEL_TYPES = {model_type: name for name, types in ARCHITECTURES.items() for model_type in types}
SHIFTED = ("qwen35moe", "qwen3next")            # norms are stored as 1 + weight
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight", "output_norm.bias": "model.norm.bias", "output.bias": "lm_head.bias",
       "token_embd_norm.weight": "model.embedding_norm.weight"}
BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight", "attn_output.weight": "self_attn.o_proj.weight",
    "attn_output.bias": "self_attn.o_proj.bias", "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    **{f"attn_{x}.{kind}": f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")},
    **{f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
    **{f"ffn_{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}}
GPT_OSS = {"attn_sinks.weight": "self_attn.sinks", "ffn_gate_inp.weight": "mlp.router.weight",
           "ffn_gate_inp.bias": "mlp.router.bias"}
LATENT = {"attn_q_a.weight": "self_attn.q_a_proj.weight", "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
          "attn_q_b.weight": "self_attn.q_b_proj.weight", "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
          "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
          "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight"}
GEMMA4 = {"ffn_norm.weight": "pre_feedforward_layernorm.weight", "post_ffw_norm.weight":
          "post_feedforward_layernorm.weight", "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
          "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight":
          "pre_feedforward_layernorm_2.weight", "ffn_gate_inp.weight": "router.proj.weight", "ffn_gate_inp.scale":
          "router.scale", "ffn_down_exps.scale": "router.per_expert_scale", "layer_output_scale.weight":
          "layer_scalar"}
SHARED = {f"ffn_{part}_shexp.weight": f"mlp.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")}
HUNYUAN = {"attn_q_norm.weight": "self_attn.query_layernorm.weight", "attn_k_norm.weight":
           "self_attn.key_layernorm.weight", "ffn_gate_inp.weight": "mlp.gate.wg.weight"}
AFMOE = {"attn_gate.weight": "self_attn.gate_proj.weight", "ffn_norm.weight": "pre_mlp_layernorm.weight",
         "post_ffw_norm.weight": "post_mlp_layernorm.weight", "ffn_gate_inp.weight": "mlp.router.gate.weight",
         "exp_probs_b.bias": "mlp.expert_bias"}
PHIMOE = {"attn_norm.bias": "input_layernorm.bias", "ffn_norm.bias": "post_attention_layernorm.bias",
          "ffn_gate_inp.weight": "mlp.router.weight"}
LFM2MOE = {"attn_norm.weight": "operator_norm.weight", "ffn_norm.weight": "ffn_norm.weight",
           "attn_output.weight": "self_attn.out_proj.weight", "ffn_gate_inp.weight": "feed_forward.gate.weight",
           "exp_probs_b.bias": "feed_forward.expert_bias", "shortconv.conv.weight": "conv.conv.weight",
           **{f"attn_{x}_norm.weight": f"self_attn.{x}_layernorm.weight" for x in "qk"},
           **{f"shortconv.{x}_proj.weight": f"conv.{x}_proj.weight" for x in ("in", "out")},
           **{f"ffn_{part}.weight": f"feed_forward.{w}.weight" for part, w in
              (("gate", "w1"), ("up", "w3"), ("down", "w2"))}}
# Per architecture, what its blocks name besides BLOCK_NAMES, or otherwise.
OWN_NAMES = {"gpt-oss": GPT_OSS, "deepseek2": LATENT, "gemma4": GEMMA4, "hunyuan-moe": HUNYUAN, "afmoe": AFMOE,
             "phimoe": PHIMOE, "lfm2moe": LFM2MOE,
             "minimax-m2": {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
             "ernie4_5-moe": {"exp_probs_b.bias": "mlp.gate.moe_statics.e_score_correction_bias"},
             "granitemoe": {"ffn_gate_inp.weight": "block_sparse_moe.router.weight"}}
SHARED_NAME = {"qwen35moe": "shared_expert", "qwen3next": "shared_expert", "qwen2moe": "shared_expert",
               "hunyuan-moe": "shared_mlp"}     # the others: shared_experts
EXPERTS_NAME = {"gemma4": "experts.", "lfm2moe": "feed_forward.experts.", "granitemoe": "block_sparse_moe.experts."}
ROTARY_PAIRS = ("llama", "granitemoe")          # whose converter interleaves the two halves of every head
ONE_ROW = ("mlp.shared_expert_gate.weight", "mlp.gate.moe_statics.e_score_correction_bias")
EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(weight|bias)$")
BLOCK = re.compile(r"blk\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Recipe:
    """parts: GGUF names. make: their values, in that order, to the parameter; with `by_expert` also for some experts'
    rows of every part."""

    parts: tuple[str, ...]
    make: Make = lambda tensor: tensor
    by_expert: bool = False


@dataclass(frozen=True)
class Shape:
    """Numbers of the model that the conventions need; key_*, value_*: heads and head sizes of linear attention."""

    heads: int
    kv_heads: int
    layers: int
    key_heads: int = 0
    value_heads: int = 0
    key_size: int = 0
    value_size: int = 0

    @staticmethod
    def of(config) -> Shape:
        """From a transformers text configuration."""
        def number(name: str) -> int:
            return int(getattr(config, name, None) or 0)
        heads = number("num_attention_heads")
        return Shape(heads, number("num_key_value_heads") or heads, number("num_hidden_layers"),
                     number("linear_num_key_heads"), number("linear_num_value_heads"), number("linear_key_head_dim"),
                     number("linear_value_head_dim"))


def recipes(architecture: str, names: Iterable[str], shape: Shape) -> tuple[dict[str, Recipe], list[str]]:
    """Parameter name -> how it is made, and the GGUF tensors that nothing asks for."""
    names = list(names)
    made = {TOP[name]: Recipe((name,), _plain(architecture, TOP[name])) for name in names if name in TOP}
    blocks: dict[int, dict[str, str]] = {}
    for name in names:
        found = BLOCK.match(name)
        if found and int(found[1]) < shape.layers:
            blocks.setdefault(int(found[1]), {})[found[2]] = name
    for number, own in blocks.items():
        for parameter, recipe in _block(architecture, own, shape).items():
            made[f"model.layers.{number}.{parameter}"] = recipe
    used = {part for recipe in made.values() for part in recipe.parts}
    return made, [name for name in names if name not in used]


def _block(architecture: str, own: dict[str, str], shape: Shape) -> dict[str, Recipe]:
    shared = SHARED_NAME.get(architecture, "shared_experts")
    plain = BLOCK_NAMES | {name: parameter.format(shared) for name, parameter in SHARED.items()}
    plain |= OWN_NAMES.get(architecture, {})
    made = {plain[name]: Recipe((full,), _plain(architecture, plain[name])) for name, full in own.items()
            if name in plain}
    if architecture in ROTARY_PAIRS:
        for name, heads in (("attn_q.weight", shape.heads), ("attn_k.weight", shape.kv_heads)):
            if name in own:
                made[plain[name]] = Recipe((own[name],), lambda tensor, heads=heads: unpermuted(tensor, heads))
    if "attn_k_b.weight" in own and "attn_v_b.weight" in own:
        made["self_attn.kv_b_proj.weight"] = Recipe((own["attn_k_b.weight"], own["attn_v_b.weight"]), joined_latent)
    if architecture in SHIFTED:
        made |= _linear_attention(own, shape, tiled=architecture == "qwen35moe")
    base = EXPERTS_NAME.get(architecture, "mlp.experts.")
    return made | {base + name: recipe for name, recipe in _experts(own, architecture == "gpt-oss").items()}


def _plain(architecture: str, parameter: str) -> Make:
    """Of one tensor that is one parameter: with the axes of length one that the converter takes away."""
    if parameter in ONE_ROW:
        return lambda tensor: tensor.reshape(1, -1)
    if parameter == "conv.conv.weight":
        return lambda tensor: tensor.reshape(tensor.shape[0], 1, -1)
    if architecture in SHIFTED and parameter.endswith("norm.weight"):
        return lambda tensor: tensor.float() - 1
    return lambda tensor: tensor


def _experts(own: dict[str, str], interleaved: bool) -> dict[str, Recipe]:
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I]; gpt-oss: [E, H, 2I] interleaved and [E, I, H], and biases."""
    made = {}
    has = {EXPERTS.match(name).groups(): full for name, full in own.items() if EXPERTS.match(name)}
    if ("gate", "weight") in has and ("up", "weight") in has:
        make = _interleaved if interleaved else lambda gate, up: torch.cat((gate, up), 1)
        made["gate_up_proj"] = Recipe((has["gate", "weight"], has["up", "weight"]), make, True)
    if ("gate_up", "weight") in has:
        made["gate_up_proj"] = Recipe((has["gate_up", "weight"],), by_expert=True)
    if ("down", "weight") in has:
        turn = (lambda down: down.transpose(1, 2)) if interleaved else (lambda down: down)
        made["down_proj"] = Recipe((has["down", "weight"],), turn, True)
    if {("gate", "bias"), ("up", "bias"), ("down", "bias")} <= has.keys():
        made["gate_up_proj_bias"] = Recipe((has["gate", "bias"], has["up", "bias"]),
                                           lambda gate, up: torch.stack((gate, up), 2).flatten(1), True)
        made["down_proj_bias"] = Recipe((has["down", "bias"],), by_expert=True)
    return made


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2)


def unpermuted(tensor: Tensor, heads: int) -> Tensor:
    """[heads * d, H] with the two halves of every head interleaved, as llama.cpp wants it, back to halves."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def joined_latent(key: Tensor, value: Tensor) -> Tensor:
    """key [heads, latent, nope], value [heads, v, latent] -> kv_b_proj [heads * (nope + v), latent]."""
    return torch.cat((key.transpose(1, 2), value), 1).flatten(0, 1)


def _linear_attention(own: dict[str, str], shape: Shape, tiled: bool) -> dict[str, Recipe]:
    """The gated delta rule: A_log from -exp(A_log), the convolution's middle axis.

    tiled (Qwen3.5): value heads go back into the groups of their key heads. Else (Qwen3-Next) query, key, value and z
    go back into one matrix, key head by key head; older files have not taken it apart.
    """
    def rows(size: int, axis: int = 0) -> Make:
        return (lambda tensor: grouped(tensor, shape, size, axis)) if tiled else (lambda tensor: tensor)

    def behind_keys(tensor: Tensor) -> Tensor:
        keys = 2 * shape.key_heads * shape.key_size
        return torch.cat((tensor[:keys], rows(shape.value_size)(tensor[keys:])))
    one = {"ssm_a": ("A_log", lambda t: rows(1)(torch.log(-t.float().flatten()))), "ssm_dt.bias": ("dt_bias", rows(1)),
           "ssm_conv1d.weight": ("conv1d.weight", lambda t: behind_keys(t.squeeze())[:, None]),
           "ssm_norm.weight": ("norm.weight", lambda t: t), "ssm_beta.weight": ("in_proj_b.weight", rows(1)),
           "ssm_alpha.weight": ("in_proj_a.weight", rows(1)), "ssm_ba.weight": ("in_proj_ba.weight", lambda t: t),
           "ssm_in.weight": ("in_proj_qkvz.weight", lambda t: t),
           "ssm_out.weight": ("out_proj.weight", rows(shape.value_size, 1))}
    if tiled:
        one |= {"attn_qkv.weight": ("in_proj_qkv.weight", behind_keys),
                "attn_gate.weight": ("in_proj_z.weight", rows(shape.value_size))}
    made = {f"linear_attn.{one[name][0]}": Recipe((full,), one[name][1]) for name, full in own.items() if name in one}
    if not tiled and "attn_qkv.weight" in own and "attn_gate.weight" in own:
        made["linear_attn.in_proj_qkvz.weight"] = Recipe((own["attn_qkv.weight"], own["attn_gate.weight"]),
                                                         lambda qkv, z: joined_qkvz(qkv, z, shape))
    return made


def grouped(tensor: Tensor, shape: Shape, size: int, axis: int = 0) -> Tensor:
    """Value heads from llama.cpp's order (all first heads of the groups, then all second) back to group by group."""
    per_group = shape.value_heads // shape.key_heads
    return tensor.unflatten(axis, (per_group, shape.key_heads, size)).transpose(axis, axis + 1).reshape(tensor.shape)


def joined_qkvz(qkv: Tensor, z: Tensor, shape: Shape) -> Tensor:
    """qkv [keys + keys + values, H], z [values, H] -> for each key head its rows of query, key, value and z."""
    keys = shape.key_heads * shape.key_size
    parts = (qkv[:keys], qkv[keys:2 * keys], qkv[2 * keys:], z)
    return torch.cat([part.unflatten(0, (shape.key_heads, -1)) for part in parts], 1).flatten(0, 1)
