"""The model in its table form: Llama's attention and norms, an own dense part, and rows of a table in place of experts.

A layer is h + mlp(n) + sum over j of softmax(router n)_j * table[token, layer, j], n the norm of h (arXiv 2503.15798;
names of tensors are those of the published weights). What is published is the training form, in which expert j is
down(gelu(up x)) of the normed embedding x; engine/files/lookup/table.py makes the table of it. Its config.json calls
itself a Llama, and only `architectures` tells the two apart.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

Tensor = torch.Tensor
ARCHITECTURE, MODEL_TYPE = "MoleForCausalLM", "mole"
ROW_TYPE = torch.float16  # of the table, as its authors keep it


class MoleConfig(LlamaConfig):
    """num_experts: rows of the table that a token has in each layer."""

    model_type = MODEL_TYPE
    num_experts: int = 4


class LookupExperts(nn.Module):
    """Where the rows come in. runtime, layer: set when the model is bound; shape: experts, neurons that an expert had,
    hidden."""

    def __init__(self, config: MoleConfig) -> None:
        super().__init__()
        self.shape = config.num_experts, config.intermediate_size, config.hidden_size

    def forward(self, hidden_states: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        """hidden_states [T, H], for its type and place; tokens int [T]; weights float32 [T, E] -> [T, H]."""
        return self.runtime.forward(self.layer, hidden_states, tokens, weights)


class MoleMLP(nn.Module):
    def __init__(self, config: MoleConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class MoleDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MoleConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp, self.experts = MoleMLP(config), LookupExperts(config)
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, hidden_states: Tensor, tokens: Tensor, **given) -> Tensor:
        """hidden_states [B, T, H], tokens int [B, T]; given: as Llama's layer has it."""
        mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        hidden_states = hidden_states + mixed
        x = self.post_attention_layernorm(hidden_states)
        weights = self.router(x).softmax(-1, dtype=torch.float32)
        rows = self.experts(x.flatten(0, 1), tokens.flatten(), weights.flatten(0, 1))
        return hidden_states + self.mlp(x) + rows.view_as(x)


class MoleModel(LlamaModel):
    config_class = MoleConfig

    def __init__(self, config: MoleConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MoleDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **given):
        """As Llama's; the table is asked by numbers of tokens, so there have to be some."""
        if input_ids is None:
            raise ValueError("a Mixture of Lookup Experts reads tokens, not embeddings")
        return super().forward(input_ids=input_ids, tokens=input_ids, **given)


class MoleForCausalLM(LlamaForCausalLM):
    config_class = MoleConfig

    def __init__(self, config: MoleConfig) -> None:
        super().__init__(config)
        self.model = MoleModel(config)
        self.post_init()


AutoConfig.register(MODEL_TYPE, MoleConfig)
AutoModelForCausalLM.register(MoleConfig, MoleForCausalLM)


def is_training_form(written: dict) -> bool:
    """Of a config.json: whether it is a Mixture of Lookup Experts as it is published."""
    return written.get("architectures") == [ARCHITECTURE] and written.get("model_type") != MODEL_TYPE
