"""From a plain config.json to a ModelSpec: how many weights lie where, without torch and without transformers.

One walk over the decoder layers adds up attention (grouped heads, latent, delta-net, short convolution, Mamba), dense
and shared MLPs, routers, norms, embedding and head, and what each layer keeps per token or for ever. Exact for the
catalogue's architectures and close for others with the usual key names; tests compare it with transformers' models on
the meta device. What it does not know: vision and audio towers, multi-token-prediction layers (both are left out).
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.core import ModelSpec, UserError
from engine.disk import read_json
from engine.files.manifest import CONFIG

KV_BYTES = 2       # 16-bit keys and values
# Anybody can write a configuration; transformers makes a list, or a layer, of as many as it says.
MOST_LAYERS = 512
MOST = 1 << 15
MOST_NUMBER = 1 << 62
MOST_BYTES = 2 << 20  # of config.json
_LAYERS, _COUNTS = re.compile(r"(layers?|depth|blocks)$"), re.compile(r"(labels|experts|heads|groups?)$")
STATE_BYTES = 4    # recurrent states stay float32

# What the key names do not say. gate: a second query projection gates attention's output. qk_norm: weights of the
# norms on queries and keys, per head ("head") or over the whole projection ("wide").
GATED_ATTENTION = {"qwen3_next", "qwen3_5_moe", "afmoe"}
HEAD_NORM = {"qwen3_moe", "qwen3_next", "qwen3_5_moe", "gemma4", "dots1", "hunyuan_v1_moe", "lfm2_moe", "exaone_moe",
             "afmoe", "mellum", "hy_v3"}
WIDE_NORM = {"olmoe", "flex_olmo", "minimax_m2"}
QKV_BIAS = {"qwen2_moe"}
OUTPUT_BIAS = {"gpt_oss", "phimoe", "granitemoe"}
SHARED_GATE = {"qwen2_moe", "qwen3_next", "qwen3_5_moe"}
ONE_SHARED = {"hunyuan_v1_moe"}    # one shared expert where the configuration does not say
LAYER_NORMS = {"gemma4": 7, "phimoe": 4, "afmoe": 4}

_ALIASES = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k"),
    "neurons": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "decoder_layers": ("num_hidden_layers", "num_layers"),
    "heads": ("num_attention_heads",),
    "shared": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
}
# Everything else that is read is a whole number, yes, no, or nothing.
_STRUCTURED = {"layer_types", "layers_block_type", "mlp_layer_types", "is_moe_layer", "mlp_only_layers",
               "per_layer_config", "model_type"}
_WIDTHS = {"intermediate_size", "ffn_hidden_size"}     # of dense layers: where they differ, the first stands for all


def _first(config: Mapping, names: tuple[str, ...], default=None):
    return next((config[name] for name in names if config.get(name) is not None), default)


def _numbers(config: Mapping) -> dict:
    """What the sums below may trust: whoever writes a configuration may put anything behind any name."""
    kept = {key: value for key, value in config.items() if value is None or isinstance(value, int)
            or key in _STRUCTURED}
    for key, value in config.items():     # some configurations repeat one number for every layer
        same = isinstance(value, list) and value and (key in _WIDTHS or all(each == value[0] for each in value))
        if same and isinstance(value[0], int) and key not in _STRUCTURED:
            kept[key] = value[0]
    return kept


def _text_config(config: Mapping) -> dict:
    """The language model's part of a configuration, with what the outer one adds."""
    for key in ("text_config", "language_config", "llm_config"):
        if isinstance(config.get(key), Mapping):
            return _numbers({**{k: v for k, v in config.items() if not isinstance(v, Mapping)}, **config[key]})
    return _numbers(config)


@dataclass(frozen=True)
class _Sizes:
    """Weights of one layer's part, bytes kept per token, bytes kept for ever."""

    params: int = 0
    token_bytes: int = 0
    state_bytes: int = 0

    def __add__(self, other: _Sizes) -> _Sizes:
        return _Sizes(self.params + other.params, self.token_bytes + other.token_bytes,
                      self.state_bytes + other.state_bytes)


