"""What a fused step computes, read off the modules of an open model: architectures are told by the classes of their
modules. The tensors are the model's own.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from engine.model.packed import Packed
from engine.model.registration import FloeExperts
from kernels.trunk.attend import Heads
from kernels.trunk.delta import Mixer
from kernels.trunk.latent import Latent
from kernels.trunk.linear import Matrices
from kernels.trunk.route import Choice
from kernels.trunk.settle import Settling
from kernels.trunk.token import Block, Norm

Tensor = torch.Tensor
KNOWN = {"Qwen3MoeForCausalLM", "OlmoeForCausalLM", "MixtralForCausalLM", "Qwen3NextForCausalLM",
         "Qwen3_5MoeForCausalLM", "GptOssForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM",
         "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Gemma4ForCausalLM"}
CENTRED = {"Qwen3NextRMSNorm", "Qwen3_5MoeRMSNorm"}  # norms whose weights are kept less one
WINDOWED = {"GptOssForCausalLM"}  # whose windows are those of their cache's layers
HALVED = {"GptOssRotaryEmbedding"}  # which name the angle of both halves of a head once
STEADY = {"default", "linear", "llama3", "yarn"}  # kinds of rotation that do not depend on how long the text is


@dataclass(frozen=True)
class Flanked:
    """One decoder layer whose parts stand between two norms each, a dense part beside the experts (Gemma 4)."""

    mixing: Heads
    before: Norm
    projections: Matrices
    output: Matrices
    settled: Settling       # attention's, and what the experts are given
    inside: Norm            # before the dense part
    inner: Matrices         # its gate and up
    back: Matrices
    routing: Norm
    router: Matrices
    choice: Choice
    joined: Settling        # the dense part's and the experts'


def is_known(model: nn.Module) -> bool:
    """Whether `block_of` tells all that its layers compute."""
    name, config = type(model).__name__, model.config
    if name not in KNOWN or not _has_our_experts(model):
        return False
    if name == "Gemma4ForCausalLM":
        return _is_plain_gemma(model)
    return ((name in WINDOWED or getattr(config, "sliding_window", None) is None)
            and getattr(config, "clip_qkv", None) is None and model.model.rotary_emb.rope_type in STEADY
            and config.hidden_act == "silu" and any(hasattr(layer, "self_attn") for layer in model.model.layers))


def _has_our_experts(model: nn.Module) -> bool:
    parts = [part for layer in model.model.layers for part in (layer, layer.mlp) if hasattr(part, "experts")]
    return all(isinstance(part.experts, FloeExperts) for part in parts)


def _is_plain_gemma(model: nn.Module) -> bool:
    """One of experts, whose layers share no cache and get nothing of their own from an embedding."""
    config, turns = model.config, set(model.model.rotary_emb.rope_type.values())
    return (config.enable_moe_block and not config.num_kv_shared_layers and not config.hidden_size_per_layer_input
            and config.use_bidirectional_attention != "all" and turns <= STEADY | {"proportional"}
            and config.hidden_activation == "gelu_pytorch_tanh")


def block_of(layer: nn.Module, config: object) -> Block | Flanked:
    """Of one decoder layer."""
    if hasattr(layer, "pre_feedforward_layernorm_2"):
        return _flanked(layer, config)
    own, queries = getattr(layer, "self_attn", None), None
    if hasattr(own, "kv_b_proj"):
        mixing, projections, output = _latent(own, config)
        queries = None if own.q_lora_rank is None else (norm(own.q_a_layernorm), matrices(own.q_b_proj))
    else:
        mixing, projections, output = _mixer(layer.linear_attn) if own is None else _heads(own, config)
    return Block(mixing, norm(layer.input_layernorm), projections, output, norm(layer.post_attention_layernorm),
                 *_experts(layer.mlp), queries)


def _heads(own: nn.Module, config: object) -> tuple[Heads, Matrices, Matrices]:
    """How it attends, what leads there, and back."""
    norms = [norm(getattr(own, name)).weight if hasattr(own, name) else None for name in ("q_norm", "k_norm")]
    queries, in_one = config.num_attention_heads, own.v_proj is None
    heads = Heads(queries, own.k_proj.weight.shape[0] // own.head_dim, own.head_dim, own.scaling, *norms,
                  config.rms_norm_eps, gated=own.q_proj.weight.shape[0] == 2 * queries * own.head_dim,
                  window=getattr(own, "sliding_window", None) or 0, sinks=_floats(getattr(own, "sinks", None)),
                  value_norm=_floats(torch.ones_like(norms[0])) if hasattr(own, "v_norm") else None, in_one=in_one)
    values = () if in_one else (own.v_proj,)
    return heads, matrices(own.q_proj, own.k_proj, *values), matrices(own.o_proj)


def _flanked(layer: nn.Module, config: object) -> Flanked:
    mixing, projections, output = _heads(layer.self_attn, config)
    router, dense, epsilon = layer.router, layer.mlp, config.rms_norm_eps
    after, first, second, both, then = (norm(getattr(layer, f"{name}_layernorm{which}")).weight for name, which in (
        ("post_attention", ""), ("post_feedforward", "_1"), ("post_feedforward", "_2"), ("post_feedforward", ""),
        ("pre_feedforward", "_2")))
    choice = Choice(config.top_k_experts, True, factors=_floats(router.per_expert_scale))
    return Flanked(mixing, norm(layer.input_layernorm), projections, output, Settling(after, epsilon, then=then),
                   norm(layer.pre_feedforward_layernorm), matrices(dense.gate_proj, dense.up_proj),
                   matrices(dense.down_proj), Norm(_floats(router.scale) * router.scalar_root_size, router.eps),
                   matrices(router.proj), choice,
                   Settling(both, epsilon, (first, second), _floats(layer.layer_scalar)))


def _latent(own: nn.Module, config: object) -> tuple[Latent, Matrices, Matrices]:
    """As `_heads`, over rows that all heads share. DeepSeek's second turns neighbours where they stand; after it a
    configuration says whether they are neighbours before they are turned, to halves."""
    is_second = type(own).__name__ == "DeepseekV2Attention"
    own_norm = norm(own.kv_a_layernorm)
    latent = Latent(own.num_heads, own.kv_lora_rank, own.qk_nope_head_dim, own.qk_rope_head_dim, own.v_head_dim,
                    own.scaling, own_norm.weight, own_norm.epsilon, matrices(own.kv_b_proj),
                    is_second or config.rope_interleave, is_second)
    query = own.q_proj if own.q_lora_rank is None else own.q_a_proj
    return latent, matrices(query, own.kv_a_proj_with_mqa), matrices(own.o_proj)


def _mixer(own: nn.Module) -> tuple[Mixer, Matrices, Matrices]:
    """As `_heads`, of a gated delta-net."""
    by_head = hasattr(own, "in_proj_qkvz")
    names = ("in_proj_qkvz", "in_proj_ba") if by_head else ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    convolution, rate, bias, weight = map(_floats, (
        own.conv1d.weight[:, 0], -own.A_log.float().exp(), own.dt_bias, own.norm.weight))
    mixer = Mixer(own.num_k_heads, own.num_v_heads, own.head_k_dim, own.head_v_dim, by_head, convolution, rate, bias,
                  weight, own.norm.variance_epsilon)
    return mixer, matrices(*(getattr(own, name) for name in names)), matrices(own.out_proj)


def _experts(mlp: nn.Module) -> tuple[Matrices, int, Choice | None, Matrices | None]:
    """Router, E, how it chooses, and the way back of a shared expert, or of the only one."""
    if not isinstance(getattr(mlp, "experts", None), FloeExperts):
        return matrices(mlp.gate_proj, mlp.up_proj), 0, None, matrices(mlp.down_proj)
    own = getattr(mlp, "shared_expert", getattr(mlp, "shared_experts", None))
    logit = (mlp.shared_expert_gate,) if hasattr(mlp, "shared_expert_gate") else ()
    more = () if own is None else (*logit, own.gate_proj, own.up_proj)
    gate = mlp.router if hasattr(mlp, "router") else mlp.gate
    return (matrices(gate, *more), len(gate.weight), _choice(gate),
            None if own is None else matrices(own.down_proj))


def _choice(gate: nn.Module) -> Choice:
    """Of a router: of sigmoids with a correction, as DeepSeek's third; of groups by their best, its second; plain."""
    if hasattr(gate, "e_score_correction_bias"):
        correction = gate.e_score_correction_bias.detach().float()
        return Choice(gate.top_k, gate.norm_topk_prob, True, correction, *_groups(gate), 2, gate.routed_scaling_factor)
    if hasattr(gate, "topk_method"):
        groups = _groups(gate) if gate.topk_method == "group_limited_greedy" else (1, 1)
        return Choice(gate.top_k, False, False, None, *groups, 1, gate.routed_scaling_factor)
    return Choice(gate.top_k, getattr(gate, "norm_topk_prob", True))


