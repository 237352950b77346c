"""Models of the catalogue opened for real, shrunk: what is particular about each configuration is kept (which layers
look back how far, heads by layer, experts a token), and the logits are transformers' own."""
from __future__ import annotations

import pytest
import torch

from engine.core import Options
from engine.library import catalogue
from engine.model import load
from tests.support.folders import compressed, logits_by_steps

NAMES = ["ornith-1.5-35b-a3b", "qwen3-coder-30b-a3b", "laguna-xs.2", "mellum2-12b-a2.5b", "zaya1-8b"]
LAYERS, N_PREFILL = 4, 9
TOKENS = torch.randint(3, 128, (N_PREFILL + 5,), generator=torch.Generator().manual_seed(1))


def shrunk(entry: catalogue.Entry) -> tuple[str, dict]:
    """(architecture, changes of its small configuration that keep what this model has of its own)."""
    config = dict(entry.config.get("text_config", entry.config))
    own = ("num_experts_per_tok", "norm_topk_prob", "full_attention_interval")
    kept = {key: config[key] for key in own if key in config}
    kept |= {"num_hidden_layers": LAYERS}
    if "layer_types" in config:
        kept |= {"layer_types": config["layer_types"][:LAYERS], "sliding_window": 8}
    elif "full_attention_interval" in config:
        kept |= {"layer_types": 3 * ["linear_attention"] + ["full_attention"], "num_experts": 16}
    if "num_attention_heads_per_layer" in config:
        heads = [n // config["num_key_value_heads"] for n in config["num_attention_heads_per_layer"][:LAYERS]]
        kept |= {"num_key_value_heads": 1, "num_attention_heads": heads[0], "num_attention_heads_per_layer": heads}
    if kept["num_experts_per_tok"] > 2:
        kept |= {"num_experts": 16}
    return config["model_type"], kept


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_catalogue_opens_and_answers_as_transformers_does(name, tmp_path):
    architecture, changes = shrunk(catalogue.entries()[name])
    model, source, made = compressed(architecture, tmp_path, **changes)
    expected = logits_by_steps(model, TOKENS, N_PREFILL)
    for folder, level, limit in ((source, "full", 2e-3), (made, "exact", 0.5)):
        loaded = load.load(folder, Options(level, device="cpu", predict=False))
        assert loaded.spec.top_k == changes["num_experts_per_tok"]
        found = logits_by_steps(loaded.model, TOKENS, N_PREFILL)
        assert (found - expected).norm() < limit * expected.norm(), level
