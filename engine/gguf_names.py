"""Which tensors of a GGUF file make which parameter of a transformers model, for the architectures that are imported.

GGUF files carry the names and the conventions of llama.cpp: experts stacked, rotary halves interleaved for Llama and
Mixtral, norms shifted by one and value heads re-ordered for Qwen3.5. `recipes` undoes all of it. A recipe names its
parts and says how to put them together; `by_expert` recipes may be made for a range of experts from those rows alone.
Knows no file and no quantisation.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
# general.architecture of the file -> the model types of transformers that it may hold.
ARCHITECTURES = {"qwen3moe": ("qwen3_moe",), "qwen35moe": ("qwen3_5_moe_text", "qwen3_5_moe"), "gpt-oss": ("gpt_oss",),
                 "llama": ("mixtral",), "deepseek2": ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}
ATTENTION = {"attn_norm.weight": "input_layernorm.weight", "attn_q.weight": "self_attn.q_proj.weight",
             "attn_k.weight": "self_attn.k_proj.weight", "attn_v.weight": "self_attn.v_proj.weight",
             "attn_output.weight": "self_attn.o_proj.weight", "attn_q.bias": "self_attn.q_proj.bias",
             "attn_k.bias": "self_attn.k_proj.bias", "attn_v.bias": "self_attn.v_proj.bias",
             "attn_output.bias": "self_attn.o_proj.bias", "attn_q_norm.weight": "self_attn.q_norm.weight",
             "attn_k_norm.weight": "self_attn.k_norm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
             "post_attention_norm.weight": "post_attention_layernorm.weight", "attn_sinks.weight": "self_attn.sinks"}
LATENT = {"attn_q_a.weight": "self_attn.q_a_proj.weight", "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
          "attn_q_b.weight": "self_attn.q_b_proj.weight", "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
          "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
          "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight"}
DENSE = {"ffn_gate.weight": "mlp.gate_proj.weight", "ffn_up.weight": "mlp.up_proj.weight",
         "ffn_down.weight": "mlp.down_proj.weight"}
ROUTER = {"ffn_gate_inp.weight": "mlp.gate.weight", "exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
SHARED = {f"ffn_{part}_shexp.weight": f"mlp.shared_{{}}.{part}_proj.weight" for part in ("gate", "up", "down")}
DELTA = {"attn_qkv.weight": "in_proj_qkv.weight", "attn_gate.weight": "in_proj_z.weight",
         "ssm_beta.weight": "in_proj_b.weight", "ssm_alpha.weight": "in_proj_a.weight", "ssm_conv1d.weight":
         "conv1d.weight", "ssm_dt.bias": "dt_bias", "ssm_a": "A_log", "ssm_norm.weight": "norm.weight",
         "ssm_out.weight": "out_proj.weight"}
EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(weight|bias)$")
BLOCK = re.compile(r"blk\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Recipe:
    """parts: GGUF names. make: their values, in that order, to the parameter; with `by_expert` also for some experts'
    rows of every part."""

    parts: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor
    by_expert: bool = False


@dataclass(frozen=True)
class Shape:
    """Numbers of the model that the conventions need; deltas: heads and head size of Qwen3.5's linear attention."""

    heads: int
    kv_heads: int
    layers: int
    nope: int = 0
    value: int = 0
    key_heads: int = 0
    value_heads: int = 0
    key_size: int = 0
    value_size: int = 0

    @staticmethod
    def of(config) -> Shape:
        """From a transformers text configuration."""
        def number(*names: str) -> int:
            return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)
        heads = number("num_attention_heads")
        return Shape(heads, number("num_key_value_heads") or heads, number("num_hidden_layers"),
                     number("qk_nope_head_dim"), number("v_head_dim"), number("linear_num_key_heads"),
                     number("linear_num_value_heads"), number("linear_key_head_dim"), number("linear_value_head_dim"))


def recipes(architecture: str, names: Iterable[str], shape: Shape) -> tuple[dict[str, Recipe], list[str]]:
    """Parameter name -> how it is made, and the GGUF tensors that nothing asks for."""
    names = list(names)
    made = {TOP[name]: Recipe((name,), _shifted(architecture, TOP[name])) for name in names if name in TOP}
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
    plain = ATTENTION | ROUTER | DENSE | (LATENT if architecture == "deepseek2" else {})
    shared = "experts" if architecture == "deepseek2" else "expert"
    plain |= {name: parameter.format(shared) for name, parameter in SHARED.items()}
    if architecture == "gpt-oss":
        plain |= {"ffn_gate_inp.weight": "mlp.router.weight", "ffn_gate_inp.bias": "mlp.router.bias"}
    made = {plain[name]: Recipe((full,), _shifted(architecture, plain[name])) for name, full in own.items()
            if name in plain}
    if architecture == "llama":
        for name, heads in (("attn_q.weight", shape.heads), ("attn_k.weight", shape.kv_heads)):
            if name in own:
                made[plain[name]] = Recipe((own[name],), lambda tensor, heads=heads: unpermuted(tensor, heads))
    if "attn_k_b.weight" in own:
        made["self_attn.kv_b_proj.weight"] = Recipe((own["attn_k_b.weight"], own["attn_v_b.weight"]), joined_latent)
    if architecture == "qwen35moe":
        made |= _qwen35(own, shape)
    return made | _experts(own, interleaved=architecture == "gpt-oss")