def _groups(gate: nn.Module) -> tuple[int, int]:
    """How many, and how many are kept; one where all are."""
    return (gate.num_group, gate.topk_group) if gate.topk_group < gate.num_group else (1, 1)


def kinds_of(model: nn.Module) -> list[str | None]:
    """Of each layer, which rotation it has where there are several."""
    layers, several = model.model.layers, isinstance(model.model.rotary_emb.rope_type, dict)
    return [layer.self_attn.layer_type if several else None for layer in layers]


def rotation_of(model: nn.Module) -> Callable[[Tensor, Tensor, str | None], Tensor]:
    """-> a function of a tensor of the wanted dtype and device, positions [T] and a kind of `kinds_of`: cosines and
    sines [2, T, D], or [2, T, D/2] where a model has complex numbers."""
    own = model.model.rotary_emb

    def turn(x: Tensor, positions: Tensor, kind: str | None) -> Tensor:
        made = own(x, positions[None]) if kind is None else own(x, positions[None], kind)
        found = torch.cat((made.real, made.imag) if isinstance(made, Tensor) else made)
        return torch.cat((found, found), -1) if type(own).__name__ in HALVED else found
    return turn


def norm(module: nn.Module) -> Norm:
    """Of a root-mean-square norm."""
    if type(module).__name__ in CENTRED:
        return Norm(1 + module.weight.detach().float(), module.eps)
    return Norm(module.weight.detach(), module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


def matrices(*modules: nn.Module) -> Matrices:
    """Of linear layers over one input, packed or not, in their order."""
    def part(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight, bias = module.weight, getattr(module, "bias", None)
        bias = None if bias is None else bias.detach()
        return (weight.codes, weight.scales, bias) if isinstance(weight, Packed) else (weight.detach(), None, bias)
    return Matrices(tuple(part(module) for module in modules))


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()
