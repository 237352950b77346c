"""Policies of an open model: lossless is the model's own answer, what changes it says so, and both can be changed."""
from __future__ import annotations

import pytest

from engine.chat.engine import Engine
from engine.core import Counters, Options, Sampling, UserError
from engine.policies.presets import PRESETS

GREEDY = Sampling(temperature=0, max_tokens=16)
NEAR = 5_000_000  # about half of the embedded model's experts


@pytest.fixture(scope="module")
def engine(repository):
    with Engine.open(repository / "assets" / "demo", Options("exact", near_bytes=NEAR, device="cpu")) as opened:
        yield opened


def answered(engine, question: str = "Tell me a story about a dog.") -> tuple[str, Counters, str]:
    """An answer's text, what it moved, and by what it is not exact."""
    *events, end = engine.chat([{"role": "user", "content": question}], GREEDY)
    assert end.reason in ("stop", "length")
    return "".join(event.text for event in events if event.kind == "answer"), end.counters, end.lossy


def chosen(engine, policies: str, level: str = "exact", near_bytes: int | None = NEAR) -> None:
    engine.configure(Options(level, near_bytes=near_bytes, device="cpu", policies=policies))


def test_lossless_is_the_models_own_answer_before_and_after_another_choice(engine):
    chosen(engine, "")
    text, counters, lossy = answered(engine)
    assert lossy == "" and counters.far_bytes > 0
    for policies in ("evict=lfu,free=layer", "predict=maps,evict=finemoe,admit=third"):
        chosen(engine, policies)
        assert answered(engine)[::2] == (text, ""), policies
    chosen(engine, PRESETS["cached_only"])
    approximate, _, lossy = answered(engine)
    assert lossy == PRESETS["cached_only"] == engine.snapshot()["policies"] and approximate != text
    chosen(engine, "")
    assert answered(engine)[::2] == (text, "") and engine.snapshot()["policies"] == ""


def test_cached_only_fetches_nothing_while_it_writes(engine):
    chosen(engine, PRESETS["cached_only"])
    for question in ("Hello!", "Name three colours."):
        text, counters, lossy = answered(engine, question)
        assert text and lossy and counters.needed_bytes == counters.hit_bytes > 0
        assert counters.far_bytes == counters.speculative_bytes == 0


def test_where_everything_is_near_nothing_is_approximate(engine):
    chosen(engine, "", near_bytes=None)
    text = answered(engine)[0]
    for policies in PRESETS.values():
        chosen(engine, policies, near_bytes=None)
        assert answered(engine)[::2] == (text, "")


@pytest.mark.parametrize("policies, level, word", [
    ("route=near-only", "balanced", "has to be exact"), ("evict=pinned", "exact", "--train"),
    ("route=near:x", "exact", "a number")])
def test_what_does_not_suit_is_refused_and_changes_nothing(engine, policies, level, word):
    chosen(engine, PRESETS["prefer_cached"])
    with pytest.raises(UserError, match=word):
        chosen(engine, policies, level)
    assert engine.options.policies == engine.snapshot()["policies"] == PRESETS["prefer_cached"]
    assert engine.snapshot()["level"] == "exact" and answered(engine)[2]
