"""The catalogue's numbers against transformers' own models, and what a typed name may mean."""
from __future__ import annotations

import json

import pytest

from engine import catalogue
from engine.shape import spec_from_config
from engine.spec import UserError
from tests.loopback_hub import LoopbackHub

NAMES = list(catalogue.entries())
# Total weights as the models are known for, in billions, and bytes of 16-bit cache per token.
TOTALS = {"qwen3.6-35b-a3b": (34.66, 20480), "qwen3-30b-a3b": (30.53, 98304), "gpt-oss-20b": (20.91, 24576),
          "gpt-oss-120b": (116.83, 36864), "glm-4.5-air": (106.85, 188416), "qwen3-next-80b-a3b": (79.67, 24576),
          "mixtral-8x7b": (46.70, 131072), "deepseek-v2-lite": (15.71, 31104), "olmoe-1b-7b": (6.92, 131072)}
# Architectures whose trunk is counted to the last weight; the rest of tests/architectures.py within a few per cent.
EXACT = ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "olmoe", "gpt_oss", "deepseek_v2",
         "deepseek_v3", "glm4_moe", "glm4_moe_lite", "granitemoe", "granitemoeshared", "granitemoehybrid", "lfm2_moe",
         "jamba", "minimax", "minimax_m2", "dots1", "gemma4_text", "hunyuan_v1_moe", "exaone_moe", "flex_olmo",
         "afmoe", "mellum", "hy_v3"]
CLOSE = ["phimoe", "ernie4_5_moe", "cohere2_moe", "laguna", "axk1", "flint", "granitemoe_swa", "kolibri1"]


def counted(config) -> tuple[int, int]:
    """(trunk, routed) weights of transformers' model on the meta device, tied weights once, biases in the trunk."""
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    routed = sum(n for name, n in sizes.items() if ".experts." in name and "bias" not in name)
    return sum(sizes.values()) - routed, routed


def transformers_config(entry: catalogue.Entry):
    from transformers import AutoConfig
    arguments = dict(entry.config)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    if entry.name == "deepseek-v2-lite":
        config.q_lora_rank = None      # null in its config.json; TOML has no null
    return getattr(config, "text_config", config)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_counted_as_transformers_has_them(name):
    entry = catalogue.entries()[name]
    config = transformers_config(entry)
    trunk, routed = counted(config)
    assert entry.spec.trunk_params == trunk
    assert entry.spec.n_experts_total * entry.spec.expert_params == routed
    if name in TOTALS:
        total, cache = TOTALS[name]
        assert (trunk + routed) / 1e9 == pytest.approx(total, abs=0.01)
        assert entry.spec.kv_bytes_per_token == cache
    saved = json.loads(config.to_json_string(use_diff=True))       # what save_pretrained writes
    again = spec_from_config(saved, entry.title)
    assert (again.trunk_params, again.kv_bytes_per_token, again.state_bytes, again.layers) == (
        entry.spec.trunk_params, entry.spec.kv_bytes_per_token, entry.spec.state_bytes, entry.spec.layers)


@pytest.mark.parametrize("name", ["qwen3.6-35b-a3b", "gpt-oss-120b", "glm-4.7-flash", "glm-4.5-air", "mixtral-8x7b",
                                  "qwen3-next-80b-a3b"])
def test_shape_numbers_equal_transformers_defaults(name):
    """transformers' own default configuration is that of the model; every number we wrote must be there."""
    from transformers import AutoConfig
    given = dict(catalogue.entries()[name].config)
    default = AutoConfig.for_model(given["model_type"])
    given, default = given.get("text_config", given), getattr(default, "text_config", default)
    free = {"max_position_embeddings", "first_k_dense_replace", "intermediate_size", "attention_bias", "model_type",
            "full_attention_interval", "tie_word_embeddings", "head_dim"}
    for key in set(given) - free:
        assert getattr(default, key) == given[key], key


@pytest.mark.parametrize("name", EXACT + CLOSE)
def test_small_architectures(name):
    import architectures
    config = architectures.config(name)
    trunk, routed = counted(config)
    spec = spec_from_config(config.to_dict(), name)
    assert spec.n_experts_total * spec.expert_params == routed
    assert spec.trunk_params == pytest.approx(trunk, abs=0 if name in EXACT else 0.02 * trunk)


@pytest.mark.parametrize("name", EXACT)
def test_cache_bytes_are_those_of_transformers_cache(name):
    """One more token costs what kv_bytes_per_token says; windows and recurrent states are in state_bytes."""
    import architectures
    import torch
    window = {"sliding_window": 8} if getattr(architectures.config(name), "sliding_window", None) else {}
    spec = spec_from_config(architectures.config(name, **window).to_dict(), name)
    model = architectures.build(name, **window)
    sizes = []
    for n in (32, 48):
        with torch.no_grad():
            cache = model(torch.ones(1, n, dtype=torch.long), use_cache=True).past_key_values
        kept = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
        sizes.append(sum(tensor.numel() for tensor in kept if tensor is not None))
    assert (sizes[1] - sizes[0]) / 16 * 2 == spec.kv_bytes_per_token


