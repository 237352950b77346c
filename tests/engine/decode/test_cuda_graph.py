"""The loop that runs a step ahead, and graphs: with make_fx in CUDA's place, the same tokens as without any graph."""
from __future__ import annotations

import pytest
import torch

from engine.core import MachineError, Options, Sampling
from engine.decode.cuda_graph import Graphs
from engine.decode.device_sampling import DeviceSampler
from engine.decode.step import Decoder, Step
from engine.experts import device
from engine.experts.device import take_over
from engine.experts.host import LevelPlan
from engine.model import load
from engine.model.static_cache import StepCache, forward
from tests.engine.experts.test_host import PLANS
from tests.support.folders import compressed
from tests.support.recorded import record

CONTEXT, LIMIT = 64, 24
PROMPT = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(6))
READ = PROMPT.shape[1] - 1


class Recording:
    """A capture by make_fx."""

    def __init__(self) -> None:
        self.n_warm, self.n_graphs, self.n_replays = 0, 0, 0

    def beside(self, run, strictly: bool) -> None:
        self.n_warm += 1
        run()

    def record(self, run):
        graph, self.n_graphs = record(run, device)[0], self.n_graphs + 1

        def replay() -> None:
            self.n_replays += 1
            graph()
        return replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compressed("qwen3_5_moe_text", tmp_path_factory.mktemp("graphs"))[2]


@pytest.fixture
def step(folder) -> Step:
    """Behind a prompt that has been read."""
    loaded = load.load(folder, Options("exact", device="cpu"))
    plan = PLANS["fast"].budgets[:loaded.runtime.far.layers]
    loaded.runtime.plans["fast"] = LevelPlan(plan)
    runtime = take_over(loaded.model, loaded.runtime.far, "cpu")
    runtime.set_level("exact", runtime.everything_bytes() * 3 // 4)
    step = Step(loaded.model, runtime, StepCache(loaded.model.config, CONTEXT), DeviceSampler(128, CONTEXT))
    read(step)
    return step


def read(step: Step) -> None:
    step.cache.reset()
    step.runtime.phase = "prefill"
    with torch.no_grad():
        forward(step.model, PROMPT[:, :-1], step.cache)
    step.sampler.start(Sampling(0.8, 20, seed=1, repetition_penalty=1.2), None, PROMPT[0].tolist())


def answered(decoder: Decoder, ends: frozenset[int] = frozenset(), limit: int = LIMIT) -> list[int]:
    with torch.no_grad():
        return [drawn.token for drawn in decoder.tokens(int(PROMPT[0, -1]), READ, ends, limit)]


def by_hand(step: Step) -> list[int]:
    """One step after the other, each token looked at before the next."""
    step.start(int(PROMPT[0, -1]), frozenset(), LIMIT)
    found = []
    with torch.no_grad():
        for _ in range(LIMIT):
            step.compute()
            step.choose()
            found.append(int(step.token))
    return found


def test_the_loop_gives_the_tokens_of_single_steps(step):
    expected = by_hand(step)
    read(step)
    decoder = Decoder(step)
    assert answered(decoder) == expected and len(set(expected)) > 5
    assert decoder.fed == [int(PROMPT[0, -1]), *expected[:-1]]
    assert int(step.cache.clock.pos) == READ + LIMIT  # the step ahead of the end has written nothing


def test_an_end_token_ends_and_leaves_no_trace(step):
    expected = by_hand(step)
    n = next(i for i in range(4, LIMIT) if expected[i] not in expected[:i])
    read(step)
    decoder, before = Decoder(step), step.runtime.counters()
    assert answered(decoder, frozenset({expected[n]})) == expected[:n + 1]
    assert int(step.cache.clock.pos) == READ + len(decoder.fed) == READ + n + 1
    kept, used = step.cache.snapshot(READ + n + 1), step.runtime.counters() - before
    assert used.needed_bytes == (n + 1) * step.runtime.far.layers * 2 * step.runtime.far.expert_bytes
    read(step)
    with torch.no_grad():
        for token in decoder.fed:
            step.runtime.phase = "decode"
            forward(step.model, torch.tensor([[token]]), step.cache)
    for mine, theirs in zip(kept.layers, step.cache.snapshot(READ + n + 1).layers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_reader_that_stops_knows_what_was_read(step):
    decoder = Decoder(step)
    with torch.no_grad():
        tokens = decoder.tokens(int(PROMPT[0, -1]), READ, frozenset(), LIMIT)
        found = [next(tokens).token for _ in range(3)]
        tokens.close()
    assert decoder.fed == [int(PROMPT[0, -1]), *found] and int(step.cache.clock.pos) == READ + len(decoder.fed)


def test_counters_come_with_the_tokens(step):
    decoder = Decoder(step)
    with torch.no_grad():
        for drawn in decoder.tokens(int(PROMPT[0, -1]), READ, frozenset(), 5):
            counters = step.runtime.counters()
            assert drawn.counts[:3] == (counters.needed_bytes, counters.hit_bytes, counters.far_bytes)
            assert counters.needed_bytes == counters.hit_bytes + counters.far_bytes > 0


def test_numbers_that_are_none_end_the_answer_with_a_sentence(step):
    decoder = Decoder(step)
    with torch.no_grad():
        tokens = decoder.tokens(int(PROMPT[0, -1]), READ, frozenset(), LIMIT)
        next(tokens)
        step.model.lm_head.weight.fill_(torch.nan)
        with pytest.raises(MachineError, match="not numbers"):
            list(tokens)


def test_graphs_give_the_same_answer_and_one_is_made_for_each_kind(step):
    runtime, expected, found = step.runtime, {}, {}
    for graphs in (None, Graphs(step, capture := Recording())):
        for level in ("exact", "fast", "exact", "fast"):
            runtime.set_level(level, runtime.near_wish)
            read(step)
            answers = expected if graphs is None else found
            answers[level] = answered(Decoder(step, graphs.launch if graphs else None))
    assert found == expected and found["exact"] != found["fast"]
    assert graphs.sentence == "" and capture.n_graphs == 2
    assert capture.n_replays == 2 + 4 * (LIMIT + 1)  # each graph proved itself once
    before = runtime.near_wish
    for near_bytes in (runtime.everything_bytes(), before):  # back to a size it had, but not to the same memory
        runtime.set_level(runtime.level, near_bytes)
    read(step)
    assert answered(Decoder(step, graphs.launch)) == expected["fast"] and capture.n_graphs == 3


def test_a_step_that_cannot_be_captured_runs_as_it_is(step, monkeypatch):
    expected = answered(Decoder(step))
    compute = step.compute

    def asking() -> None:
        compute()
        if (step.logits + 0).max().item() > -1e9:
            step.logits.add_(0)
    monkeypatch.setattr(step, "compute", asking)
    read(step)
    graphs = Graphs(step, Recording())
    assert answered(Decoder(step, graphs.launch)) == expected
    assert graphs.sentence.startswith("This model's step cannot be captured (") and graphs.sentence.endswith("slower.")


def test_a_graph_that_computes_something_else_is_not_used(step, monkeypatch):
    """A count kept in Python is what captures get wrong: frozen, it repeats the position it was recorded at."""
    expected = answered(Decoder(step))
    compute, calls = step.compute, [0]

    def counting() -> None:
        compute()
        calls[0] += 1
        step.logits.mul_(1.0 if calls[0] != 4 else -1.0)  # the fourth run is the recorded one
    monkeypatch.setattr(step, "compute", counting)
    read(step)
    graphs = Graphs(step, Recording())
    assert answered(Decoder(step, graphs.launch)) == expected
    assert "other numbers" in graphs.sentence