def read_config_json(folder: Path) -> dict:
    """The folder's config.json. UserError where it is missing, damaged, or has numbers that no model has."""
    path = folder / CONFIG
    try:
        config = read_json(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no model: it has no {CONFIG}.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); download the model again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model's configuration; download the model again.")
    for name, value in _values(config):
        if _too_much(name, value):
            raise UserError(f"{path} has a {name!r} that no model has; download the model again.")
    return config


def _values(config: dict) -> Iterator[tuple[str, object]]:
    """Every key with its value, however deep."""
    parts: list = [config]
    while parts:
        part = parts.pop()
        for name, value in part.items() if isinstance(part, dict) else (("list", each) for each in part):
            yield str(name)[:60], value
            if isinstance(value, list | dict):
                parts.append(value)


def _too_much(name: str, value) -> bool:
    if isinstance(value, list | dict | str):
        return len(value) > MOST
    most = (MOST_LAYERS if _LAYERS.search(name) else MOST if _COUNTS.search(name)
            else MOST_NUMBER if isinstance(value, int) else float("inf"))
    return isinstance(value, int | float) and abs(value) > most


def spec_from_config(config: Mapping, name: str = "") -> ModelSpec:
    """Shape numbers of a Mixture-of-Experts language model. UserError for a dense model, a number that is missing and
    one that is none."""
    text = _text_config(config)
    name = name or config.get("_name_or_path") or config.get("model_type") or "model"
    kind = str(text.get("model_type") or config.get("model_type") or "").removesuffix("_text")
    experts = _first(text, _ALIASES["experts"], 0)
    if not experts or experts == 1:
        raise UserError(f"{name} has no experts (model type {kind or 'unknown'}); "
                        "Floe Chat is for Mixture-of-Experts models.")
    try:
        return _spec(text, str(name), kind, int(experts))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        raise UserError(f"The configuration of {name} lacks a number that planning needs, or is damaged ({error}); "
                        "download it again.") from error


def _spec(text: dict, name: str, kind: str, experts: int) -> ModelSpec:
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    n = int(_first(text, _ALIASES["decoder_layers"]))
    if n > MOST_LAYERS:
        raise ValueError(f"{n:,} layers")
    mixers, sparse = _mixers(text, kind, n), _sparse_layers(text, kind, n)
    neurons = int(_first(text, _ALIASES["neurons"]))
    total = sum((_mixer(_for_layer(text, i), kind, mixer, hidden) for i, mixer in enumerate(mixers)), _Sizes())
    moe = _router_and_shared(text, kind, hidden, experts, neurons)
    dense = 3 * hidden * _dense_width(text)
    params = total.params + sum(moe if s else dense for s in sparse) + n * _norms(kind, hidden) + hidden
    if kind == "gemma4":                     # a dense MLP beside the experts of every layer
        params += sum(dense for s in sparse if s)
    tied = _tied(text, kind)
    return ModelSpec(
        name=name, model_type=kind, layers=sum(sparse), experts=experts, top_k=int(_first(text, _ALIASES["top_k"])),
        neurons=neurons, hidden=hidden, decoder_layers=n, vocabulary=vocabulary,
        trunk_params=params + vocabulary * hidden * (1 if tied else 2),
        embedding_params=0 if tied else vocabulary * hidden,
        kv_bytes_per_token=total.token_bytes, state_bytes=total.state_bytes,
        context=int(text.get("max_position_embeddings") or 4096),
    )


def _for_layer(text: dict, layer: int) -> dict:
    """The configuration as one layer sees it, where layers differ in their heads."""
    own = {int(index): changes for index, changes in (text.get("per_layer_config") or {}).items()}   # keys like "05"
    return {**text, **_numbers(own.get(layer, {}))}


def _tied(text: dict, kind: str) -> bool:
    default = kind in ("gemma4", "granitemoe", "ernie4_5_moe", "lfm2_moe", "jamba")
    return bool(text.get("tie_word_embeddings", text.get("tie_embedding", default)))


