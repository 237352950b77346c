"""transformers' attention door, for the architectures whose recorded step is transformers' own forward.

There a step multiplies with every row of the planned context and hides most by a mask. Ours reads the rows up to the
position, in splits, whatever was planned (kernels/gpu/trunk/attend.py), in as many nodes as sdpa and fewer than eager.
It knows no mask but that of causality and of the layer's window, so it serves those alone whose attention is known to
have no other; prompts, and whatever it does not know of one of these, go on to transformers' own.
"""
from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kernels.trunk.linear import MOST_TOKENS

Tensor = torch.Tensor
OURS = {"sdpa": "floe", "eager": "floe_eager"}  # in place of which of transformers' own
MASKED_PLAINLY = {
    "sdpa": {"AfmoeForCausalLM", "AriaTextForCausalLM", "BeamForCausalLM", "Cohere2MoeForCausalLM", "Dots1ForCausalLM",
             "Ernie4_5_MoeForCausalLM", "ExaoneMoeForCausalLM", "FlexOlmoForCausalLM", "GraniteMoeForCausalLM",
             "GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM", "HYV3ForCausalLM", "HunYuanMoEV1ForCausalLM",
             "Kolibri1ForCausalLM", "LagunaForCausalLM", "MellumForCausalLM", "MiniMaxM2ForCausalLM",
             "PhimoeForCausalLM", "Qwen2MoeForCausalLM", "SolarOpenForCausalLM"},
    "eager": {"FlintForCausalLM", "GraniteMoeSWAForCausalLM"}}  # for the sake of their sinks


def attends(model: nn.Module) -> bool:
    """Whether steps of this model attend here; from now on, if so."""
    own = model.config._attn_implementation
    if type(model).__name__ in MASKED_PLAINLY.get(own, ()):
        model.set_attn_implementation(OURS[own])
    return model.config._attn_implementation in OURS.values()


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, s_aux: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [1, Q, T, D], key and value [1, C, N, D] -> [1, T, Q, D]. Of few tokens
    in the cache that lent the keys, where it holds what is asked for. s_aux [Q]: sinks."""
    layer, (n_tokens, size) = getattr(key, "lender", None), query.shape[2:]
    if layer is None or n_tokens > MOST_TOKENS or layer.keys.shape != layer.values.shape or _is_special(layer, more):
        own = sdpa_attention_forward if s_aux is None else sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, attention_mask, scaling=scaling, **more)
    rows = query[0].transpose(0, 1).reshape(n_tokens, -1)
    found = layer.attend_held(rows, size ** -0.5 if scaling is None else scaling, s_aux)
    return found.view(1, n_tokens, -1, size), None


def _is_special(layer: Any, asked: dict[str, Any]) -> bool:
    """Whether more is asked for than the rows in the layer's window."""
    window = asked.get("sliding_window")
    return (window not in (None, layer.window) or asked.get("is_causal") is False
            or any(asked.get(name) is not None for name in ("position_bias", "softcap")))


for own, mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    ALL_ATTENTION_FUNCTIONS.register(OURS[own], attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(OURS[own], mask)
