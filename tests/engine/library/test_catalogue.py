"""The catalogue's numbers against transformers' own models, and what a typed name may mean."""
from __future__ import annotations

import json
import random
import re
import threading

import pytest
import torch

from engine.cli.models import plan_table
from engine.core import Options, UserError
from engine.files.skeleton import spec_of, spec_of_folder
from engine.library import catalogue
from engine.machine import table
from engine.model.load import load
from engine.paths import demo_model
from engine.planning.planner import plan
from tests.support.loopback_hub import LoopbackHub
from tests.support.manifests import manifest

NAMES = list(catalogue.entries())
# The geometry that others have published: decoder layers, MoE layers, experts, picks, hidden, neurons; weights of one
# expert in millions; billions of weights routed, active of those, outside the experts, read of those for one token, in
# all; bytes of 16-bit cache a token. They leave small things out (biases, norms), hence the slack in the test.
PUBLISHED = {
    "mixtral-8x7b": (32, 32, 8, 2, 4096, 14336, 176.16, 45.10, 11.274, 1.61, 1.47, 46.70, 131_072),
    "qwen3-30b-a3b": (48, 48, 128, 8, 2048, 768, 4.72, 28.99, 1.812, 1.54, 1.23, 30.53, 98_304),
    "gpt-oss-20b": (24, 24, 32, 4, 2880, 2880, 24.88, 19.11, 2.389, 1.80, 1.22, 20.91, 24_576),
    "gpt-oss-120b": (36, 36, 128, 4, 2880, 2880, 24.88, 114.66, 3.583, 2.13, 1.55, 116.79, 36_864),
    "glm-4.5-air": (46, 45, 128, 8, 4096, 1408, 17.30, 99.66, 6.229, 7.19, 6.57, 106.85, 188_416),
    "qwen3-next-80b-a3b": (48, 48, 512, 10, 2048, 512, 3.15, 77.31, 1.510, 2.36, 2.05, 79.67, 24_576),
    "qwen3.6-35b-a3b": (40, 40, 256, 8, 2048, 512, 3.15, 32.21, 1.007, 2.45, 1.94, 34.66, 20_480),
    "deepseek-v2-lite": (27, 26, 64, 6, 2048, 1408, 8.65, 14.39, 1.350, 1.31, 1.10, 15.71, 31_104),
    "olmoe-1b-7b": (16, 16, 64, 8, 2048, 1024, 6.29, 6.44, 0.805, 0.48, 0.37, 6.92, 131_072),
}
# What transformers' default configuration says where it is not that of the catalogue's model; None: it has no such key.
DEFAULT_SAYS = {
    "qwen3.6-35b-a3b": {"max_position_embeddings": 32768, "full_attention_interval": None},
    "qwen3-30b-a3b": {"num_hidden_layers": 24, "max_position_embeddings": 32768, "head_dim": None,
                      "norm_topk_prob": False},
    "gpt-oss-20b": {"num_hidden_layers": 36, "num_local_experts": 128},      # its default is the large one
    "gemma-4-26b-a4b": {                                                     # its default is a dense model
        "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
        "num_global_key_value_heads": None, "global_head_dim": None, "attention_k_eq_v": False, "sliding_window": 512,
        "max_position_embeddings": 131072, "hidden_size_per_layer_input": 256, "enable_moe_block": False,
        "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None},
    "glm-4.7-flash": {"first_k_dense_replace": None},
    "qwen3-next-80b-a3b": {"intermediate_size": 5632, "max_position_embeddings": 32768,
                           "full_attention_interval": None},
    "gpt-oss-120b": {},
    "glm-4.5-air": {"head_dim": None, "attention_bias": False},
    "mixtral-8x7b": {"head_dim": None, "max_position_embeddings": 131072},
    "olmoe-1b-7b": {"intermediate_size": 2048},
    "deepseek-v2-lite": {                                                    # its default is nobody's model
        "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "num_experts_per_tok": None, "first_k_dense_replace": 0,
        "max_position_embeddings": 2048},
    "ornith-1.5-35b-a3b": {"max_position_embeddings": 32768, "full_attention_interval": None},
    "qwen3-coder-30b-a3b": {"num_hidden_layers": 24, "max_position_embeddings": 32768, "head_dim": None,
                            "norm_topk_prob": False, "intermediate_size": 6144},
    "laguna-xs.2": {"num_attention_heads_per_layer": 40 * [48], "layer_types": 40 * ["full_attention"]},
    "mellum2-12b-a2.5b": {"layer_types": 28 * ["full_attention"]},
    "zaya1-8b": {},
}
# Architectures whose caches and weights are held against a model that runs.
SMALL = ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "olmoe", "gpt_oss", "deepseek_v2",
         "deepseek_v3", "glm4_moe", "glm4_moe_lite", "granitemoe", "granitemoeshared", "granitemoehybrid", "lfm2_moe",
         "jamba", "minimax", "minimax_m2", "dots1", "gemma4_text", "hunyuan_v1_moe", "exaone_moe", "flex_olmo",
         "afmoe", "mellum", "hy_v3", "phimoe", "ernie4_5_moe", "cohere2_moe", "laguna", "axk1", "flint",
         "granitemoe_swa", "kolibri1"]


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
    assert entry.spec == spec_of(config, entry.title)


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_those_that_others_published(name):
    spec = catalogue.entries()[name].spec
    shape, (expert, routed, active, trunk, read, total, cache) = PUBLISHED[name][:6], PUBLISHED[name][6:]
    assert shape == (spec.decoder_layers, spec.layers, spec.experts, spec.top_k, spec.hidden, spec.neurons)
    assert spec.kv_bytes_per_token == cache
    assert spec.expert_params / 1e6 == pytest.approx(expert, abs=0.01)
    each = spec.expert_params / 1e9
    found = (spec.n_experts_total * each, spec.layers * spec.top_k * each, spec.trunk_params / 1e9,
             (spec.trunk_params - spec.embedding_params) / 1e9, spec.trunk_params / 1e9 + spec.n_experts_total * each)
    assert found == pytest.approx((routed, active, trunk, read, total), abs=0.05)