# --- which layer is what --------------------------------------------------------------------------------------
def _mixers(text: dict, kind: str, n: int) -> list[str]:
    """One of full_attention, sliding_attention, linear_attention, conv, mamba for every decoder layer."""
    types = text.get("layer_types") or text.get("layers_block_type")
    if types:
        return [{"attention": "full_attention"}.get(t, t) for t in types[:n]]
    if kind in ("qwen3_next", "qwen3_5_moe"):
        every = text.get("full_attention_interval", 4)
        return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(n)]
    if kind == "gpt_oss":
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]
    if kind == "gemma4":
        types = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(n)]
        return [*types[:-1], "full_attention"]
    if kind == "jamba":
        period, offset = text.get("attn_layer_period", 8), text.get("attn_layer_offset", 4)
        return ["full_attention" if i % period == offset else "mamba" for i in range(n)]
    sliding = text.get("sliding_window") and text.get("use_sliding_window", kind in ("mixtral", "phimoe"))
    return ["sliding_attention" if sliding else "full_attention"] * n


def _sparse_layers(text: dict, kind: str, n: int) -> list[bool]:
    """Which decoder layers have routed experts."""
    if text.get("mlp_layer_types"):
        return [t == "sparse" for t in text["mlp_layer_types"][:n]]
    if isinstance(text.get("is_moe_layer"), list):
        return [bool(t) for t in text["is_moe_layer"][:n]]
    if kind == "jamba":
        period, offset = text.get("expert_layer_period", 2), text.get("expert_layer_offset", 1)
        return [i % period == offset for i in range(n)]
    if "moe_layer_start_index" in text:
        start, every = text["moe_layer_start_index"], text.get("moe_layer_interval", 1)
        end = text.get("moe_layer_end_index", -1)
        return [(i + 1) % every == 0 and start <= i <= (end if end >= 0 else n - 1) for i in range(n)]
    default = 1 if kind in ("glm4_moe", "glm4_moe_lite") else 0
    first = text.get("first_k_dense_replace", text.get("num_dense_layers", default)) or 0
    only_dense, step = text.get("mlp_only_layers") or [], text.get("decoder_sparse_step") or 1
    return [i >= first and i not in only_dense and (i + 1) % step == 0 for i in range(n)]


# --- weights of the parts -------------------------------------------------------------------------------------
def _mixer(text: dict, kind: str, mixer: str, hidden: int) -> _Sizes:
    if mixer == "linear_attention":
        if "mamba_n_heads" in text:
            return _mamba2(text, hidden)
        delta = "linear_num_value_heads" in text or kind in ("qwen3_next", "qwen3_5_moe")
        return _delta_net(text, hidden) if delta else _lightning(text, hidden)
    if mixer == "conv":
        width = text.get("conv_L_cache", 3)
        return _Sizes(4 * hidden * hidden + hidden * width, 0, hidden * width * KV_BYTES)
    if mixer == "mamba":
        return _mamba(text, hidden)
    if text.get("kv_lora_rank"):
        return _latent_attention(text, hidden)
    return _attention(text, kind, mixer, hidden)


def _attention(text: dict, kind: str, mixer: str, hidden: int) -> _Sizes:
    heads, kv = text["num_attention_heads"], text.get("num_key_value_heads") or text["num_attention_heads"]
    width = text.get("head_dim") or hidden // heads
    if kind == "gemma4" and mixer == "full_attention" and "per_layer_config" not in text:
        width = text.get("global_head_dim", 512)
        kv = (text.get("num_global_key_value_heads") if text.get("attention_k_eq_v") else None) or kv
    query, key = heads * width, kv * width
    keys = key if kind == "gemma4" and mixer == "full_attention" and text.get("attention_k_eq_v") else 2 * key
    params = hidden * (query * (2 if kind in GATED_ATTENTION else 1) + keys + query)
    params += _attention_extras(text, kind, hidden, heads, width, query, key)
    bytes_kept = 2 * key * KV_BYTES
    if mixer == "sliding_attention":
        return _Sizes(params, 0, bytes_kept * text["sliding_window"])
    return _Sizes(params, bytes_kept, 0)


def _attention_extras(text: dict, kind: str, hidden: int, heads: int, width: int, query: int, key: int) -> int:
    """Norms of queries and keys, biases, attention sinks."""
    extra = heads if kind == "gpt_oss" else 0
    biased = text.get("attention_bias", kind == "gpt_oss") or text.get("use_bias")
    if biased or text.get("qkv_bias", kind in QKV_BIAS):
        gated = 2 if kind in GATED_ATTENTION else 1
        extra += query * gated + 2 * key + (hidden if kind in OUTPUT_BIAS or kind in HEAD_NORM else 0)
    if kind in WIDE_NORM:
        extra += query + key
    elif kind in HEAD_NORM or text.get("use_qk_norm"):
        extra += 2 * width
    return extra


