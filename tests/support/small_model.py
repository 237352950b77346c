"""A small random Qwen3-MoE with the demonstration model's tokenizer, as a checkpoint and compressed, in seconds."""
from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from engine.library.compress import compress

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LAYERS, EXPERTS, TOP_K, NEURONS, HIDDEN = 2, 4, 2, 32, 64


def make(folder: Path, tokenizer_from: Path, vocabulary: int | None = None, seed: int = 0) -> tuple[Path, Path]:
    """-> checkpoint folder, compressed folder, both under `folder`."""
    torch.manual_seed(seed)
    vocabulary = vocabulary or len(AutoTokenizer.from_pretrained(tokenizer_from))
    config = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=64, moe_intermediate_size=NEURONS,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, max_position_embeddings=256, norm_topk_prob=True, initializer_range=0.1)
    model = Qwen3MoeForCausalLM(config)
    checkpoint, compressed = folder / "checkpoint", folder / "compressed"
    model.save_pretrained(checkpoint)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_from / name, checkpoint / name)
    compress(checkpoint, compressed, device="cpu")
    return checkpoint, compressed