@pytest.mark.parametrize("name", [name for name in NAMES if re.search(r"\d+b-a\d+b", name)])
def test_a_name_like_26b_a4b_keeps_its_word(name):
    """26 billion weights, 4 billion of them used for a token: also for those that nobody has published numbers of."""
    spec, (total, active) = catalogue.entries()[name].spec, map(int, re.search(r"(\d+)b-a(\d+)b", name).groups())
    assert (spec.trunk_params + spec.n_experts_total * spec.expert_params) / 1e9 == pytest.approx(total, rel=0.05)
    assert spec.active_params / 1e9 == pytest.approx(active, abs=0.6)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_transformers_default_but_where_noted(name):
    """Every number of the table is in transformers' default configuration of that kind, or its own is noted above."""
    from transformers import AutoConfig
    given = dict(catalogue.entries()[name].config)
    default = AutoConfig.for_model(given["model_type"])
    assert default.tie_word_embeddings == given.get("tie_word_embeddings", False)
    given, default = given.get("text_config", given), getattr(default, "text_config", default)
    told = default.to_dict()
    says = {key: told[key] if key in told else getattr(default, key, None) for key in given}
    assert {key: value for key, value in says.items() if value != given[key]} == DEFAULT_SAYS[name]


def test_what_the_table_says_in_words_is_what_the_plans_say():
    """"wants 48 GB of memory", "three quarters of it fit a 12 GB card"."""
    words = {name: entry.about for name, entry in catalogue.entries().items()}
    sizes = {name: int(found[1]) for name, text in words.items() if (found := re.search(r"wants (\d+) GB", text))}
    assert len(sizes) == 3
    for name, spec in ((name, catalogue.entries()[name].spec) for name in NAMES):
        fits = [gib for gib in plan_table.RAM_SIZES
                if plan(spec, table.described("rtx-3060-12gb", ram=gib << 30)).bound != "ram"]
        assert fits[0] == sizes.get(name, 32), name
    for name, said, least, most in (("gpt-oss-20b", "three quarters of it fit a 12 GB card", 0.7, 0.8),
                                    ("deepseek-v2-lite", "fits a 12 GB card whole", 0.99, 1)):
        spec = catalogue.entries()[name].spec
        near = plan(spec, table.described("rtx-3060-12gb")).near
        assert said in words[name] and least < near.expert_slots / spec.n_experts_total <= most


@pytest.mark.parametrize("name", SMALL)
def test_small_architectures(name):
    from tests.support import architectures
    config = architectures.config(name)
    trunk, routed = counted(config)
    spec = spec_of(config, name)
    assert (spec.trunk_params, spec.n_experts_total * spec.expert_params) == (trunk, routed)


@pytest.mark.parametrize("name", SMALL)
def test_cache_bytes_are_those_of_transformers_cache(name):
    """One more token costs what kv_bytes_per_token says; windows and recurrent states are in state_bytes."""
    import torch

    from tests.support import architectures
    window = {"sliding_window": 8} if getattr(architectures.config(name), "sliding_window", None) else {}
    spec = spec_of(architectures.config(name, **window), name)
    model = architectures.build(name, **window)
    sizes = []
    for n in (32, 48):
        with torch.no_grad():
            cache = model(torch.ones(1, n, dtype=torch.long), use_cache=True).past_key_values
        kept = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
        sizes.append(sum(tensor.numel() for tensor in kept if tensor is not None))
    assert (sizes[1] - sizes[0]) / 16 * 2 == spec.kv_bytes_per_token


@pytest.mark.parametrize("name, states", [("qwen3_next", 5120), ("lfm2_moe", 768), ("jamba", 18432), ("minimax", 4096),
                                          ("granitemoehybrid", 9472), ("gpt_oss", 1024)])
def test_states_that_do_not_grow_are_counted(name, states):
    """The same bytes as sums over the configuration gave: 32 bits of recurrent state, 16 of the rest, whole windows."""
    from tests.support import architectures
    assert spec_of(architectures.config(name), name).state_bytes == states


