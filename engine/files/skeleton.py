"""A checkpoint's configuration, its model on the meta device, and the numbers of both.

Only transformers' own classes are used: a configuration that asks for code of its own is refused, and a
`quantization_config` is taken off, because the reader decodes the weights itself. The routed-experts modules are
those that went through transformers' experts interface; their flags say how gate and up are laid out. LongCat-Flash's
do not go through it: they are told what it would have told them.
"""
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import MethodType

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from engine.core import ModelSpec, UserError
from engine.disk import ordinary_files
from engine.files.config_json import read_config_json
from engine.files.lookup.modeling import MODEL_TYPE, ROW_TYPE, LookupExperts, MoleConfig, is_training_form

DECODED = ("mxfp4", "fp8")
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
UNDECORATED = {"LongcatFlashExperts"}   # transformers 5.23 leaves them out of its experts interface
TOP_K = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k")
STEP = 64                 # hidden must be a multiple: the smallest group of codes
UNKNOWN_CONTEXT = 4096    # for configurations that state no maximum
CACHE_BYTES, STATE_BYTES = 2, 4     # 16-bit keys, values and convolutions; recurrent states stay float32
MASK_BYTES = 3     # of a pair of tokens: yes or no, and the 16-bit number that the product wants
TRANSFORMERS = (5, 23)    # the first whose caches and quantizers have the form that is used here


def check_transformers(version: str) -> None:
    """UserError for a version that would fail later, under the name of a folder that is not to blame."""
    if tuple(int(re.match(r"\d*", part)[0] or 0) for part in version.split(".")[:2]) < TRANSFORMERS:
        raise UserError("Floe Chat needs transformers {}.{} or newer, and this environment has {}; start the launcher "
                        "with --repair, or bring the environment up to date.".format(*TRANSFORMERS, version))


check_transformers(transformers.__version__)


def read_config(folder: Path, methods: tuple[str, ...] = DECODED):
    """The folder's transformers configuration without its quantisation. UserError where there is none to use. methods:
    of quantisation that the caller can read."""
    written = read_config_json(folder)
    ordinary_files(folder)
    _refuse_quantised(folder, written, methods)
    _refuse_tables(folder, written)
    try:
        config = (MoleConfig.from_dict(written | {"model_type": MODEL_TYPE}) if is_training_form(written) else
                  AutoConfig.from_pretrained(folder, trust_remote_code=False))
        parts = config, text_config_of(config)
    except Exception as error:          # transformers raises many kinds for configurations it does not know
        raise UserError(_unknown(folder, written, error)) from error
    for part in parts:
        part._experts_implementation = None     # a compressed folder's is known to engine/model/registration.py alone
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def text_config_of(config):
    """The language model's own configuration; what a composite says of its weights as a whole holds for it too."""
    text_config = config.get_text_config()
    if text_config is not config:
        text_config.dtype = text_config.dtype or config.dtype
        own = getattr(text_config, "tie_word_embeddings", False)  # what transformers takes where nothing is said
        text_config.tie_word_embeddings = getattr(config, "tie_word_embeddings", own)
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
    if tables := {path: each for path, each in skeleton.named_modules() if isinstance(each, LookupExperts)}:
        return tables
    for module in skeleton.modules():
        if type(module).__name__ in UNDECORATED:
            _described(module, skeleton.config)
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


def _described(module, config) -> None:
    """LongCat-Flash's experts, as the experts interface describes others'. identities: experts behind those with
    weights that give back what they are given; the rows that transformers allots to them are never read, and go."""
    module.config, module.identities = config, module.zero_expert_num
    module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = True, False, False, True
    module._apply_gate = MethodType(_gate_of_halves, module)
    module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj[:module.num_routed_experts],
                                             module.gate_up_proj.requires_grad)


def _gate_of_halves(module, gate_up):
    gate, up = gate_up.chunk(2, -1)
    return module.act_fn(gate) * up


def spec_of_folder(folder: Path, name: str) -> ModelSpec:
    """The numbers of the model that a folder's config.json describes, whatever else lies there. UserError."""
    return spec_of(text_config_of(read_config(folder, (*DECODED, "floe"))), name)


