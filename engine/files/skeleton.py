"""A checkpoint's configuration, its model on the meta device, and the numbers of both.

Only transformers' own classes are used: a configuration that asks for code of its own is refused, and a
`quantization_config` is taken off, because the reader decodes the weights itself. The routed-experts modules are
those that went through transformers' experts interface; their flags say how gate and up are laid out.
"""
from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from engine.core import ModelSpec, UserError
from engine.disk import ordinary_files
from engine.files.model_spec import KV_BYTES, read_config_json, spec_from_config

DECODED = ("mxfp4", "fp8")
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
TOP_K = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k")
STEP = 64                 # hidden must be a multiple: the smallest group of codes
UNKNOWN_CONTEXT = 4096    # for configurations that state no maximum
TRANSFORMERS = (5, 23)    # the first whose caches and quantizers have the form that is used here


def check_transformers(version: str) -> None:
    """UserError for a version that would fail later, under the name of a folder that is not to blame."""
    if tuple(int(re.match(r"\d*", part)[0] or 0) for part in version.split(".")[:2]) < TRANSFORMERS:
        raise UserError("Floe Chat needs transformers {}.{} or newer, and this environment has {}; start the launcher "
                        "with --repair, or bring the environment up to date.".format(*TRANSFORMERS, version))


check_transformers(transformers.__version__)


def read_config(folder: Path):
    """The folder's transformers configuration without its quantisation. UserError where there is none to use."""
    written = read_config_json(folder)
    ordinary_files(folder)
    _refuse_quantised(folder, written)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        parts = config, text_config_of(config)
    except Exception as error:          # transformers raises many kinds for configurations it does not know
        raise UserError(_unknown(folder, written, error)) from error
    for part in parts:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def text_config_of(config):
    """The language model's own configuration; what a composite says of its weights as a whole holds for it too."""
    text_config = config.get_text_config()
    if text_config is not config:
        text_config.dtype = text_config.dtype or config.dtype
        text_config.tie_word_embeddings = getattr(config, "tie_word_embeddings", text_config.tie_word_embeddings)
    return text_config


def build_skeleton(text_config, name: str):
    """The causal language model on the meta device: names and shapes, no memory."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(text_config, trust_remote_code=False)
    except Exception as error:          # and as many for numbers that do not go together
        raise UserError(f"{name}: this version of transformers has no text model for "
                        f"{text_config.model_type!r} ({_first_line(error)}).") from error


def experts_modules(skeleton, name: str) -> dict[str, torch.nn.Module]:
    """Routed-experts modules by name, in order of depth. UserError for a dense model or experts without a gate."""
    found = {path: module for path, module in skeleton.named_modules()
             if all(hasattr(module, flag) for flag in FLAGS) and hasattr(module, "down_proj")}
    if not found:
        raise UserError(f"{name} has no routed experts that transformers runs through its experts interface; "
                        "choose a Mixture-of-Experts model.")
    if not all(module.has_gate for module in found.values()):
        raise UserError(f"{name} has experts without a gate, which the sketches need; choose another model.")
    hidden = _dimensions(next(iter(found.values())))[2]
    if hidden % STEP:
        raise UserError(f"{name} has a hidden size of {hidden}, which is not a multiple of {STEP}.")
    return found


def model_spec(name: str, text_config, skeleton, modules: dict[str, torch.nn.Module]) -> ModelSpec:
    """The numbers of a model: weights counted, caches as the configuration says. neurons, hidden: of one expert."""
    experts, neurons, hidden = _dimensions(next(iter(modules.values())))
    routed = sum(p.numel() for module in modules.values() for p in module.parameters(recurse=False))
    token_bytes, state_bytes = _cache_bytes(text_config, name)
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return ModelSpec(
        name=name, layers=len(modules), experts=experts, top_k=_top_k(text_config, name), neurons=neurons,
        hidden=hidden, decoder_layers=text_config.num_hidden_layers, vocabulary=text_config.vocab_size,
        trunk_params=sum(p.numel() for p in skeleton.parameters()) - routed,
        embedding_params=0 if tied else embedding.weight.numel(),
        kv_bytes_per_token=token_bytes, state_bytes=state_bytes,
        context=getattr(text_config, "max_position_embeddings", None) or UNKNOWN_CONTEXT,
        model_type=text_config.model_type)


def _cache_bytes(text_config, name: str) -> tuple[int, int]:
    """Bytes of cache per token and for ever; keys and values in every layer where the configuration is unusual."""
    try:
        shape = spec_from_config(text_config.to_dict(), name)
        return shape.kv_bytes_per_token, shape.state_bytes
    except UserError:
        heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
        width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
        return 2 * KV_BYTES * text_config.num_hidden_layers * heads * width, 0


def _dimensions(module) -> tuple[int, int, int]:
    """Experts, neurons, hidden of one routed-experts module."""
    experts, rows, columns = module.down_proj.shape
    return (experts, rows, columns) if module.is_transposed else (experts, columns, rows)


def _top_k(text_config, name: str) -> int:
    for attribute in TOP_K:
        value = getattr(text_config, attribute, None)
        if isinstance(value, list):
            value = value[0] if value else None
        if value:
            return int(value)
    raise UserError(f"{name}: config.json does not say how many experts a token uses.")


def _refuse_quantised(folder: Path, written: dict) -> None:
    inner = written.get("text_config")
    quantisation = written.get("quantization_config") or isinstance(inner, dict) and inner.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if method == "floe":
        raise UserError(f"{folder} is already compressed; open it directly, or download it again if floe.json is "
                        "missing.")
    if quantisation and method not in DECODED:
        raise UserError(f"{folder} is quantised with {method!r}; take the unquantised checkpoint "
                        f"(of the quantised ones, {' and '.join(DECODED)} can be read).")


def _unknown(folder: Path, written: dict, error: Exception) -> str:
    kind = written.get("model_type")
    if kind in CONFIG_MAPPING:
        return f"{folder / 'config.json'} cannot be used ({_first_line(error)})."
    if "auto_map" in written:
        return (f"{folder} holds a {kind!r} model that runs only with its own downloaded code, which Floe Chat never "
                "executes; choose a model that transformers knows.")
    return f"{folder}: this version of transformers does not know the architecture {kind!r}; update it."


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
