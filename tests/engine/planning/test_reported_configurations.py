"""Configurations of models that people reported trouble with elsewhere, as the developers' data folder keeps them: what
is planned is what the model keeps, by hand, and what cannot be opened is not planned."""
from __future__ import annotations

import json

import pytest

from engine.__main__ import main
from engine.core import UserError
from engine.files.skeleton import spec_of_folder
from engine.library.catalogue import look_up

# 16-bit cache: layers that keep every token, bytes of one token in each; layers behind a window, bytes, tokens of it;
# the longest context.
KEPT = {
    "phi-3.5-moe": (0, 0, 32, 2 * 8 * 128 * 2, 131_072, 131_072),  # its window is as long as its context
    "mixtral-window-4096": (0, 0, 32, 2 * 8 * 128 * 2, 4096, 32_768),
    "kimi-linear-48b": (7, (512 + 64) * 2, 0, 0, 0, 1_048_576),     # a latent, in the layers that are not linear
    "inkling-small": (7, 2 * 8 * 128 * 2, 35, 2 * 8 * 128 * 2, 512, 1_048_576),
    "gpt-oss-20b": (12, 2 * 8 * 64 * 2, 12, 2 * 8 * 64 * 2, 128, 131_072),
    "glm-4.5-air": (46, 2 * 8 * 128 * 2, 0, 0, 0, 131_072),
    "hunyuan-a13b": (32, 2 * 8 * 128 * 2, 0, 0, 0, 32_768),
    "qwen3-coder-30b": (48, 2 * 4 * 128 * 2, 0, 0, 0, 262_144),
    "qwen3.6-with-quant-in-text": (10, 2 * 2 * 256 * 2, 0, 0, 0, 262_144),
    "deepseek-v3.2": (61, (512 + 64 + 128) * 2, 0, 0, 0, 163_840),  # a latent and the indexer's keys
}
REFUSED = {"llama-4-scout": "no routed experts that transformers runs", "nemotron-3-nano": "experts without a gate"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "deepseek-v3.2" else [])
                                  for name in KEPT])
def test_a_cache_counts_what_each_layer_keeps(shared, name):
    layers, each, behind, of_window, window, context = KEPT[name]
    spec = look_up(str(shared / "cases" / "configs" / name)).spec
    assert spec.kv_bytes_per_token == layers * each and spec.context == context
    assert spec.windows == (((window, behind * of_window),) if behind else ())
    assert spec.state_bytes_at(256) - spec.recurrent_bytes == behind * of_window * min(window, 256)


def test_a_window_longer_than_the_context_takes_no_more_than_the_context(shared, capsys):
    folder = shared / "cases" / "configs" / "phi-3.5-moe"
    assert main(["plan", str(folder), "--machine", "rtx-3060-12gb", "--context", "4096", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["verdict"] == "fits" and made["memory"]["recurrent and window state"] == 4096 * 32 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_opened_is_not_planned(shared, name):
    with pytest.raises(UserError, match=f"^{name} has {REFUSED[name]}"):
        spec_of_folder(shared / "cases" / "configs" / name, name)
