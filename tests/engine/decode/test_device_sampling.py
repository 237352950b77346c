"""The sampler of a device: transformers' distribution, from the same settings, without ever waiting for a value."""
from __future__ import annotations

import itertools

import pytest
import torch

from engine.core import MachineError, Sampling
from engine.decode.device_sampling import BEST, DeviceSampler
from engine.decode.sampling import Sampler, merged, processors

V = 3000
HISTORY = [5, 17, 17, 900, 2999]
USUAL = [Sampling(t, k, p, m, r) for t, k, p, m, r in itertools.product(
    (0.6, 1.0, 1.7), (1, 20, 256), (0.3, 0.95, 1.0), (0.0, 0.05, 0.7), (1.0, 1.3))]
UNUSUAL = [Sampling(1.0), Sampling(0.8, top_p=0.97), Sampling(1.0, top_k=257, min_p=0.01), Sampling(1.3, min_p=0.02),
           Sampling(0.7, top_k=1000, top_p=0.9, repetition_penalty=1.2)]


def logits(seed: int, spread: float = 3.0, n: int = V) -> torch.Tensor:
    return spread * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def expected(sampling: Sampling, scores: torch.Tensor, history: list[int]) -> torch.Tensor:
    """Probabilities [V] as transformers' processors leave them."""
    settings = merged(sampling, None)
    found = processors(settings)(torch.tensor([history]), scores[None].clone())[0]
    return torch.nn.functional.one_hot(found.argmax(), len(found)).float() if settings["temperature"] == 0 else (
        found.softmax(0))


def spread_out(tokens: torch.Tensor, shares: torch.Tensor, n: int = V) -> torch.Tensor:
    return torch.zeros(n).index_put((tokens,), shares)


@pytest.mark.parametrize("seed", range(3))
def test_the_distribution_is_that_of_transformers(seed):
    scores, sampler = logits(seed), DeviceSampler(V, 8)
    for sampling in [*USUAL, Sampling(0.0), Sampling(0.0, repetition_penalty=4.0)]:
        sampler.start(sampling, None, HISTORY)
        assert sampler.usual
        found, wanted = spread_out(*sampler.distribution(scores)), expected(sampling, scores, HISTORY)
        assert torch.equal(found > 1e-8, wanted > 1e-8), sampling
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_settings_that_may_keep_more_than_the_best_run_over_all():
    scores, sampler = logits(0, 1.0), DeviceSampler(V, 8)
    for sampling in UNUSUAL:
        sampler.start(sampling, None, HISTORY)
        assert not sampler.usual
        wanted = expected(sampling, scores, HISTORY)
        assert int((wanted > 0).sum()) > BEST
        torch.testing.assert_close(spread_out(*sampler._whole(scores)), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampling", [USUAL[40], UNUSUAL[1]], ids=["best", "whole"])
def test_draws_invert_the_distribution(sampling):
    """At evenly spaced numbers every token is drawn in its proportion, to one."""
    n, scores = 2000, logits(3, 2.0)
    sampler = DeviceSampler(V, n)
    sampler.start(sampling, None, [])
    sampler.uniform.copy_((torch.arange(n) + 0.5) / n)
    wanted = expected(sampling, scores, [])
    counts = torch.zeros(V)
    for _ in range(n):
        token = sampler.draw(scores)
        sampler.seen.zero_()
        counts[token] += 1
    assert float((counts - n * wanted).abs().max()) <= 1 + 1e-3


def test_numbers_are_uniform_and_a_seed_repeats_them():
    sampler, other = DeviceSampler(V, 4000), DeviceSampler(V, 4000)
    sampler.start(Sampling(1.0, 20, seed=5), None, [])
    other.start(Sampling(1.0, 20, seed=5), None, [])
    assert torch.equal(sampler.uniform, other.uniform)
    counts = torch.histc(sampler.uniform, 20, 0, 1)
    assert float(((counts - 200) ** 2 / 200).sum()) < 43.8  # chi-square, 19 degrees of freedom, 0.1 %
    other.start(Sampling(1.0, 20), None, [])
    assert not torch.equal(sampler.uniform, other.uniform)


def test_what_was_drawn_is_punished_next():
    scores, sampler, history = logits(1), DeviceSampler(V, 8), list(HISTORY)
    sampler.start(Sampling(0.0, repetition_penalty=1.8), None, history)
    for _ in range(6):
        wanted = int(expected(Sampling(0.0, repetition_penalty=1.8), scores, history).argmax())
        history.append(int(sampler.draw(scores)))
        assert history[-1] == wanted
    assert len(set(history[-6:])) > 1 and int(sampler.n_drawn) == 6


def test_small_vocabularies_are_always_whole():
    scores, sampler = logits(2, n=100), DeviceSampler(100, 8)
    for sampling in (Sampling(1.0), Sampling(0.8, top_p=0.97), Sampling(1.0, top_k=500)):
        sampler.start(sampling, None, [3])
        assert sampler.usual
        found = spread_out(*sampler.distribution(scores), n=100)
        torch.testing.assert_close(found, expected(sampling, scores, [3]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, 20), Sampling(1.0)])
def test_logits_that_are_not_numbers_are_noticed(sampling):
    sampler = DeviceSampler(V, 8)
    sampler.start(sampling, None, [])
    sampler.draw(logits(0))
    assert not sampler.broken
    sampler.draw(torch.full((V,), torch.nan))
    sampler.draw(logits(0))
    assert sampler.broken


@pytest.mark.parametrize("sampling", [Sampling(1e-300, 0), Sampling(1e-30, 5, repetition_penalty=1e-300),
                                      Sampling(1.0, 0, repetition_penalty=1e-40), Sampling(1.0, 5, 1e-300),
                                      Sampling(10.0, 1_000_000, 1 - 1e-17, 1.0)], ids=repr)
def test_the_smallest_and_largest_settings_draw_a_token(sampling):
    scores, sampler, plain = logits(1), DeviceSampler(V, 8), Sampler(sampling, None)
    sampler.start(sampling, None, HISTORY)
    best = {int(scores.argmax()), *(token for token in HISTORY if scores[token] > 0)}  # a penalty below 1 prefers these
    assert {int(sampler.draw(scores)), plain(scores, HISTORY)} <= best and not sampler.broken


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_told(value):
    scores, sampler = logits(1), DeviceSampler(V, 8)
    scores[7] = value
    sampler.draw(scores)
    assert sampler.broken
    with pytest.raises(MachineError, match="not numbers"):
        Sampler(Sampling(), None)(scores, HISTORY)