def spec_of(text_config, name: str) -> ModelSpec:
    """UserError for a dense model and for numbers that do not go together."""
    skeleton = build_skeleton(text_config, name)
    try:
        return model_spec(name, skeleton, experts_modules(skeleton, name))
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"The configuration of {name} lacks a number that planning needs, or is damaged ({error}); "
                        "download it again.") from error


def model_spec(name: str, skeleton, modules: dict[str, torch.nn.Module]) -> ModelSpec:
    """The numbers of a model on the meta device: weights counted, caches as a forward of its leaves them. neurons,
    hidden: of one expert; biases of the experts count as trunk."""
    config, (experts, neurons, hidden) = skeleton.config, _dimensions(next(iter(modules.values())))
    cache = _cache_of(skeleton, modules)
    token_bytes, state_bytes, recurrent_bytes, windows = _cache_bytes(config, cache)
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    n_all = len(modules) * experts
    table_bytes = config.vocab_size * n_all * hidden * ROW_TYPE.itemsize if _is_table(modules) else 0
    return ModelSpec(
        name=name, layers=len(modules), experts=experts, top_k=experts if table_bytes else _top_k(config, name),
        neurons=neurons, hidden=hidden, identities=getattr(next(iter(modules.values())), "identities", 0),
        decoder_layers=_depth(skeleton, modules), vocabulary=config.vocab_size,
        trunk_params=sum(p.numel() for p in skeleton.parameters()) - (0 if table_bytes else
                                                                      n_all * 3 * neurons * hidden),
        embedding_params=0 if tied else embedding.weight.numel(), kv_bytes_per_token=token_bytes,
        state_bytes=state_bytes, recurrent_bytes=recurrent_bytes, windows=windows, prefill=_prefill(skeleton, cache),
        context=getattr(config, "max_position_embeddings", None) or UNKNOWN_CONTEXT,
        model_type=config.model_type.removesuffix("_text"), table_bytes=table_bytes)


def _depth(skeleton, modules: dict[str, torch.nn.Module]) -> int:
    """Decoder layers. A configuration may count their attentions instead, LongCat-Flash's two of each layer."""
    return len(skeleton.get_submodule(next(iter(modules)).partition(".layers.")[0] + ".layers"))


