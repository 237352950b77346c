"""The configuration of a model from nothing but its GGUF file, for the families whose files say all of it.

What the format has no key for is fixed in llama.cpp's graph of the architecture (src/models/*.cpp there): whether the
router's weights are normed, which layers see a window. A key that is missing, or one that is not known here and could
change the model, is refused: a default of a configuration class is some other checkpoint's value.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.core import UserError
from engine.files.gguf.header import GgufHeader

Fields = Mapping[str, object]
# Key behind the architecture's name -> attribute. Those of the second table may be missing.
NUMBERS = {"context_length": "max_position_embeddings", "embedding_length": "hidden_size", "attention.head_count":
           "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
           "attention.layer_norm_rms_epsilon": "rms_norm_eps", "expert_count": "num_experts", "expert_used_count":
           "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
DENSE = {"feed_forward_length": "intermediate_size"}    # of layers without experts, of which these families have none
SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
LINEAR = {"ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim", "ssm.group_count":
          "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads"}
GPT_OSS = {"expert_count": "num_local_experts", "expert_feed_forward_length": "intermediate_size",
           "attention.sliding_window": "sliding_window"}
# What other functions below read, and what says nothing that matters to an answer.
KNOWN = ("block_count", "nextn_predict_layers", "attention.key_length", "attention.value_length", "rope.freq_base",
         "rope.dimension_count", "rope.dimension_sections", "rope.scaling.type", "vocab_size", "ssm.inner_size",
         "full_attention_interval", "attention.recurrent_layers", "n_deepstack_layers")
YARN = {"rope.scaling.factor": "factor", "rope.scaling.original_context_length": "original_max_position_embeddings"}
BETAS = {"rope.scaling.yarn_beta_fast": ("beta_fast", 32.0), "rope.scaling.yarn_beta_slow": ("beta_slow", 1.0)}
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
NAMED = ("<|im_end|>", "<|endoftext|>", "<|return|>", "<|call|>")    # the same by name, as llama.cpp knows them
DRAWN = {"general.sampling.temp": "temperature", "general.sampling.top_k": "top_k", "general.sampling.top_p": "top_p",
         "general.sampling.min_p": "min_p", "general.sampling.penalty_repeat": "repetition_penalty"}


class Unsaid(Exception):
    """What the file does not say, in words."""


@dataclass(frozen=True)
class Family:
    """fixed: what llama.cpp's graph always does. more: attributes from the fields, the names of the file's tensors and
    the number of layers."""

    model_type: str
    numbers: Mapping[str, str]
    fixed: Mapping[str, object] = field(default_factory=dict)
    more: Callable[[Fields, set[str], int], dict] = lambda fields, names, layers: {}


def _linear(fields: Fields, names: set[str], layers: int) -> dict:
    """Which layers attend is seen by their tensors."""
    kinds = ["full_attention" if f"blk.{i}.attn_q.weight" in names else "linear_attention" for i in range(layers)]
    return {"layer_types": kinds, "linear_value_head_dim": _of(fields, "ssm.inner_size") //
            _of(fields, "ssm.time_step_rank")}


def _alternating(fields: Fields, names: set[str], layers: int) -> dict:
    return {"layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]}


_QWEN3 = Family("qwen3_moe", NUMBERS, {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
                                       "attention_bias": False, "use_sliding_window": False})
FAMILIES = {
    "qwen2moe": Family("qwen2_moe", NUMBERS | SHARED, {"norm_topk_prob": False, "decoder_sparse_step": 1,
                                                       "mlp_only_layers": [], "use_sliding_window": False}),
    "qwen3moe": _QWEN3, "qwen3vlmoe": _QWEN3,   # of a text all three positions are one: the ordinary rotary embedding
    "qwen3next": Family("qwen3_next", NUMBERS | SHARED | LINEAR, {"norm_topk_prob": True, "decoder_sparse_step": 1,
                                                                  "mlp_only_layers": []}, _linear),
    "qwen35moe": Family("qwen3_5_moe_text", NUMBERS | SHARED | LINEAR, {}, _linear),
    "gpt-oss": Family("gpt_oss", NUMBERS | GPT_OSS, {"attention_bias": True}, _alternating)}


def describe(header: GgufHeader, vocabulary: Mapping[str, int], folder: Path) -> None:
    """config.json and generation_config.json in `folder`. vocabulary: the tokenizer's words and their ids. Unsaid where
    the file does not say all of its model."""
    architecture = str(header.fields.get("general.architecture", ""))
    if architecture not in FAMILIES:
        raise Unsaid(f"files of the architecture {architecture[:40]} do not say all of their model")
    start = f"{architecture}."
    own = {key.removeprefix(start): value for key, value in header.fields.items() if key.startswith(start)}
    names = {tensor.name: tensor.shape for tensor in header.tensors}
    special = {f"{name}_token_id": header.fields[key] for name, key in (
        ("bos", "tokenizer.ggml.bos_token_id"), ("eos", ENDS[0]), ("pad", "tokenizer.ggml.padding_token_id"))
        if key in header.fields}
    model_type = FAMILIES[architecture].model_type
    try:
        config = AutoConfig.for_model(model_type, **_values(FAMILIES[architecture], own, names) | special)
    except Unsaid:
        raise
    except Exception as error:      # texts and lists in the place of numbers; transformers' own checks raise many kinds
        raise Unsaid(f"its numbers are no {model_type} model's") from error
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    config.save_pretrained(folder)
    _generation(header.fields, special, vocabulary).save_pretrained(folder)


def _values(family: Family, own: Fields, names: Mapping[str, tuple[int, ...]]) -> dict:
    known = {*family.numbers, *DENSE, *KNOWN, *YARN, *BETAS}
    if other := [key for key in own if key not in known]:
        raise Unsaid(f"{other[0]} is not known here")
    if "token_embd.weight" not in names:
        raise Unsaid("it has no token_embd.weight")
    layers = _of(own, "block_count") - int(own.get("nextn_predict_layers", 0))
    hidden, heads = _of(own, "embedding_length"), _of(own, "attention.head_count")
    width = int(own.get("attention.key_length", hidden // heads))
    if own.get("attention.value_length", width) != width:
        raise Unsaid("its keys and values are of different sizes")
    made = {attribute: _number(_of(own, key)) for key, attribute in family.numbers.items()}
    made |= {attribute: own[key] for key, attribute in DENSE.items() if key in own and attribute not in made}
    return made | dict(family.fixed) | family.more(own, set(names), layers) | {
        "num_hidden_layers": layers, "head_dim": width, "vocab_size": names["token_embd.weight"][-1],
        "tie_word_embeddings": "output.weight" not in names, "rope_parameters": _rope(family, own, width)}


def _rope(family: Family, own: Fields, width: int) -> dict:
    made: dict = {"rope_type": "default", "rope_theta": _number(_of(own, "rope.freq_base"))}
    turned = int(own.get("rope.dimension_count", width))
    if family.more is _linear:
        made["partial_rotary_factor"] = turned / width
    elif turned != width:
        raise Unsaid("only a part of its heads is rotated")
    if family.model_type == "qwen3_5_moe_text":
        sections = [int(size) for size in _of(own, "rope.dimension_sections") if size]
        made |= {"mrope_section": sections, "mrope_interleaved": True}
    kind = own.get("rope.scaling.type", "none")
    if kind not in ("none", "yarn"):
        raise Unsaid(f"its positions are scaled by {str(kind)[:40]}")
    if kind == "yarn":
        made |= {"rope_type": kind} | {attribute: _number(_of(own, key)) for key, attribute in YARN.items()}
        made |= {attribute: _number(own.get(key, usual)) for key, (attribute, usual) in BETAS.items()}
        made["truncate"] = family.model_type != "gpt_oss"
    elif family.model_type == "gpt_oss":
        raise Unsaid("it does not say how its positions are scaled")
    return made


def _of(own: Fields, key: str):
    if key not in own:
        raise Unsaid(f"it has no {key}")
    return own[key]


def _number(value):
    """The file has 32 bits of a number that was written in decimal."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _generation(fields: Fields, special: Mapping[str, object], vocabulary: Mapping[str, int]) -> GenerationConfig:
    """All tokens that end a turn, and how its makers want tokens drawn, where the file says it."""
    drawn = {attribute: _number(fields[key]) for key, attribute in DRAWN.items() if key in fields}
    ends = list(dict.fromkeys([*(fields[key] for key in ENDS if key in fields),
                               *(vocabulary[name] for name in NAMED if name in vocabulary)]))
    return GenerationConfig(**special | drawn | {"do_sample": bool(drawn), "eos_token_id": ends or None})


def original_of(fields: Fields) -> str:
    """What the file says of where it comes from, as words behind a sentence: a hint, since it often names the base
    model instead of the one that was tuned."""
    places: Iterable[str] = ("general.source.huggingface.repository", "general.source.repo_url",
                             "general.base_model.0.repo_url", "general.repo_url")
    found = next((str(fields[key]) for key in places if fields.get(key)), "")
    name = found.removeprefix("https://huggingface.co/").strip("/")
    return f"; the file names {name}" if name.count("/") == 1 and len(name) < 100 and name.isprintable() else ""


def refuse(name: str, why: str, fields: Fields) -> UserError:
    """In one sentence, for the person who gave a file alone."""
    return UserError(f"{name} cannot be imported by itself ({why}); name the original model (--like in a "
                     f"terminal): a folder or a Hub id like owner/name{original_of(fields)}.")