def _latent_attention(text: dict, hidden: int) -> _Sizes:
    """Multi-head latent attention; the cache holds the compressed latent and the rotary key."""
    heads, latent, rope = text["num_attention_heads"], text["kv_lora_rank"], text["qk_rope_head_dim"]
    nope, value, rank = text["qk_nope_head_dim"], text["v_head_dim"], text.get("q_lora_rank")
    query = heads * (nope + rope)
    params = hidden * query if not rank else hidden * rank + rank + rank * query
    params += hidden * (latent + rope) + latent + latent * heads * (nope + value) + heads * value * hidden
    if text.get("attention_bias"):
        params += (rank or 0) + latent + rope + hidden
    return _Sizes(params, (latent + rope) * KV_BYTES, 0)


def _delta_net(text: dict, hidden: int) -> _Sizes:
    """Gated delta-net: a short convolution and one matrix of state per value head."""
    values, keys = text.get("linear_num_value_heads", 32), text.get("linear_num_key_heads", 16)
    d_value, d_key = text.get("linear_value_head_dim", 128), text.get("linear_key_head_dim", 128)
    kernel = text.get("linear_conv_kernel_dim", 4)
    conv = 2 * keys * d_key + values * d_value
    params = hidden * (conv + values * d_value + 2 * values) + conv * kernel + 2 * values + d_value
    params += values * d_value * hidden
    return _Sizes(params, 0, values * d_value * d_key * STATE_BYTES + conv * kernel * KV_BYTES)


def _lightning(text: dict, hidden: int) -> _Sizes:
    """Lightning attention; also the estimate for linear attention of a kind that is not known here."""
    heads = text["num_attention_heads"]
    width = text.get("head_dim") or hidden // heads
    inner = heads * width
    return _Sizes(hidden * 3 * inner + 2 * inner * hidden + inner, 0, heads * width * width * STATE_BYTES)


def _mamba(text: dict, hidden: int) -> _Sizes:
    inner, state = hidden * text.get("mamba_expand", 2), text.get("mamba_d_state", 16)
    rank, kernel = text.get("mamba_dt_rank") or -(-hidden // 16), text.get("mamba_d_conv", 4)    # else it is "auto"
    params = 2 * hidden * inner + inner * kernel + inner * (rank + 2 * state) + rank * inner + inner * hidden
    params += inner * (state + 2) + (inner if text.get("mamba_conv_bias", True) else 0) + rank + 2 * state
    return _Sizes(params, 0, inner * (state * STATE_BYTES + kernel * KV_BYTES))


def _mamba2(text: dict, hidden: int) -> _Sizes:
    heads, width, state = text["mamba_n_heads"], text.get("mamba_d_head", 64), text.get("mamba_d_state", 128)
    inner, kernel = heads * width, text.get("mamba_d_conv", 4)
    conv = inner + 2 * text.get("mamba_n_groups", 1) * state
    params = hidden * (inner + conv + heads) + conv * (kernel + 1) + 3 * heads + inner + inner * hidden
    return _Sizes(params, 0, inner * state * STATE_BYTES + conv * kernel * KV_BYTES)


def _dense_width(text: dict) -> int:
    return text.get("intermediate_size") or text.get("ffn_hidden_size") or 0


def _router_and_shared(text: dict, kind: str, hidden: int, experts: int, neurons: int) -> int:
    """Trunk weights of one MoE layer: router, shared experts, biases of the routed experts."""
    n_shared = _first(text, _ALIASES["shared"], 1 if kind in ONE_SHARED else 0)
    shared = text.get("shared_expert_intermediate_size") or text.get("shared_intermediate_size") or n_shared * neurons
    params = hidden * experts + 3 * hidden * int(shared) + (hidden if kind in SHARED_GATE else 0)
    if kind == "gpt_oss":
        params += experts + experts * (2 * neurons + hidden)
    if kind == "gemma4":
        params += hidden + experts
    if kind == "afmoe":
        params += experts
    return params


def _norms(kind: str, hidden: int) -> int:
    return hidden * LAYER_NORMS.get(kind, 2)
