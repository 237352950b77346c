"""Architectures that keep transformers' forward attend by our kernel in a step, with the logits of eager attention."""
from __future__ import annotations

import pytest
import torch

from engine.decode import attention
from engine.model import static_cache
from engine.model.static_cache import FullLayer, RecurrentLayer, RingLayer, StepCache, forward
from kernels.trunk.attend import attend
from tests.support.architectures import SMALL, build, config

ATTENDED = [name for name in (
    "afmoe", "aria_text", "beam", "cohere2_moe", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo",
    "flint", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hy_v3", "hunyuan_v1_moe",
    "kolibri1", "laguna", "mellum", "minimax_m2", "phimoe", "qwen2_moe", "solar_open") if name in SMALL]
WINDOWED = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
CHANGED = dict.fromkeys(("mellum", "laguna", "flint", "granitemoe_swa"), WINDOWED)
TOKENS = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Tokens of every call of our attention."""
    found = []

    def counted(projected, *rest):
        found.append(len(projected))
        return attend(projected, *rest)
    monkeypatch.setattr(static_cache, "attend", counted)
    return found


@pytest.mark.parametrize("name", ATTENDED)
@torch.no_grad()
def test_logits_are_those_of_eager_attention(name, calls):
    """Past every window, a prompt, then one token or a few at a time; several at once only where transformers' own
    states take them."""
    model = build(name, **CHANGED.get(name, {}))
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    expected = model(TOKENS, use_cache=False).logits
    model.set_attn_implementation(own)
    assert attention.attends(model)
    cache = StepCache(model.config, 48)
    attending = [layer for layer in cache.layers if isinstance(layer, FullLayer | RingLayer)]
    is_recurrent = any(isinstance(layer, RecurrentLayer) for layer in cache.layers)
    sizes = (12, *(1,) * 28) if is_recurrent else (12, 1, 3, 2, 4, *(1,) * 10, 5, 3)
    found, start = [], 0
    for size in sizes:
        found.append(forward(model, TOKENS[:, start:start + size], cache))
        start += size
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
    assert calls == [size for size in sizes if size <= 4 for _ in attending] and attending


@pytest.mark.parametrize("name", [name for name in ("mimo_v2_flash", "deepseek_v3", "minimax_m3_vl_text",
                                                    "longcat_flash") if name in SMALL])
def test_others_keep_their_own(name):
    """Heads whose values are narrower than their keys; masks of their own."""
    model = build(name)
    own = model.config._attn_implementation
    assert not attention.attends(model) and model.config._attn_implementation == own


def test_all_that_attend_here_are_tried():
    assert len(ATTENDED) == sum(map(len, attention.MASKED_PLAINLY.values()))


@torch.no_grad()
def test_what_is_not_known_goes_to_transformers(calls):
    """Another window than the layer's, a bias; keys that no cache of ours lent, as in transformers' own generation."""
    model = build("mellum", **CHANGED["mellum"])
    plain = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    attention.attends(model)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=6, do_sample=False), plain)
    cache = StepCache(model.config, 48)
    forward(model, TOKENS[:, :6], cache)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 5
    forward(model, TOKENS[:, 6:7], cache)
    assert not calls
    layer = cache.layers[1]
    keys, values = layer.update(*torch.randn(2, 1, 2, 1, 16))
    query, bias = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 1, 48)
    module = model.model.layers[1].self_attn
    found = attention.attention(module, query, keys, values, None, position_bias=bias)[0]
    assert found.shape == (1, 1, 4, 16) and not calls
    assert attention.attention(module, query, keys, values, None)[0].shape == (1, 1, 4, 16) and calls == [1]
    assert config("mellum")._attn_implementation not in attention.OURS.values()
