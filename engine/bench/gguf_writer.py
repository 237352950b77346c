"""An open model as a GGUF file, for another engine to be measured on the same weights. Nothing here reads one.

Every matrix is decoded, rounded to 8 bits (Q8_0) and written at once; what holds the layers' norms stays float32. The
file has no vocabulary: only token ids go in and out. Architectures whose parameters have their own order in GGUF are
refused. Source: tensor_mapping.py of the gguf package.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.core import UserError
from engine.experts.store import Far
from engine.model.packed import plain

Tensor = torch.Tensor
WRITTEN = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
BLOCK = 32  # weights of Q8_0 that share a scale


def write(path: Path, model: nn.Module, far: Far, report: Callable[[str], None] = lambda text: None) -> int:
    """-> how many weights the file holds. UserError for an architecture that is not written, or without the package."""
    config = model.config
    if config.model_type not in WRITTEN:
        raise UserError(f"{config.model_type} cannot be written for llama.cpp here; choose a model of "
                        f"{' or '.join(WRITTEN)}.")
    try:
        import gguf
    except ImportError as error:
        raise UserError("Writing a file for llama.cpp needs the gguf package; install it with: pip install gguf") \
            from error
    from gguf.quants import quantize
    kinds, name = gguf.GGMLQuantizationType, WRITTEN[config.model_type]
    writer = gguf.GGUFWriter(path, name)
    _describe(writer, config)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names, n_weights = gguf.get_tensor_name_map(architecture, config.num_hidden_layers), 0
    for key, shape, _ in _tensors(model, far):
        kind = kinds.F32 if len(shape) == 1 or "gate.weight" in key else kinds.Q8_0
        n, n_weights = int(np.prod(shape)), n_weights + int(np.prod(shape))
        block_bytes = BLOCK * 4 if kind == kinds.F32 else BLOCK + 2
        stored = shape if kind == kinds.F32 else (*shape[:-1], shape[-1] // BLOCK * block_bytes)
        own = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor_info(own, stored, np.dtype(np.float32 if kind == kinds.F32 else np.uint8),
                               n * block_bytes // BLOCK, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, shape, made in _tensors(model, far):
        report(f"writing {key}")
        values = np.ascontiguousarray(made().float().numpy())
        is_plain = len(shape) == 1 or "gate.weight" in key
        writer.write_tensor_data(values if is_plain else quantize(values, kinds.Q8_0))
    writer.close()
    return n_weights


def _describe(writer, config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _tensors(model: nn.Module, far: Far) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """(name, shape, how it is made); of experts gate, up and down, all of a layer in one."""
    for key, value in model.state_dict(keep_vars=True).items():
        if key != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield key, tuple(value.shape), lambda value=value: plain(value).detach()
    for layer in range(far.layers):
        for which, part in enumerate(("gate", "up", "down")):
            shape = (far.experts, far.neurons, far.hidden) if which < 2 else (far.experts, far.hidden, far.neurons)
            key = f"model.layers.{layer}.mlp.experts.{part}_proj.weight"
            yield key, shape, lambda layer=layer, which=which: _experts(far, layer, which)


def _experts(far: Far, layer: int, which: int) -> Tensor:
    made = torch.empty(3, far.neurons, far.hidden)
    rows = []
    for expert in range(far.experts):
        far.decode(layer, expert, *made)
        rows.append((made[which] if which < 2 else made[which].T).clone())
    return torch.stack(rows)