def _cache_bytes(config, cache) -> tuple[int, int, int, tuple[tuple[int, int], ...]]:
    """Bytes of cache per token and for ever, and of these those of recurrent layers and of windows: neither grows with
    the tokens."""
    if cache is None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * CACHE_BYTES * config.num_hidden_layers * heads * width, 0, 0, ()
    token_bytes, windows = 0, Counter()
    recurrent_bytes = STATE_BYTES * sum(map(torch.numel, filter(len, getattr(cache, "linear_cache", ()))))
    for layer in cache.layers:
        kept = [tensor for part in ("keys", "values", "indexer_keys")
                if (tensor := getattr(layer, part, None)) is not None]
        per_token = CACHE_BYTES * sum(tensor.numel() // tensor.shape[-2] for tensor in kept)
        window = getattr(layer, "sliding_window", None)
        token_bytes += 0 if window else per_token
        if window:
            windows[window] += per_token
        for part, size in (("conv_states", CACHE_BYTES), ("recurrent_states", STATE_BYTES)):
            recurrent_bytes += size * sum(map(torch.numel, _states(layer, part)))
    window_bytes = sum(window * each for window, each in windows.items())
    return token_bytes, window_bytes + recurrent_bytes, recurrent_bytes, tuple(sorted(windows.items()))


def _states(layer, part: str) -> list:
    return [state for state in getattr(layer, part, {}).values() if state is not None]


def _prefill(skeleton, cache) -> tuple[tuple[int, int, int], ...]:
    """ModelSpec.prefill, of every kind of layer that the cache shows (tests/engine/planning/test_prefill_peak.py)."""
    config, kinds = skeleton.config, set()
    heads = getattr(config, "num_attention_heads", 0)
    queries = {module.q_proj.out_features for module in skeleton.modules()
               if isinstance(getattr(module, "q_proj", None), torch.nn.Linear)}
    for layer in cache.layers if cache is not None else ():
        keys, values = (getattr(layer, part, None) for part in ("keys", "values"))
        # transformers' reference implementations hold about 16 float32 rows of values for each token.
        kinds |= {(16 * 4 * (state.numel() // state.shape[-1]), 0, 0) for state in _states(layer, "recurrent_states")}
        if keys is not None:
            kinds.add(_attention(config, heads, keys, values, max(queries, default=0), skeleton._supports_sdpa))
    return tuple(sorted(kinds))


def _attention(config, heads: int, keys, values, widest_query: int, fused: bool) -> tuple[int, int, int]:
    """The hidden state and the queries in their shapes; keys and values once more where they are repeated for several
    heads; the mask, and where attention is not fused three tensors of scores."""
    pair = MASK_BYTES + (0 if fused else 3 * CACHE_BYTES * heads)
    if getattr(config, "kv_lora_rank", None):   # from the latent come keys and values, keys are joined with their rest
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        return (CACHE_BYTES * (config.hidden_size + 3 * heads * (nope + rope)),
                CACHE_BYTES * heads * (2 * (nope + value) + rope), pair)
    query = heads * keys.shape[-1]
    gate = query if widest_query >= 2 * query else 0     # a second half of the projection gates attention's output
    repeated = CACHE_BYTES * heads * (keys.shape[-1] + values.shape[-1]) if keys.shape[1] < heads else 0
    return CACHE_BYTES * (config.hidden_size + 3 * query + gate), repeated, pair


@torch.no_grad()
def _cache_of(skeleton, modules: dict[str, torch.nn.Module]):
    """transformers' cache after two tokens; None for a model that does not run without memory."""
    for module in modules.values():
        module.forward = lambda hidden, *_, **__: hidden    # what is routed where is no question of shapes
    try:
        return skeleton(torch.ones(1, 2, dtype=torch.long, device="meta"), use_cache=True).past_key_values
    except Exception:           # reads a value of a tensor, say, or calls a kernel
        return None
    finally:
        for module in modules.values():
            del module.forward


def _is_table(modules: dict[str, torch.nn.Module]) -> bool:
    return any(isinstance(module, LookupExperts) for module in modules.values())


def _dimensions(module) -> tuple[int, int, int]:
    """Experts, neurons, hidden of one routed-experts module."""
    if isinstance(module, LookupExperts):
        return module.shape
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


def _refuse_quantised(folder: Path, written: dict, methods: tuple[str, ...]) -> None:
    inner = written.get("text_config")
    quantisation = written.get("quantization_config") or isinstance(inner, dict) and inner.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if not quantisation or method in methods:
        return
    if method == "floe":
        raise UserError(f"{folder} is already compressed; open it directly, or download it again if floe.json is "
                        "missing.")
    raise UserError(f"{folder} is quantised with {method!r}; take the unquantised checkpoint "
                    f"(of the quantised ones, {' and '.join(DECODED)} can be read).")


def _refuse_tables(folder: Path, written: dict) -> None:
    """LongCat-Flash-Lite adds rows of n-gram tables to its embedding: without them it would talk nonsense."""
    if str(written.get("model_type")).startswith("longcat") and any("ngram" in name and written[name]
                                                                    for name in written):
        raise UserError(f"{folder} is a LongCat model with n-gram tables (LongCat-Flash-Lite), which transformers does "
                        "not compute; choose LongCat-Flash itself, or another model.")


def _unknown(folder: Path, written: dict, error: Exception) -> str:
    kind = str(written.get("model_type"))[:60]
    if kind in CONFIG_MAPPING:
        return f"{folder / 'config.json'} cannot be used ({_first_line(error)})."
    if "auto_map" in written:
        return (f"{folder} holds a {kind!r} model that runs only with its own downloaded code, which Floe Chat never "
                "executes; choose a model that transformers knows.")
    return f"{folder}: this version of transformers does not know the architecture {kind!r}; update it."


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
