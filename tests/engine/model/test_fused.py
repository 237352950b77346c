"""The fused step against transformers' own forward, token by token over the same weights; the cache with room."""
from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from engine.core import Options
from engine.decode.prefix_cache import DynamicPrefix, StepPrefix
from engine.library.compress import compress
from engine.model.growing_cache import GrowingLayer, give_room
from engine.model.load import load
from engine.model.static_cache import StepCache
from kernels import dispatch
from tests.support import architectures, folders

Tensor = torch.Tensor
WIDE = dict(hidden_size=128, head_dim=32, max_position_embeddings=512)  # matrices that are large enough to be packed
ONE_CALL = {"qwen3_moe", "olmoe", "mixtral", "qwen3_5_moe_text", "qwen3_next"}
SHARED = dict(shared_expert_intermediate_size=64, linear_num_value_heads=4, linear_value_head_dim=32)
LATENT = dict(q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=24, head_dim=16)
GEMMA = dict(final_logit_softcapping=5.0, sliding_window=64)
CASES = [("qwen3_moe", 8, {}), ("qwen3_moe", 4, dict(attention_bias=True, norm_topk_prob=True)), ("qwen3_moe", 16, {}),
         ("qwen3_moe", 8, dict(mlp_only_layers=[0])), ("olmoe", 4, {}), ("mixtral", 8, {}),
         ("qwen3_5_moe_text", 8, SHARED), ("qwen3_next", 4, SHARED), ("qwen3_next", 16, SHARED), ("qwen3_next", 8, {}),
         ("gpt_oss", 8, {}), ("gpt_oss", 16, dict(sliding_window=64)),
         ("glm4_moe", 8, dict(topk_group=1, routed_scaling_factor=2.5)),
         ("glm4_moe", 4, dict(use_qk_norm=True, attention_bias=True)),
         ("glm4_moe_lite", 8, LATENT), ("deepseek_v3", 4, dict(rope_interleave=False, topk_group=1) | LATENT),
         ("deepseek_v3", 16, dict(q_lora_rank=None, head_dim=16)),
         ("deepseek_v2", 4, dict(topk_method="group_limited_greedy", n_group=2, topk_group=1) | LATENT),
         ("gemma4_text", 8, GEMMA), ("gemma4_text", 4, GEMMA | dict(global_head_dim=64, attention_k_eq_v=True,
                                                                    num_global_key_value_heads=1))]


@pytest.mark.parametrize(("name", "bits", "changes"), CASES)
def test_a_step_is_transformers_own(name: str, bits: int, changes: dict, tmp_path) -> None:
    """Behind prompts, over the room's end, one token and several at once, and after going back; behind the cache of a
    card's step, too. A token in one call has the bits of many calls."""
    folders.checkpoint(name, tmp_path / "checkpoint", **WIDE | changes)
    compress(tmp_path / "checkpoint", tmp_path / "compressed", device="cpu", trunk_bits=bits)
    model = load(tmp_path / "compressed", Options(level="exact", device="cpu")).model
    with torch.no_grad():       # norms and a layer's scale are one in a new model, whichever is whose
        draw = torch.Generator().manual_seed(1)
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in key or "layer_scalar" in key:
                value.uniform_(0.6, 1.4, generator=draw)
    fused, plain, fixed = DynamicPrefix(model), DynamicPrefix(model), StepPrefix(model, StepCache(model.config, 300))
    apart = DynamicPrefix(model)
    assert fused.fused is not None and fixed.fused is not None
    plain.fused, apart.fused.in_one_call = None, lambda cache: False
    everything = fused, apart, plain, fixed
    ids = torch.randint(128, (330,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        for at, n in [(0, 20), *((20 + i, 1) for i in range(5)), (25, 4), (29, 1), (30, 260), (290, 1), (291, 3)]:
            expected = plain.feed(ids[at:at + n])
            found = [prefix.feed(ids[at:at + n]) for prefix in (fused, apart, fixed)]
            assert torch.equal(found[0], found[1])
            for one in found[1:]:
                same(one, expected)
            for prefix in everything:
                if at + n == 24:
                    prefix.mark()    # recurrent states go back to where they were marked
        for prefix in everything:
            assert prefix.reuse(ids[:24] + [1, 2]) == 24
        expected, *found = [prefix.feed([1]) for prefix in (plain, fused, apart, fixed)]
        assert torch.equal(found[0], found[1])
        for one in found[1:]:
            same(one, expected)
        # In many calls where a layer has no experts, biased ones, or a matrix of 32 columns, or nothing is compiled.
        is_one = name in ONE_CALL and "mlp_only_layers" not in changes and (name != "qwen3_next" or changes)
        assert fused.fused.in_one_call(fused._cache) == bool(is_one and not dispatch.why_not_compiled())


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("changes", [dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
                                     dict(use_sliding_window=True, sliding_window=8)])
def test_what_it_does_not_know_runs_transformers_forward(changes: dict) -> None:
    assert DynamicPrefix(architectures.build("qwen3_moe", 0, **changes)).fused is None


def test_room_is_no_part_of_a_cache() -> None:
    """Growing past the room, cut and written again: the rows of transformers' own layer."""
    theirs, draw = DynamicLayer(), torch.Generator().manual_seed(0)
    rows = torch.randn(2, 1, 2, 700, 16, generator=draw)
    theirs.update(*rows[..., :3, :])
    cache = DynamicCache()
    cache.layers = [theirs]
    give_room(cache)
    ours, theirs = cache.layers[0], DynamicLayer()
    theirs.update(*rows[..., :3, :])
    assert type(ours) is GrowingLayer
    for first, end in ((3, 4), (4, 300), (300, 301), (301, 700)):
        for layer in (ours, theirs):
            layer.update(*rows[..., first:end, :])
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    for layer in (ours, theirs):
        layer.crop(-600)
        layer.update(*rows[..., 5:7, :])
    assert torch.equal(ours.keys, theirs.keys) and ours.get_seq_length() == 102


@pytest.mark.parametrize(("name", "changes"), [("qwen3_moe", {}), ("qwen3_next", {}), ("deepseek_v2", LATENT)])
def test_a_text_at_exact_is_the_same_however_it_is_cut(name: str, changes: dict, tmp_path) -> None:
    """Written token by token, then read in windows of several: what each is followed by is the same up to rounding."""
    folders.checkpoint(name, tmp_path / "checkpoint", **WIDE | changes)
    compress(tmp_path / "checkpoint", tmp_path / "compressed", device="cpu", trunk_bits=8)
    loaded = load(tmp_path / "compressed", Options(level="exact", device="cpu"))
    prompt, model = torch.randint(128, (9,), generator=torch.Generator().manual_seed(1)).tolist(), loaded.model
    with torch.inference_mode():
        for made in (lambda: DynamicPrefix(model), lambda: StepPrefix(model, StepCache(model.config, 64))):
            prefix = made()
            loaded.runtime.phase = "prefill"
            logits, text, seen = prefix.feed(prompt), [], []
            loaded.runtime.phase = "decode"
            for _ in range(24):
                text.append(int(logits.argmax()))
                logits = prefix.feed(text[-1:])
                seen.append(logits)
            for cut in ((2,), (3,), (4,), (1, 4, 2, 3)):
                prefix, at = made(), 0
                loaded.runtime.phase = "prefill"
                prefix.feed(prompt)
                loaded.runtime.phase = "decode"
                for n in cut * (24 // sum(cut)):
                    logits = prefix.feed(text[at:at + n])
                    at += n
                    same(logits, seen[at - 1])
        assert len(set(text)) > 4
