"""Small random Mixture-of-Experts models of many architectures, for every test that must hold for all of them.

`SMALL` maps an architecture's name to the arguments of its transformers configuration; `build(name, seed)` makes the
model in float32 with transformers' own (eager) experts. Two or three layers, four experts or more, two of them
routed, hidden a multiple of 64, a vocabulary of 128: under a second each. The weights are large enough that every
expert leaves its mark on the logits.
"""
from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

COMMON = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts_per_tok=2,
)
# Two ways to write the sizes of the experts.
MOE = dict(intermediate_size=80, moe_intermediate_size=48)
PLAIN = dict(intermediate_size=48)
LATENT = dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
              num_key_value_heads=4)
GROUPED = dict(n_group=2, topk_group=2, first_k_dense_replace=1, n_shared_experts=1, n_routed_experts=8)
MAMBA = dict(mamba_d_state=16, mamba_d_conv=4, mamba_expand=2)
DELTA = dict(head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
             linear_value_head_dim=16, linear_conv_kernel_dim=4, shared_expert_intermediate_size=32)

SMALL: dict[str, dict] = {
    "mixtral": PLAIN | dict(num_local_experts=4),
    "qwen2_moe": MOE | dict(num_experts=4, shared_expert_intermediate_size=32),
    "qwen3_moe": MOE | dict(num_experts=8, head_dim=16),
    "qwen3_next": MOE | DELTA | dict(num_experts=4, layer_types=["linear_attention", "full_attention"]),
    "qwen3_5_moe_text": MOE | DELTA | dict(num_experts=4, layer_types=["linear_attention", "full_attention"]),
    "olmoe": PLAIN | dict(num_experts=4),
    "gpt_oss": PLAIN | dict(num_local_experts=4, head_dim=16, sliding_window=8,
                            layer_types=["sliding_attention", "full_attention"]),
    "deepseek_v2": MOE | LATENT | dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1,
                                       num_hidden_layers=3, topk_method="greedy", n_group=1, topk_group=1),
    "deepseek_v3": MOE | LATENT | GROUPED | dict(num_hidden_layers=3),
    "glm4_moe": MOE | GROUPED | dict(head_dim=16, num_hidden_layers=3),
    "glm4_moe_lite": MOE | LATENT | GROUPED | dict(num_hidden_layers=3, mlp_layer_types=["dense", "sparse", "sparse"]),
    "phimoe": PLAIN | dict(num_local_experts=4),
    "granitemoe": PLAIN | dict(num_local_experts=4),
    "granitemoeshared": PLAIN | dict(num_local_experts=4, shared_intermediate_size=32),
    "granitemoehybrid": PLAIN | dict(num_local_experts=4, shared_intermediate_size=32, mamba_n_heads=8,
                                     mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16,
                                     layer_types=["mamba", "attention"]),
    "ernie4_5_moe": MOE | dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=1, moe_num_shared_experts=1),
    "lfm2_moe": MOE | dict(num_experts=4, num_dense_layers=1, num_hidden_layers=3,
                           layer_types=["conv", "full_attention", "conv"]),
    "jamba": PLAIN | MAMBA | dict(num_experts=4, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1,
                                  expert_layer_period=2, expert_layer_offset=1, mamba_dt_rank=8,
                                  use_mamba_kernels=False),
    "minimax": PLAIN | dict(num_local_experts=4, head_dim=16, block_size=16,
                            layer_types=["linear_attention", "full_attention"]),
    "minimax_m2": PLAIN | dict(num_local_experts=4, head_dim=16),
    "dots1": MOE | GROUPED | dict(head_dim=16, num_hidden_layers=3),
    "gemma4_text": MOE | dict(num_experts=4, top_k_experts=2, enable_moe_block=True, head_dim=16, global_head_dim=16,
                              vocab_size_per_layer_input=128, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
                              sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "longcat_flash": LATENT | dict(ffn_hidden_size=80, expert_ffn_hidden_size=48, num_layers=2, n_routed_experts=6,
                                   zero_expert_num=3, moe_topk=3, head_dim=16, routed_scaling_factor=2.5,
                                   num_hidden_layers=None, num_experts_per_tok=None),
    "hunyuan_v1_moe": PLAIN | dict(num_experts=4, moe_topk=[2, 2], head_dim=16),
    "exaone_moe": MOE | dict(num_experts=8, num_shared_experts=1, n_group=2, topk_group=2, head_dim=16,
                             num_hidden_layers=3, mlp_layer_types=["dense", "sparse", "sparse"]),
    "flex_olmo": PLAIN | dict(num_experts=4),
    "afmoe": MOE | dict(num_experts=4, num_shared_experts=1, num_dense_layers=1, head_dim=16, num_hidden_layers=3,
                        sliding_window=8, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "solar_open": MOE | GROUPED | dict(head_dim=16, num_hidden_layers=3),
    "cohere2_moe": PLAIN | dict(num_experts=4, head_dim=16, sliding_window=8, num_shared_experts=0,
                                layer_types=["sliding_attention", "full_attention"]),
    "aria_text": PLAIN | dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, head_dim=16),
    "deepseek_v32": MOE | LATENT | GROUPED | dict(num_hidden_layers=3, index_n_heads=2, index_head_dim=32,
                                                  index_topk=16),
    "kimi_linear": MOE | LATENT | GROUPED | dict(num_experts=8, linear_head_dim=16, linear_num_heads=4,
                                                 num_expert_group=2, num_shared_experts=1,
                                                 layer_types=["linear_attention", "full_attention"]),
    "bailing_hybrid": MOE | LATENT | GROUPED | dict(num_experts=8, head_dim=16, num_expert_group=2,
                                                    num_shared_experts=1,
                                                    layer_types=["linear_attention", "full_attention"]),
    "hy_v3": MOE | dict(num_experts=4, head_dim=16, num_shared_experts=1),
    "laguna": MOE | dict(num_experts=4, head_dim=16, shared_expert_intermediate_size=32),
    "mellum": MOE | dict(num_experts=4, head_dim=16),
    "mimo_v2_flash": MOE | GROUPED | dict(head_dim=16, v_head_dim=16),
    "axk1": MOE | LATENT | GROUPED | dict(num_hidden_layers=3),
    "beam": MOE | dict(num_experts=4, head_dim=16, n_group=2, topk_group=2,
                     mlp_layer_types=["dense", "sparse"]),
    "flint": MOE | dict(num_experts=4, head_dim=16, mlp_only_layers=[0]),
    "granitemoe_swa": PLAIN | dict(num_local_experts=4),
    "glm_moe_dsa": MOE | LATENT | GROUPED | dict(num_hidden_layers=3, index_n_heads=2, index_head_dim=32,
                                                 index_topk=16),
    "zaya": MOE | dict(num_experts=4, head_dim=16, num_experts_per_tok=1),
    "inkling_text": MOE | dict(n_routed_experts=4, head_dim=16),
    "minimax_m3_vl_text": PLAIN | dict(num_local_experts=4, head_dim=16),
    "kolibri1": MOE | dict(num_experts=4, head_dim=16),
}
SMALL = {name: arguments for name, arguments in SMALL.items() if name in CONFIG_MAPPING}      # older transformers


def config(name: str, **changes):
    numbers = COMMON | SMALL[name] | changes
    return AutoConfig.for_model(name, **{key: value for key, value in numbers.items() if value is not None})


def build(name: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A random float32 model in eval mode; name, seed and changes of the configuration give the same weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(name, **changes), dtype=torch.float32,
                                             experts_implementation="eager")
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(0, 1.5 / value.shape[-1] ** 0.5)
            elif "norm" not in key:
                value.add_(torch.randn_like(value), alpha=0.1)
        for key, value in model.named_buffers():
            if "correction" in key:     # of a router's choice
                value.normal_(0, 0.2)
    return model.eval()
