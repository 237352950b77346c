"""A step of few tokens on the processor in six calls a layer, where transformers' own forward makes some seventy.

Built from the modules of an open model, whose forward it equals up to rounding, and used in its place while it decodes.
Architectures are told by the classes of their modules; every other model runs transformers' forward. The experts are
called as there: levels, hooks and near memory know no difference.

Legend: T tokens, H hidden, E experts, k routed.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from engine.model.growing_cache import GrowingLayer
from engine.model.packed import Packed
from engine.model.registration import FloeExperts
from kernels.trunk.attend import Heads, attend
from kernels.trunk.linear import MOST_TOKENS, Matrices, linears
from kernels.trunk.route import route

Tensor = torch.Tensor
KNOWN = {"Qwen3MoeForCausalLM", "OlmoeForCausalLM", "MixtralForCausalLM"}
STEADY = {"default", "linear", "llama3", "yarn"}  # kinds of rotation that do not depend on how long the text is
TURNS = 1024  # positions whose rotation is computed at once


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm: weight float32 [n]."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """One decoder layer. router: None where its experts are dense, and `mlp` computes behind its own norm."""

    heads: Heads
    before: Norm
    projections: Matrices  # of queries, keys and values
    output: Matrices
    between: Norm
    mlp: nn.Module
    router: Matrices | None
    top_k: int = 0
    renormalised: bool = False

    def __call__(self, x: Tensor, turn: Tensor, cache: GrowingLayer, position: int) -> Tensor:
        """x float32 [T, H] -> the same."""
        projected, _ = linears(x, self.projections, self.before.weight, self.before.epsilon)
        attended = attend(projected, turn, *cache.with_room(len(x)), position, self.heads)
        cache.end(position + len(x))
        x, _ = linears(attended, self.output, None, 0.0, x)
        if self.router is None:
            return x + self.mlp(_normed(x, self.between)[None])[0]
        logits, normed = linears(x, self.router, self.between.weight, self.between.epsilon)
        ids, weights = route(logits, self.top_k, self.renormalised)
        return x + self.mlp.experts(normed, ids, weights)


class FusedStep:
    """Of one model; it holds the model's own tensors."""

    def __init__(self, model: nn.Module) -> None:
        base, config = model.model, model.config
        self._embed, self._rotation = base.embed_tokens, base.rotary_emb
        self._layers = [_layer(layer, config) for layer in base.layers]
        self._norm, self._head = _norm(base.norm), _matrices(model.lm_head)
        self._turns = torch.empty(2, 0, self._layers[0].heads.size, dtype=torch.float32)

    def takes(self, ids: list[int], cache: DynamicCache) -> bool:
        return len(ids) <= MOST_TOKENS and all(type(layer) is GrowingLayer for layer in cache.layers)

    def __call__(self, ids: list[int], cache: DynamicCache) -> Tensor:
        """Read up to MOST_TOKENS more tokens behind what the cache holds -> logits [V] after the last."""
        position, x = cache.layers[0].keys.shape[2], self._embed(torch.tensor(ids))
        turn = self._turn(position, position + len(ids))
        for layer, rows in zip(self._layers, cache.layers, strict=True):
            x = layer(x, turn, rows, position)
        logits, _ = linears(x[-1:].contiguous(), self._head, self._norm.weight, self._norm.epsilon)
        return logits[0]

    def _turn(self, first: int, end: int) -> Tensor:
        """Cosines and sines of positions [2, T, D]."""
        if end > self._turns.shape[1]:
            positions = torch.arange(-(-end // TURNS) * TURNS)[None]
            self._turns = torch.cat(self._rotation(self._turns, positions))
        return self._turns[:, first:end].contiguous()


def fused(model: nn.Module) -> FusedStep | None:
    """None for a model that only transformers' own forward computes."""
    config = model.config
    is_known = (type(model).__name__ in KNOWN and model.dtype == torch.float32 and model.device.type == "cpu"
                and getattr(config, "sliding_window", None) is None and getattr(config, "clip_qkv", None) is None
                and model.model.rotary_emb.rope_type in STEADY)
    return FusedStep(model) if is_known else None


def _layer(layer: nn.Module, config: object) -> Layer:
    own, mlp = layer.self_attn, layer.mlp
    norms = [getattr(own, name).weight.detach() if hasattr(own, name) else None for name in ("q_norm", "k_norm")]
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, own.head_dim, own.scaling, *norms,
                  config.rms_norm_eps)
    routed = isinstance(getattr(mlp, "experts", None), FloeExperts)
    router = (Matrices(((mlp.gate.weight.detach(), None, None),)), mlp.gate.top_k,
              getattr(mlp.gate, "norm_topk_prob", True)) if routed else (None,)
    return Layer(heads, _norm(layer.input_layernorm), _matrices(own.q_proj, own.k_proj, own.v_proj),
                 _matrices(own.o_proj), _norm(layer.post_attention_layernorm), mlp, *router)


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _matrices(*modules: nn.Module) -> Matrices:
    def part(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight, bias = module.weight, None if module.bias is None else module.bias.detach()
        return (weight.codes, weight.scales, bias) if isinstance(weight, Packed) else (weight.detach(), None, bias)
    return Matrices(tuple(part(module) for module in modules))


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.epsilon))
