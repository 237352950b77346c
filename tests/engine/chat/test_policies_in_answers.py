"""Policies of an open model: lossless is the model's own answer, what changes it says so, and both can be changed. What
a conversation picked comes near again, which changes nothing and which nobody waits for."""
from __future__ import annotations

import threading

import pytest

from engine.chat import engine as owner
from engine.chat.engine import Engine
from engine.chat.habits import Habits
from engine.core import Counters, Options, Picks, Sampling, UserError
from engine.experts.working_set import bring_near
from engine.policies.presets import PRESETS
from tests.support.waiting import until

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
    for policies in ("evict=lfu,free=layer", "free=layer,admit=third,miss=place",
                     "predict=maps,evict=finemoe,admit=third"):
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
    ("route=near-only", "balanced", "has to be exact"), ("free=layer,miss=place", "balanced", "has to be exact"),
    ("evict=pinned", "exact", "--train"),
    ("route=near:x", "exact", "a number")])
def test_what_does_not_suit_is_refused_and_changes_nothing(engine, policies, level, word):
    chosen(engine, PRESETS["prefer_cached"])
    with pytest.raises(UserError, match=word):
        chosen(engine, policies, level)
    assert engine.options.policies == engine.snapshot()["policies"] == PRESETS["prefer_cached"]
    assert engine.snapshot()["level"] == "exact" and answered(engine)[2]


OTHERS = ("Name three colours.", "What is the weather like?", "Who are you?")


def used(engine, question: str) -> tuple[str, Counters, Picks]:
    *events, end = engine.chat([{"role": "user", "content": question}], GREEDY)
    return "".join(event.text for event in events if event.kind == "answer"), end.counters, end.picks


def test_what_a_conversation_picked_comes_near_again_and_changes_no_answer(engine):
    chosen(engine, "")
    text, _, picks = used(engine, "Tell me a story about a dog.")
    layers, k = picks.layers, engine._turns.runtime.top_k
    assert picks.tokens == 16 and sum(picks.counts) == 16 * layers * k
    assert max(map(max, picks.shares())) == round(max(picks.counts) / 16, 3) <= 1

    for question in OTHERS:
        used(engine, question)
    runtime = engine._turns.runtime
    (pool, reserve), = runtime.near.pools()
    most = picks.busiest()[:len(pool.object_of) - reserve]

    def near() -> int:
        return sum(int(pool.slot_of[layer * picks.experts + expert]) >= 0 for layer, expert in most)
    before, ahead = near(), engine.snapshot()["counters"]["speculative_bytes"]
    engine._do(list, bring_near(runtime, picks.busiest()))
    engine._do(engine._turns.show, "idle")
    assert before < near() == len(most)
    n_bytes = engine.snapshot()["counters"]["speculative_bytes"] - ahead
    assert n_bytes >= (len(most) - before) * runtime.far.expert_bytes
    assert used(engine, "Tell me a story about a dog.")[::2] == (text, picks)


def test_nobody_waits_for_it(engine, monkeypatch):
    """An answer that is asked for meanwhile comes behind the expert under way, and what belongs to another model is
    nothing."""
    chosen(engine, "")
    *_, picks = used(engine, "Tell me a story about a dog.")
    used(engine, OTHERS[0])
    brought, gate, done = [], threading.Event(), threading.Event()

    def counted(runtime, experts):
        for each in bring_near(runtime, experts):
            brought.append(each)
            yield each
        done.set()
    monkeypatch.setattr(owner, "bring_near", counted)
    with engine._lock:
        engine._jobs.put((gate.wait,))
    engine.warm(picks)
    answer = engine.chat([{"role": "user", "content": "Hello!"}], GREEDY)
    gate.set()
    assert [event.kind for event in answer][-1] == "end" and len(brought) == 1
    engine.warm(Picks(1, 2, 3, (3, 3)))
    engine._do(int)
    assert len(brought) == 1 and not done.is_set()
    engine.warm(picks)  # nobody waits: to its end
    assert done.wait(60) and len(brought) > 1


def test_a_draft_brings_near_what_the_nearest_answers_took_and_changes_no_answer(engine, tmp_path):
    chosen(engine, "")
    habits, runtime, dog = Habits(tmp_path / "h.npz"), engine._turns.runtime, "Tell me a story about a dog."
    text, _, picks = used(engine, dog)
    engine.learn(dog, picks, habits)
    for question in OTHERS:
        engine.learn(question, used(engine, question)[2], habits)
    (pool, reserve), = runtime.near.pools()
    engine._do(int)
    assert len(habits) == 4
    only = Habits(tmp_path / "only.npz")
    engine.learn(dog, picks, only)
    engine._do(int)
    most = picks.busiest()[:len(pool.object_of) - reserve]
    read = list(engine._turns.prefix.ids)
    engine.expect("Tell me a story about a do", only)
    until(lambda: all(int(pool.slot_of[layer * picks.experts + expert]) >= 0 for layer, expert in most))
    engine._do(int)
    assert engine._turns.prefix.ids == read, "nothing of a draft is read into the conversation"
    assert used(engine, dog)[::2] == (text, picks)
    with engine._lock:  # somebody waits: nothing is looked up
        engine._unfinished.append(None)
    moved = runtime.counters()
    engine.expect(OTHERS[0], habits)
    engine._unfinished.remove(None)
    engine._do(int)
    assert runtime.counters() == moved
    chosen(engine, "", near_bytes=None)
    engine.learn("Everything is near.", picks, only)
    engine._do(int)
    assert len(only) == 1


def test_picks_are_kept_in_few_bytes_and_rubbish_is_none():
    one = Picks(2, 3, 4, (4, 0, 0, 1, 2, 1))
    assert Picks.unpacked(one.packed()) == one and (one + one).counts == (8, 0, 0, 2, 4, 2)
    assert one.shares() == [[1, 0, 0], [0.25, 0.5, 0.25]] and one.busiest() == [(0, 0), (1, 1), (1, 0), (1, 2)]
    for rubbish in (b"", b"x", "text", None, one.packed()[:-9], Picks(1, 1, 1, (1,)).packed()[:4]):
        with pytest.raises(ValueError):
            Picks.unpacked(rubbish)
    for wrong in ((0, 3, 1, ()), (1, 2, 1, (1,)), (1, 1, -1, (1,))):
        with pytest.raises(ValueError):
            Picks(*wrong)
    with pytest.raises(ValueError):
        one + Picks(1, 6, 4, one.counts)
