"""A large head in two planes: an answer is the same, and whoever needs all logits gets all."""
from __future__ import annotations

import pytest
import torch

from engine.core import Options, Sampling
from engine.decode.cuda_graph import Graphs
from engine.decode.decoder import DeviceDecoder, HostDecoder
from engine.decode.prefix_cache import StepPrefix
from engine.decode.sampling import Sampler, merged, processors
from engine.library.compress import compress
from engine.model import packed
from engine.model.load import load
from engine.model.static_cache import StepCache
from kernels import dispatch
from tests.engine.experts.on_device import take_over
from tests.support import folders
from tests.support.recorded import Recording

SETTINGS = [Sampling(0.0, 0, 1.0, 0.0, 1.0), Sampling(0.9, 5, 0.9, 0.02, 1.0, seed=1),
            Sampling(0.9, 0, 0.9, 0.0, 1.0, seed=2), Sampling(0.0, 0, 1.0, 0.0, 1.2)]


@pytest.fixture(scope="module", params=[("qwen3_moe", False), ("qwen3_moe", True), ("gemma4_text", True)])
def opened(request, tmp_path_factory):
    """The same folder opened with a head of one plane and of two; tied to its embedding or not."""
    return both_of(*request.param, tmp_path_factory.mktemp("nested"))


def both_of(name, is_tied, folder):
    folders.checkpoint(name, folder / "checkpoint", hidden_size=128, head_dim=32, max_position_embeddings=512,
                       tie_word_embeddings=is_tied)
    compress(folder / "checkpoint", folder / "compressed", device="cpu", trunk_bits=8)
    with pytest.MonkeyPatch.context() as patch:
        plain = load(folder / "compressed", Options(level="exact", device="cpu"))
        patch.setattr(packed, "NESTED_FROM", 0)
        return plain, load(folder / "compressed", Options(level="exact", device="cpu"))


def answer(loaded, sampling, around=None):
    decoder = HostDecoder(loaded.model)
    drawn = list(decoder.tokens(list(range(10)), sampling, None, frozenset(), 30, around))
    assert not decoder.prefix.fused.n_best
    return [one.token for one in drawn], torch.stack([one.logits for one in drawn[1:]])


@torch.inference_mode()
def test_an_answer_is_that_of_the_whole_head(opened):
    plain, nested = opened
    head, embedding = nested.model.get_output_embeddings(), nested.model.get_input_embeddings()
    is_tied = plain.model.get_input_embeddings().weight is plain.model.get_output_embeddings().weight
    assert head.weight.alone.is_nested and (embedding.weight is head.weight) == is_tied
    for sampling in SETTINGS:
        (expected, logits), (found, few) = (answer(loaded, sampling) for loaded in opened)
        best = Sampler(sampling, None).n_best
        assert found == expected and bool(few.isfinite().all()) == (not best or plain.model.config.vocab_size < 2)
        torch.testing.assert_close(few[few.isfinite()], logits[few.isfinite()], rtol=0,
                                   atol=1e-4 * float(logits.abs().max()))
        _, every = answer(nested, sampling, around=lambda draw: draw)
        torch.testing.assert_close(every, logits, rtol=0, atol=1e-4 * float(logits.abs().max()))


@torch.inference_mode()
def test_a_token_in_one_call_has_the_bits_of_many(opened):
    model, found = opened[1].model, []
    for in_one in (True, False):
        decoder = HostDecoder(model)
        if not in_one:
            decoder.prefix.fused.in_one_call = lambda cache: False
        drawn = list(decoder.tokens(list(range(10)), SETTINGS[0], None, frozenset(), 8))
        found.append(torch.stack([one.logits for one in drawn]))
        is_one = in_one and model.config.model_type == "qwen3_moe" and not dispatch.why_not_compiled()
        assert decoder.prefix.fused.in_one_call(decoder.prefix._cache) == is_one
    assert torch.equal(*found)


@torch.inference_mode()
def test_a_recorded_step_is_told_by_a_tensor(opened):
    model, found = opened[1].model, []
    for n_best in (0, torch.tensor([0]), torch.tensor([5]), 5):
        prefix = StepPrefix(model, StepCache(model.config, 40))
        prefix.feed(list(range(10)))
        prefix.fused.n_best = n_best
        found.append(prefix.feed([3]))
    whole, all_of_them, few, same = found
    assert torch.equal(whole.argmax(), few.argmax()) and 5 <= int(few.isfinite().sum()) < len(few)
    for one in found[1:]:
        there = one.isfinite()
        torch.testing.assert_close(one[there], whole[there], rtol=0, atol=1e-4 * float(whole.abs().max()))
    assert bool(all_of_them.isfinite().all()) and torch.equal(few.isfinite(), same.isfinite())


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("gemma4_text", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_device_answers_as_with_the_whole_head_step_by_step_and_recorded(name, tmp_path):
    """Where a setting, or who looks at every step, needs all logits, all are there; a graph proves itself by all."""
    plain, nested = (DeviceDecoder(one.model, take_over(one), StepCache(one.model.config, 64), adapts=False)
                     for one in both_of(name, False, tmp_path))
    recorded = Graphs(nested.step, capture := Recording())
    for settings in (*SETTINGS, Sampling(1.0, 257, 1.0, 0.0, 1.0, seed=3)):
        expected, _ = answer_of(plain, settings)
        for nested.graphs in (None, recorded):
            found, is_whole = answer_of(nested, settings)
            assert found == expected and is_whole == (not Sampler(settings, None).n_best), settings
    assert nested.reason == "" and capture.n_graphs
    for one in nested.tokens([*range(10)], SETTINGS[0], None, frozenset(), 5, around=lambda draw: draw):
        assert bool(one.logits.isfinite().all())


def answer_of(decoder, settings):
    """Its tokens, and whether its last step computed all logits."""
    decoder.prefix.reset()
    tokens = [one.token for one in decoder.tokens(list(range(10)), settings, None, frozenset(), 20)]
    logits = decoder.step.logits
    return tokens, bool((logits > logits.min()).sum() == len(logits) - 1)


def test_how_many_logits_decide():
    found = [Sampler(sampling, None).n_best for sampling in (*SETTINGS, Sampling(1.0, 257, 1.0, 0.0, 1.0))]
    assert found == [1, 5, 0, 0, 0]


def test_draws_among_the_best_follow_transformers_own_processors():
    """Of a top-k without a penalty only its logits are looked at."""
    logits, settings = torch.randn(500, generator=torch.Generator().manual_seed(0)), Sampling(0.7, 5, 0.9, 0.1, 1.0, 3)
    sampler, chain = Sampler(settings, None), processors(merged(settings, None))
    expected = chain(torch.empty(1, 0, dtype=torch.long), logits[None])[0].softmax(-1)
    assert sampler.n_best == 5 and 1 < int((expected > 0).sum()) <= 5
    draws = torch.bincount(torch.tensor([sampler(logits, [0]) for _ in range(3000)]), minlength=500) / 3000
    assert (draws - expected).abs().max() < 0.03


def test_a_small_head_stays_in_one_plane(opened):
    assert not opened[0].model.get_output_embeddings().weight.alone.is_nested
