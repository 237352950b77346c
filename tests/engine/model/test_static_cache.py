"""The cache of fixed shape: the logits of a forward without one, past every window, by chunks and token by token."""
from __future__ import annotations

import pytest
import torch

from engine.model.static_cache import NotCapturable, RecurrentLayer, RingLayer, StepCache, forward
from tests.support.architectures import build, config

CAPTURED = ["qwen3_moe", "qwen3_5_moe_text", "qwen3_next", "gpt_oss", "gemma4_text", "mixtral", "glm4_moe"]
N_TOKENS, CONTEXT = 40, 48
TOKENS = torch.randint(3, 128, (1, N_TOKENS), generator=torch.Generator().manual_seed(4))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=CAPTURED)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def expected(model) -> torch.Tensor:
    """Logits [1, N, V] by transformers without a cache: nothing to go wrong."""
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def read(model, cache: StepCache, *sizes: int, start: int = 0) -> torch.Tensor:
    """Logits of TOKENS from `start` on, read in pieces of these sizes."""
    parts = []
    for size in sizes:
        parts.append(forward(model, TOKENS[:, start:start + size], cache))
        start += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize("sizes", [(1,) * N_TOKENS, (5, 4) + (1,) * 31, (20, 3, 2, 4, 1, 10), (N_TOKENS,)],
                         ids=["single", "short", "mixed", "whole"])
@torch.no_grad()
def test_logits_equal_a_forward_without_a_cache(sizes, model, expected):
    cache = StepCache(model.config, CONTEXT)
    for _ in range(2):
        same(read(model, cache, *sizes), expected)
        assert int(cache.clock.pos) == N_TOKENS
        cache.reset()


@torch.no_grad()
def test_a_finished_sequence_writes_nothing(model, expected):
    cache = StepCache(model.config, CONTEXT)
    read(model, cache, 20, 1, 1)
    cache.clock.done.fill_(True)
    for step in (1, 3, 1):
        forward(model, TOKENS[:, :step], cache)
    assert int(cache.clock.pos) == 22
    cache.clock.done.fill_(False)
    same(read(model, cache, *(1,) * 18, start=22), expected[:, 22:])


@torch.no_grad()
def test_the_end_of_the_context_is_no_fault(model, expected):
    cache = StepCache(model.config, 24)
    same(read(model, cache, 20, *(1,) * 4), expected[:, :24])
    attending = [layer for layer in cache.layers if not isinstance(layer, RecurrentLayer)]
    kept = [layer.keys[:, :, :layer.length].clone() for layer in attending]
    cache.clock.done.fill_(True)
    forward(model, TOKENS[:, 24:25], cache)  # a step launched ahead: its row would lie behind the last one
    assert all(torch.equal(a, layer.keys[:, :, :layer.length]) for a, layer in zip(kept, attending, strict=True))


@torch.no_grad()
def test_snapshots_bring_a_message_boundary_back(model, expected):
    cache = StepCache(model.config, CONTEXT)
    read(model, cache, 9, 3)
    kept = cache.snapshot(12)
    other = torch.flip(TOKENS, (1,))
    for size in (7, 1, 1, 1, 12):
        forward(model, other[:, :size], cache)
    cache.restore(kept)
    same(read(model, cache, 6, *(1,) * 22, start=12), expected[:, 12:])
    assert (kept.n_bytes > 0) == any(isinstance(layer, (RingLayer, RecurrentLayer)) for layer in cache.layers)


@torch.no_grad()
def test_back_to_the_beginning(model, expected):
    """A snapshot of a cache that has read nothing, not even made its tensors."""
    cache = StepCache(model.config, CONTEXT)
    empty = cache.snapshot(0)
    read(model, cache, 9, 1, 1)
    cache.restore(empty)
    same(read(model, cache, *(1,) * 24), expected[:, :24])


@torch.no_grad()
def test_cutting_back_where_every_layer_can(model, expected):
    cache = StepCache(model.config, CONTEXT)
    read(model, cache, 4, 1, 1, 1)
    recurrent = any(cache.is_linear)
    assert cache.cut(5, read=7) is not recurrent
    if not recurrent:
        same(read(model, cache, 3, *(1,) * 8, start=5), expected[:, 5:16])
        assert cache.cut(2, read=16) is not any(cache.is_sliding)


def test_layers_without_a_fixed_form_are_refused():
    with pytest.raises(NotCapturable, match="kind conv .* runs step by step"):
        StepCache(config("lfm2_moe"), 16)