def test_a_model_that_does_not_run_without_memory_keeps_keys_and_values_in_every_layer():
    from engine.files import skeleton
    from tests.support import architectures
    config = architectures.config("qwen3_moe")
    built = skeleton.build_skeleton(config, "x")
    modules = skeleton.experts_modules(built, "x")
    counted_bytes = skeleton.model_spec("x", built, modules).kv_bytes_per_token
    built.model.forward = lambda *_, **__: built.lm_head.weight.sum().item()       # asks for a value
    assert skeleton.model_spec("x", built, modules).kv_bytes_per_token == counted_bytes == 256
    assert all("forward" not in vars(module) for module in modules.values())


def written(folder, config: dict):
    (folder / "config.json").write_text(json.dumps(config))
    return spec_of_folder(folder, "any")


def test_dense_and_damaged_configurations_are_refused(tmp_path):
    with pytest.raises(UserError, match="any has no routed experts"):
        written(tmp_path, {"model_type": "llama", "hidden_size": 64, "vocab_size": 10, "num_hidden_layers": 2})
    with pytest.raises(UserError, match="config.json cannot be used"):
        written(tmp_path, {"model_type": "mixtral", "num_local_experts": 8, "vocab_size": "ten"})
    with pytest.raises(UserError, match="does not know the architecture 'moe9000'"):
        written(tmp_path, {"model_type": "moe9000", "num_experts": 8})


def test_a_configuration_with_anything_in_it_ends_in_numbers_or_a_sentence(tmp_path):
    """Anybody may have written it: kinds mixed up, lists, huge and negative numbers, parts missing."""
    from tests.support import architectures
    rng, refused = random.Random(0), 0
    for _ in range(80):
        config = json.loads(architectures.config(rng.choice(SMALL[:16])).to_json_string(use_diff=False))
        for key in rng.sample(sorted(config), rng.choice((1, 2, 4, 8))):
            config[key] = rng.choice((None, "x", "64", -1, 0, 1, 7, 1.5, 10**9, [], [1], {}, True, float("nan"),
                                      [[], 2]))
        try:
            assert written(tmp_path, config).trunk_params > 0
        except UserError as error:
            assert "\n" not in str(error) and ("any" in str(error) or str(tmp_path) in str(error))
            refused += 1
    assert 10 < refused < 80


@pytest.mark.parametrize("manifest", [{"trunk_bits": "eight"}, {"group_size": [64]}, {"calibration": [1]}, [], "x"])
def test_a_damaged_manifest_is_refused(tmp_path, manifest):
    (tmp_path / "config.json").write_text(json.dumps(dict(catalogue.entries()["mixtral-8x7b"].config)))
    (tmp_path / "floe.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="floe.json is (damaged|not)"):
        catalogue.look_up(str(tmp_path))


def test_entries_are_complete():
    for entry in catalogue.entries().values():
        assert entry.ready == "" and entry.source == "original"
        assert bool(entry.gguf_repository) == entry.gguf_file.endswith(".gguf")
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
    (folder / "floe.json").write_bytes(manifest(trunk_bits=8))
    known = catalogue.look_up(str(folder))
    assert known.compressed and known.trunk_bits == 8
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        catalogue.look_up(str(folder))


def test_look_up_explains_what_is_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="There is no model 'nothing'.*: qwen3.6-35b-a3b, .*, zaya1-8b.$"):
        catalogue.look_up("nothing", tmp_path)
    for typed, offered in (("gpt-oss", "gpt-oss-20b, gpt-oss-120b"), ("Mixtral-8x7", "mixtral-8x7b"),
                           ("gwen3.6-35b-a3", "qwen3.6-35b-a3b")):
        with pytest.raises(UserError, match=f"a name of the catalogue: {offered}"):
            catalogue.look_up(typed, tmp_path)
    with pytest.raises(UserError, match="'owner/bad name!': give a folder, a Hub id"):
        catalogue.look_up("owner/bad name!", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="network is switched off"):
        catalogue.look_up("owner/name", tmp_path)


def test_look_up_reads_the_configuration_of_a_hub_id_and_nothing_else(tmp_path, monkeypatch):
    config = json.dumps(dict(catalogue.entries()["mixtral-8x7b"].config)).encode()
    listed = manifest(trunk_bits=4, calibration={"levels": {"fast": {}}})
    with LoopbackHub() as loopback:
        monkeypatch.setenv("HF_ENDPOINT", loopback.endpoint)
        loopback.add("me/original", {"config.json": config, "model.safetensors": b"x" * 99})
        loopback.add("me/ready", {"config.json": config, "floe.json": listed, "trunk.safetensors": b"x"})
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


def test_a_model_opens_while_others_are_looked_up():
    """transformers sets the type of new tensors for all threads while it builds one."""
    folder, ended, counted = demo_model(), threading.Event(), []

    def count() -> None:
        while not ended.is_set():
            catalogue._counted.cache_clear()
            counted.append(catalogue.look_up(str(folder)).spec.trunk_params)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(3):
            loaded = load(folder, Options("exact", device="cpu"))
            assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
            loaded.runtime.close()
    finally:
        ended.set()
        thread.join()
    assert len(set(counted)) == 1
