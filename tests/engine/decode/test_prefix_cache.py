"""Reading in parts, going back and reading on gives what reading the whole gives, on every kind of layer and cache."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decode import prefix_cache as prefix_module
from engine.decode.prefix_cache import DynamicPrefix, Prefix, StepPrefix, common_length, copied, tensor_bytes
from engine.model.static_cache import NotCapturable, StepCache
from tests.support.architectures import SMALL, build

CACHES = ["dynamic", "step"]
UNCUTTABLE = ["gpt_oss", "qwen3_next", "qwen3_5_moe_text", "jamba", "lfm2_moe", "minimax", "granitemoehybrid"]


def text(n_tokens: int, seed: int) -> list[int]:
    return torch.randint(3, 128, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefix_of(model, cache: str) -> Prefix:
    if cache == "dynamic":
        return DynamicPrefix(model)
    try:
        return StepPrefix(model, StepCache(model.config, 96))
    except NotCapturable as error:
        pytest.skip(str(error))


@torch.inference_mode()
def whole(model, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1]


@torch.inference_mode()
def read(prefix: Prefix, ids: list[int], chunk: int = 7, marks: tuple[int, ...] = ()) -> tuple[int, torch.Tensor]:
    """What a turn does: keep, read in chunks with marks, last token alone. (tokens kept, logits)"""
    kept = done = prefix.reuse(ids)
    while done < len(ids) - 1:
        upto = min([done + chunk, len(ids) - 1, *(mark for mark in marks if mark > done)])
        prefix.feed(ids[done:upto])
        done = upto
        if done in marks or done == len(ids) - 1:
            prefix.mark()
    return kept, prefix.feed(ids[done:])


def check(prefix: Prefix, model, ids: list[int], **how) -> int:
    kept, logits = read(prefix, ids, **how)
    expected = whole(model, ids)
    scale = expected.abs().max()
    assert (logits - expected).abs().max() < 1e-3 * scale
    assert prefix.ids == ids
    return kept


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", SMALL)
def test_parts_equal_the_whole(name, cache):
    model = build(name)
    for module in model.modules():  # random indexers score many tokens exactly 0, and the order of ties is not defined
        if hasattr(module, "index_topk"):
            module.index_topk = 64
    prefix = prefix_of(model, cache)
    first = text(30, 1)
    assert check(prefix, model, first, marks=(6, 20)) == 0
    longer = first + text(9, 2)                                   # the next question
    assert check(prefix, model, longer, marks=(38,)) == 30
    assert check(prefix, model, longer) == 38                     # regenerated: all but the last token is kept
    edited = first[:25] + text(12, 3)                             # a message changed in the middle
    assert check(prefix, model, edited) in ((20,) if name in UNCUTTABLE else (20, 25))
    assert check(prefix, model, text(11, 4)) == 0                 # another conversation


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", UNCUTTABLE)
def test_layers_that_cannot_be_cut_restart_at_the_nearest_mark(name, cache):
    model = build(name)
    prefix = prefix_of(model, cache)
    ids = text(40, 1)
    check(prefix, model, ids, marks=(10, 24))
    assert prefix.wants_marks and prefix.marks == [10, 24, 39]
    assert check(prefix, model, ids[:23] + text(5, 2)) == 10
    assert prefix.marks == [10, 27]
    assert check(prefix, model, ids[:9] + text(5, 3)) == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 45), st.integers(2, 16), st.integers(0, 99)), min_size=1, max_size=8),
       st.sampled_from(["qwen3_moe", "gpt_oss", "qwen3_next"]), st.sampled_from(CACHES))
def test_any_walk_of_edits_gives_the_logits_of_the_whole(steps, name, cache):
    model = _models.setdefault(name, build(name))
    prefix, ids = prefix_of(model, cache), []
    for cut, n_new, seed in steps:
        ids = ids[:cut] + text(n_new, seed)
        check(prefix, model, ids, marks=(5, 13, 21))
        assert all(mark <= len(ids) for mark in prefix.marks)


_models: dict[str, torch.nn.Module] = {}


@pytest.mark.parametrize("cache", CACHES)
def test_plain_attention_needs_no_marks(cache):
    prefix = prefix_of(build("qwen3_moe"), cache)
    read(prefix, text(20, 1), marks=(5,))
    assert not prefix.wants_marks and prefix.marks == [] and prefix.mark_bytes == 0


@pytest.mark.parametrize("cache", CACHES)
def test_marks_are_bounded_in_number_and_bytes(cache, monkeypatch):
    prefix = prefix_of(build("qwen3_next"), cache)
    read(prefix, text(60, 1), marks=tuple(range(4, 60, 3)))
    assert len(prefix.marks) == prefix_module.MAX_MARKS
    assert prefix.marks[0] == 4 and prefix.marks[-1] == 59
    one = prefix.mark_bytes // prefix_module.MAX_MARKS
    assert one > 0
    monkeypatch.setattr(prefix_module, "MAX_MARK_BYTES", 2 * one)
    read(prefix, text(60, 1) + text(3, 2))
    assert prefix.mark_bytes <= 2 * one and prefix.marks[-1] == 62


def test_a_mark_is_a_copy_and_its_bytes_are_counted():
    prefix = DynamicPrefix(build("gpt_oss"))
    read(prefix, text(20, 1))
    cache = prefix._cache
    twin = copied(cache, "cpu")
    window = twin.layers[0]
    assert window.keys.data_ptr() != cache.layers[0].keys.data_ptr() and torch.equal(window.keys, cache.layers[0].keys)
    pairs = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert tensor_bytes(cache) >= sum(tensor.numel() * 4 for tensor in pairs)


@pytest.mark.parametrize("cache", CACHES)
@torch.inference_mode()
def test_after_a_reset_everything_is_read_again(cache):
    model = build("qwen3_next")
    prefix = prefix_of(model, cache)
    prefix.mark()
    assert prefix.marks == [], "there is nothing to remember yet"
    ids = text(20, 1)
    check(prefix, model, ids)
    prefix.reset()
    assert prefix.marks == [] and check(prefix, model, ids) == 0


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_common_length(a, b):
    n = common_length(a, b)
    assert a[:n] == b[:n] and (n in (len(a), len(b)) or a[n] != b[n])