def test_dense_and_damaged_configurations_are_refused():
    with pytest.raises(UserError, match="no experts"):
        spec_from_config({"model_type": "llama", "hidden_size": 64, "vocab_size": 10, "num_hidden_layers": 2})
    with pytest.raises(UserError, match="lacks a number"):
        spec_from_config({"model_type": "mixtral", "num_local_experts": 8, "vocab_size": 10})


def test_entries_are_complete():
    for entry in catalogue.entries().values():
        assert entry.ready == "" and entry.source == "original"
        assert entry.gguf_repository and entry.gguf_file.endswith(".gguf")
        assert entry.sampling.temperature is not None
        assert entry.spec.context >= 4096
    sizes = {name: entry.original_bytes / 1e9 for name, entry in catalogue.entries().items()}
    assert sizes["qwen3-30b-a3b"] == pytest.approx(61.1, abs=0.1)
    assert sizes["gpt-oss-20b"] == pytest.approx(13.8, abs=0.2)      # MXFP4


def test_find_takes_names_titles_and_repositories():
    assert catalogue.find("QWEN3-30B-A3B").name == "qwen3-30b-a3b"
    assert catalogue.find("Mixtral 8x7B Instruct").name == "mixtral-8x7b"
    assert catalogue.find("openai/gpt-oss-20b").name == "gpt-oss-20b"
    assert catalogue.find("") is None and catalogue.find("gpt") is None


def test_a_published_folder_is_taken_first(tmp_path):
    text = catalogue.TABLE.read_text().replace('ready = ""', 'ready = "somebody/folder"', 1)
    (tmp_path / "c.toml").write_text(text)
    first = next(iter(catalogue.entries(tmp_path / "c.toml").values()))
    assert first.source == "ready" and first.ready == "somebody/folder"


def test_look_up_reads_a_folder(tmp_path):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(catalogue.entries()["mixtral-8x7b"].config)))
    known = catalogue.look_up("mine", tmp_path)
    assert known.folder == folder and not known.compressed and known.spec.experts == 8
    (folder / "floe.json").write_text(json.dumps({"trunk_bits": 8, "calibration": {"levels": {}}}))
    known = catalogue.look_up(str(folder))
    assert known.compressed and known.trunk_bits == 8
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        catalogue.look_up(str(folder))


def test_look_up_explains_what_is_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="There is no model 'nothing'"):
        catalogue.look_up("nothing", tmp_path)
    with pytest.raises(UserError, match="not a Hub id"):
        catalogue.look_up("owner/bad name!", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="network is switched off"):
        catalogue.look_up("owner/name", tmp_path)


def test_look_up_reads_the_configuration_of_a_hub_id_and_nothing_else(tmp_path, monkeypatch):
    config = json.dumps(dict(catalogue.entries()["mixtral-8x7b"].config)).encode()
    manifest = json.dumps({"trunk_bits": 4, "group_size": 128, "calibration": {"levels": {"fast": {}}}}).encode()
    with LoopbackHub() as loopback:
        monkeypatch.setenv("HF_ENDPOINT", loopback.endpoint)
        loopback.add("me/original", {"config.json": config, "model.safetensors": b"x" * 99})
        loopback.add("me/ready", {"config.json": config, "floe.json": manifest, "trunk.safetensors": b"x"})
        loopback.add("me/other", {"model.gguf": b"x"})
        known, ready = (catalogue.look_up(name, tmp_path) for name in ("me/original", "me/ready"))
        assert known.spec.experts == 8 and known.spec.name == "me/original" and not known.compressed
        assert ready.compressed and ready.trunk_bits == 4 and ready.calibration["levels"] == {"fast": {}}
        assert known.folder is None and ready.folder is None
        assert set(loopback.served) == {"config.json", "floe.json"}
        with pytest.raises(UserError, match="me/other has no config.json"):
            catalogue.look_up("me/other", tmp_path)
        with pytest.raises(UserError, match="me/nobody.*does not exist"):
            catalogue.look_up("me/nobody", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")               # what was read once is known without a network
    assert catalogue.look_up("me/ready", tmp_path) == ready


def test_damaged_tables_are_said(tmp_path):
    for text in ("models = 3", "[[models]]\nname = 'x'", "not toml ["):
        (tmp_path / "c.toml").write_text(text)
        catalogue.entries.cache_clear()
        with pytest.raises(UserError, match="catalogue"):
            catalogue.entries(tmp_path / "c.toml")
    catalogue.entries.cache_clear()
