"""A program's answer is set aside for a person's, between two forwards, and goes on as if nothing had been."""
from __future__ import annotations

import threading
from dataclasses import replace
from itertools import groupby

import pytest

from engine.chat.engine import Engine
from engine.core import Options, Request, Sampling
from engine.decode.prefix_cache import DynamicPrefix
from engine.planning.plan import RESTING
from tests.engine.chat.test_engine import GREEDY, LONG, TALK, finish, told

PROGRAM = Request(owner="a key")
DRAWN = Sampling(temperature=1.0, seed=3, max_tokens=24)


@pytest.fixture(scope="module")
def engine(repository):
    with Engine.open(repository / "assets" / "demo", Options(level="balanced", device="cpu", chunk=16)) as opened:
        yield opened


class Gate:
    """Notes whose cache each forward reads into; the n-th of the first cache waits until `open`."""

    def __init__(self, monkeypatch, n: int):
        self.reached, self.open = threading.Event(), threading.Event()
        self.caches: list[int] = []
        feed = DynamicPrefix.feed

        def watched(prefix: DynamicPrefix, ids: list[int]):
            self.caches.append(id(prefix))
            if self.caches.count(self.caches[0]) == n and self.caches[0] == id(prefix):
                self.reached.set()
                assert self.open.wait(600)
            return feed(prefix, ids)
        monkeypatch.setattr(DynamicPrefix, "feed", watched)

    @property
    def turns(self) -> list[int]:
        """The caches in their order, each run of one as one."""
        return [cache for cache, _ in groupby(self.caches)]


@pytest.mark.parametrize("n", [2, 20], ids=["while it reads", "while it writes"])
def test_a_person_is_answered_within_a_programs_answer(engine, monkeypatch, n):
    alone, end = finish(engine.chat(LONG, DRAWN, request=PROGRAM))
    person_alone = told(finish(engine.chat(TALK, GREEDY))[0])
    engine._turns.prefix.reset()
    gate = Gate(monkeypatch, n)
    program = engine.chat(LONG, DRAWN, request=PROGRAM)
    assert gate.reached.wait(600)
    person = engine.chat(TALK, GREEDY)
    gate.open.set()
    assert told(finish(person)[0]) == person_alone
    events, found = finish(program)
    first, second, third = gate.turns
    assert first == third != second, "in between, in another cache"
    assert told(events) == told(alone) and found.n_tokens == end.n_tokens
    assert found.counters.needed_bytes == end.counters.needed_bytes, "what the person's used is not counted here"
    reading = [event for event in finish(engine.chat(TALK, GREEDY))[0] if event.kind == "prefill"]
    assert reading[0].n_tokens == engine.count_tokens(TALK) - 1, "the person's next question finds what was read"


def turns_of_both(engine, monkeypatch) -> int:
    """Of a program's answer and a person's that comes in the middle of it."""
    gate = Gate(monkeypatch, 20)
    program = engine.chat(LONG, DRAWN, request=PROGRAM)
    assert gate.reached.wait(600)
    person = engine.chat(TALK, GREEDY)
    gate.open.set()
    finish(program), finish(person)
    return len(gate.turns)


def test_where_a_second_cache_does_not_fit_a_person_waits_for_a_programs_answer(engine, monkeypatch):
    """As the plan says it; what is set aside is told while it is."""
    turns, planned = engine._turns, engine._planner.plan(engine.options.level, engine.options)
    assert planned.gives_way and engine.gives_way
    assert engine.snapshot()["resting_most_bytes"] == planned.resting_bytes == dict(planned.memory)[RESTING]
    engine._do(turns.make_room, replace(planned, gives_way=False))
    try:
        assert not engine.gives_way and engine.snapshot()["resting_most_bytes"] == 0
        assert turns_of_both(engine, monkeypatch) == 1, "one cache, one after the other"
    finally:
        engine._do(turns.make_room, planned)
    with turns.aside():
        turns._residency_at = 0.0
        turns.show("decode")
        assert 0 < engine.snapshot()["resting_bytes"] <= planned.resting_bytes
    turns.settle()
    assert engine.gives_way


def test_what_grew_longer_than_was_planned_is_not_set_aside(engine, monkeypatch):
    """Where nobody chose a context the plan counts a shorter one than the model reads."""
    turns, planned = engine._turns, engine._planner.plan(engine.options.level, engine.options)
    n_prompt = engine.count_tokens(LONG)
    for context, n_turns in ((n_prompt - 1, 1), (n_prompt + 64, 3)):
        engine._do(turns.make_room, replace(planned, context=context))
        with monkeypatch.context() as patch:
            assert turns_of_both(engine, patch) == n_turns
        turns.prefix.reset()
    engine._do(turns.make_room, planned)


def test_who_leaves_meanwhile_ends_and_titles_wait(engine, monkeypatch):
    gate, stop = Gate(monkeypatch, 20), threading.Event()
    program = engine.chat(LONG, DRAWN, request=PROGRAM, stop=stop)
    assert gate.reached.wait(600)
    title = engine.side_chat(TALK, replace(GREEDY, max_tokens=3))
    person, other = engine.chat(TALK, GREEDY), engine.chat(LONG, GREEDY, request=PROGRAM)
    stop.set()
    gate.open.set()
    assert finish(person)[1].reason == "stop" and finish(program)[1].reason == "stopped"
    assert finish(title)[1].n_tokens == 3 and finish(other)[1].n_tokens
    assert len(gate.turns) == 4 and engine._programs == 0  # program, person, title, the other program


def test_an_answer_behind_a_change_waits_for_it(engine, monkeypatch):
    gate, before = Gate(monkeypatch, 20), engine.options
    program = engine.chat(LONG, DRAWN, request=PROGRAM)
    assert gate.reached.wait(600)
    change = threading.Thread(target=engine.configure, args=(replace(before, context=512),))
    change.start()
    while not engine._changes:
        threading.Event().wait(0.01)
    person = engine.chat(TALK, GREEDY)
    gate.open.set()
    finish(person)
    change.join()
    assert len(gate.turns) == 1 and engine.options.context == 512, "first the program, then the change, then the answer"
    finish(program)
    engine.configure(before)
