"""The loop that runs a step ahead, and graphs: with make_fx in CUDA's place, the same tokens as without any graph."""
from __future__ import annotations

import pytest
import torch

from engine.core import MachineError, Options, Sampling
from engine.decode.cuda_graph import Graphs
from engine.decode.decoder import DeviceDecoder
from engine.experts.layer import LevelPlan
from engine.model import load
from engine.model.static_cache import StepCache, forward
from tests.engine.experts.on_device import take_over
from tests.engine.experts.test_host import PLANS
from tests.support.folders import compressed
from tests.support.recorded import record

CONTEXT, LIMIT = 64, 24
PROMPT = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(6))
READ = PROMPT.shape[1] - 1
SAMPLING = Sampling(0.8, 20, seed=1, repetition_penalty=1.2)


class Recording:
    """A capture by make_fx."""

    def __init__(self) -> None:
        self.n_warm, self.n_graphs, self.n_replays = 0, 0, 0

    def beside(self, run, strictly: bool) -> None:
        self.n_warm += 1
        run()

    def record(self, run):
        graph, self.n_graphs = record(run)[0], self.n_graphs + 1

        def replay() -> None:
            self.n_replays += 1
            graph()
        return replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compressed("qwen3_5_moe_text", tmp_path_factory.mktemp("graphs"))[2]


@pytest.fixture
def decoder(folder) -> DeviceDecoder:
    loaded = load.load(folder, Options("exact", device="cpu"))
    plan = PLANS["fast"].budgets[:loaded.runtime.far.layers]
    loaded.runtime.plans["fast"] = LevelPlan(plan)
    runtime = take_over(loaded)
    runtime.set_level("exact", runtime.everything_bytes() * 3 // 4)
    return DeviceDecoder(loaded.model, runtime, StepCache(loaded.model.config, CONTEXT), adapts=False)


def begun(decoder: DeviceDecoder, ends: frozenset[int] = frozenset(), limit: int = LIMIT):
    decoder.prefix.reset()
    return decoder.tokens(PROMPT[0].tolist(), SAMPLING, None, ends, limit)


@torch.no_grad()
def answered(decoder: DeviceDecoder, ends: frozenset[int] = frozenset(), limit: int = LIMIT) -> list[int]:
    return [drawn.token for drawn in begun(decoder, ends, limit)]


@torch.no_grad()
def by_hand(decoder: DeviceDecoder) -> list[int]:
    """One step after the other, each token looked at before the next."""
    step, found = decoder.step, []
    step.runtime.phase = "prefill"
    forward(step.model, PROMPT[:, :-1], step.cache)
    step.sampler.start(SAMPLING, None, PROMPT[0].tolist())
    step.start(int(PROMPT[0, -1]), frozenset(), LIMIT)
    for _ in range(LIMIT):
        step.compute()
        step.choose()
        found.append(int(step.token))
    return found


def test_the_loop_gives_the_tokens_of_single_steps(decoder):
    expected = by_hand(decoder)
    assert answered(decoder) == expected and len(set(expected)) > 5
    assert decoder.prefix.ids == [*PROMPT[0].tolist(), *expected[:-1]]
    assert int(decoder.prefix.cache.clock.pos) == READ + LIMIT  # the step ahead of the end has written nothing


def test_an_end_token_ends_and_leaves_no_trace(decoder):
    expected, step, prefix = by_hand(decoder), decoder.step, decoder.prefix
    n = next(i for i in range(4, LIMIT) if expected[i] not in expected[:i])
    before = step.runtime.counters()
    assert answered(decoder, frozenset({expected[n]})) == expected[:n + 1]
    assert int(step.cache.clock.pos) == len(prefix.ids) == READ + n + 1
    kept, used = step.cache.snapshot(READ + n + 1), step.runtime.counters() - before
    assert used.needed_bytes == (n + 1) * step.runtime.far.layers * 2 * step.runtime.far.expert_bytes
    fed = prefix.ids[READ:]
    with torch.no_grad():
        prefix.reset()
        step.runtime.phase = "prefill"
        prefix.feed(PROMPT[0, :-1].tolist())
        step.runtime.phase = "decode"
        for token in fed:
            prefix.feed([token])
    for mine, theirs in zip(kept.layers, step.cache.snapshot(READ + n + 1).layers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_reader_that_stops_knows_what_was_read(decoder):
    with torch.no_grad():
        tokens = begun(decoder)
        found = [next(tokens).token for _ in range(3)]
        tokens.close()
    assert decoder.prefix.ids == [*PROMPT[0].tolist(), *found]
    assert int(decoder.prefix.cache.clock.pos) == len(decoder.prefix.ids)


def test_counters_come_with_the_tokens(decoder):
    with torch.no_grad():
        for drawn in begun(decoder, limit=5):
            counters = decoder.step.runtime.counters()
            assert drawn.counts[:3] == (counters.needed_bytes, counters.hit_bytes, counters.far_bytes)
            assert counters.needed_bytes == counters.hit_bytes + counters.far_bytes > 0


def test_numbers_that_are_none_end_the_answer_with_a_sentence(decoder):
    with torch.no_grad():
        tokens = begun(decoder)
        next(tokens)
        decoder.step.model.lm_head.weight.fill_(torch.nan)
        with pytest.raises(MachineError, match="not numbers"):
            list(tokens)


def test_graphs_give_the_same_answer_and_one_is_made_for_each_kind(decoder):
    runtime, expected, found = decoder.step.runtime, {}, {}
    for graphs in (None, Graphs(decoder.step, capture := Recording())):
        decoder.graphs = graphs
        for level in ("exact", "fast", "exact", "fast"):
            runtime.set_level(level, runtime.near_wish)
            answers = expected if graphs is None else found
            answers[level] = answered(decoder)
    assert found == expected and found["exact"] != found["fast"]
    assert decoder.reason == "" and capture.n_graphs == 2
    assert capture.n_replays == 2 + 4 * (LIMIT + 1)  # each graph proved itself once
    before = runtime.near_wish
    for near_bytes in (runtime.everything_bytes(), before):  # back to a size it had, but not to the same memory
        runtime.set_level(runtime.level, near_bytes)
    assert answered(decoder) == expected["fast"] and capture.n_graphs == 3


def test_a_step_that_cannot_be_captured_runs_as_it_is(decoder, monkeypatch):
    expected, step = answered(decoder), decoder.step
    compute = step.compute

    def asking() -> None:
        compute()
        if (step.logits + 0).max().item() > -1e9:
            step.logits.add_(0)
    monkeypatch.setattr(step, "compute", asking)
    decoder.graphs = Graphs(step, Recording())
    assert answered(decoder) == expected
    assert decoder.reason.startswith("This model's step cannot be captured (") and decoder.reason.endswith("slower.")


def test_a_graph_that_computes_something_else_is_not_used(decoder, monkeypatch):
    """A count kept in Python is what captures get wrong: frozen, it repeats the position it was recorded at."""
    expected, step = answered(decoder), decoder.step
    compute, calls = step.compute, [0]

    def counting() -> None:
        compute()
        calls[0] += 1
        step.logits.mul_(1.0 if calls[0] != 4 else -1.0)  # the fourth run is the recorded one
    monkeypatch.setattr(step, "compute", counting)
    decoder.graphs = Graphs(step, Recording())
    assert answered(decoder) == expected
    assert "other numbers" in decoder.reason