def _shifted(architecture: str, parameter: str) -> Callable[[Tensor], Tensor]:
    """Norms of Qwen3.5 are stored as 1 + weight."""
    if architecture == "qwen35moe" and parameter.endswith("norm.weight"):
        return lambda tensor: tensor.float() - 1
    return lambda tensor: tensor


def _experts(own: dict[str, str], interleaved: bool) -> dict[str, Recipe]:
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I]; gpt-oss: [E, H, 2I] interleaved and [E, I, H], and biases."""
    made, base = {}, "mlp.experts."
    has = {EXPERTS.match(name).groups(): full for name, full in own.items() if EXPERTS.match(name)}
    if ("gate", "weight") in has and ("up", "weight") in has:
        make = _interleaved if interleaved else lambda gate, up: torch.cat((gate, up), 1)
        made[base + "gate_up_proj"] = Recipe((has["gate", "weight"], has["up", "weight"]), make, True)
    if ("gate_up", "weight") in has:
        made[base + "gate_up_proj"] = Recipe((has["gate_up", "weight"],), by_expert=True)
    if ("down", "weight") in has:
        turn = (lambda down: down.transpose(1, 2)) if interleaved else (lambda down: down)
        made[base + "down_proj"] = Recipe((has["down", "weight"],), turn, True)
    if ("gate", "bias") in has:
        made[base + "gate_up_proj_bias"] = Recipe((has["gate", "bias"], has["up", "bias"]),
                                                  lambda gate, up: torch.stack((gate, up), 2).flatten(1), True)
        made[base + "down_proj_bias"] = Recipe((has["down", "bias"],), by_expert=True)
    return made


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2)


def unpermuted(tensor: Tensor, heads: int) -> Tensor:
    """[heads * d, H] with the two halves of every head interleaved, as llama.cpp wants it, back to halves."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def joined_latent(key: Tensor, value: Tensor) -> Tensor:
    """key [heads, latent, nope], value [heads, v, latent] -> kv_b_proj [heads * (nope + v), latent]."""
    return torch.cat((key.transpose(1, 2), value), 1).flatten(0, 1)


def grouped(tensor: Tensor, shape: Shape, size: int, axis: int = 0) -> Tensor:
    """Value heads from llama.cpp's order (all first heads of the groups, then all second) back to group by group."""
    per_group = shape.value_heads // shape.key_heads
    return tensor.unflatten(axis, (per_group, shape.key_heads, size)).transpose(axis, axis + 1).reshape(tensor.shape)


def _qwen35(own: dict[str, str], shape: Shape) -> dict[str, Recipe]:
    """Linear attention: value heads in groups again, A_log from -exp(A_log), the convolution's middle axis."""
    def behind(tensor: Tensor) -> Tensor:
        keys = 2 * shape.key_heads * shape.key_size
        return torch.cat((tensor[:keys], grouped(tensor[keys:], shape, shape.value_size)))

    def heads(tensor: Tensor) -> Tensor:
        return grouped(tensor, shape, 1)
    make = {"in_proj_qkv.weight": behind, "conv1d.weight": lambda t: behind(t.squeeze())[:, None],
            "in_proj_z.weight": lambda t: grouped(t, shape, shape.value_size), "in_proj_b.weight": heads,
            "in_proj_a.weight": heads, "dt_bias": heads, "A_log": lambda t: heads(torch.log(-t.float())),
            "norm.weight": lambda t: t, "out_proj.weight": lambda t: grouped(t, shape, shape.value_size, 1)}
    made = {f"linear_attn.{parameter}": Recipe((own[name],), make[parameter]) for name, parameter in DELTA.items()
            if name in own}
    if "ffn_gate_inp_shexp.weight" in own:
        made["mlp.shared_expert_gate.weight"] = Recipe((own["ffn_gate_inp_shexp.weight"],), lambda t: t.reshape(1, -1))
    return made
