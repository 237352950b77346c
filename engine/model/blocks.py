"""What a fused step computes, read off the modules of an open model: architectures are told by the classes of their
modules. The tensors are the model's own.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from engine.model.packed import Packed
from engine.model.registration import FloeExperts
from kernels.trunk.attend import Heads
from kernels.trunk.delta import Mixer
from kernels.trunk.linear import Matrices
from kernels.trunk.token import Block, Norm

Tensor = torch.Tensor
KNOWN = {"Qwen3MoeForCausalLM", "OlmoeForCausalLM", "MixtralForCausalLM", "Qwen3NextForCausalLM",
         "Qwen3_5MoeForCausalLM", "GptOssForCausalLM"}
CENTRED = {"Qwen3NextRMSNorm", "Qwen3_5MoeRMSNorm"}  # norms whose weights are kept less one
WINDOWED = {"GptOssForCausalLM"}  # whose windows are those of their cache's layers
HALVED = {"GptOssRotaryEmbedding"}  # which name the angle of both halves of a head once
STEADY = {"default", "linear", "llama3", "yarn"}  # kinds of rotation that do not depend on how long the text is


def is_known(model: nn.Module) -> bool:
    """Whether `block_of` tells all that its layers compute."""
    config = model.config
    name, has_window = type(model).__name__, getattr(config, "sliding_window", None) is not None
    return (name in KNOWN and (name in WINDOWED or not has_window)
            and getattr(config, "clip_qkv", None) is None and model.model.rotary_emb.rope_type in STEADY
            and config.hidden_act == "silu" and any(hasattr(layer, "self_attn") for layer in model.model.layers))


def block_of(layer: nn.Module, config: object) -> Block:
    """Of one decoder layer."""
    mixing, projections, output = (_heads(layer.self_attn, config) if hasattr(layer, "self_attn")
                                   else _mixer(layer.linear_attn))
    has_router = isinstance(getattr(layer.mlp, "experts", None), FloeExperts)
    return Block(mixing, norm(layer.input_layernorm), projections, output, norm(layer.post_attention_layernorm),
                 *_routed(layer.mlp) if has_router else (None,))


def _heads(own: nn.Module, config: object) -> tuple[Heads, Matrices, Matrices]:
    """How it attends, what leads there, and back."""
    norms = [norm(getattr(own, name)).weight if hasattr(own, name) else None for name in ("q_norm", "k_norm")]
    queries = config.num_attention_heads
    heads = Heads(queries, config.num_key_value_heads, own.head_dim, own.scaling, *norms, config.rms_norm_eps,
                  gated=own.q_proj.weight.shape[0] == 2 * queries * own.head_dim,
                  window=getattr(own, "sliding_window", None) or 0, sinks=_floats(getattr(own, "sinks", None)))
    return heads, matrices(own.q_proj, own.k_proj, own.v_proj), matrices(own.o_proj)


def _mixer(own: nn.Module) -> tuple[Mixer, Matrices, Matrices]:
    """As `_heads`, of a gated delta-net."""
    by_head = hasattr(own, "in_proj_qkvz")
    names = ("in_proj_qkvz", "in_proj_ba") if by_head else ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    convolution, rate, bias, weight = map(_floats, (
        own.conv1d.weight[:, 0], -own.A_log.float().exp(), own.dt_bias, own.norm.weight))
    mixer = Mixer(own.num_k_heads, own.num_v_heads, own.head_k_dim, own.head_v_dim, by_head, convolution, rate, bias,
                  weight, own.norm.variance_epsilon)
    return mixer, matrices(*(getattr(own, name) for name in names)), matrices(own.out_proj)


def _routed(mlp: nn.Module) -> tuple[Matrices, int, int, bool, Matrices | None]:
    """Router, E, k, whether shares are renormalised, and a shared expert's way back."""
    gate, own = mlp.router if hasattr(mlp, "router") else mlp.gate, getattr(mlp, "shared_expert", None)
    more = () if own is None else (mlp.shared_expert_gate, own.gate_proj, own.up_proj)
    return (matrices(gate, *more), len(gate.weight), gate.top_k, getattr(gate, "norm_topk_prob", True),
            None if own is None else matrices(own.down_proj))


def rotation_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """-> a function of a tensor of the wanted dtype and device, and of positions [T]: cosines and sines [2, T, D]."""
    own = model.model.rotary_emb

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        found = torch.cat(own(x, positions[None]))
        return torch.cat((found, found), -1) if type(own).__name__ in HALVED else found
    return turn


def norm(module: nn.Module) -> Norm:
    """Of a root-mean-square norm."""
    if type(module).__name__ in CENTRED:
        return Norm(1 + module.weight.detach().float(), module.eps)
    return Norm(module.weight.detach(), module.variance_epsilon)


def matrices(*modules: nn.Module) -> Matrices:
    """Of linear layers over one input, packed or not, in their order."""
    def part(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight, bias = module.weight, getattr(module, "bias", None)
        bias = None if bias is None else bias.detach()
        return (weight.codes, weight.scales, bias) if isinstance(weight, Packed) else (weight.detach(), None, bias)
    return Matrices(tuple(part(module) for module in modules))


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()
