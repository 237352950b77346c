"""The loop that runs a step ahead, and graphs: with make_fx in CUDA's place, the same tokens as without any graph."""
from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from engine.core import MachineError, Options, Sampling
from engine.decode.cuda_graph import Capture, Graphs
from engine.decode.decoder import DeviceDecoder
from engine.experts.layer import LevelPlan
from engine.model import load
from engine.model.static_cache import StepCache, forward
from tests.engine.experts.on_device import take_over
from tests.engine.experts.test_host import PLANS
from tests.support.folders import compressed
from tests.support.recorded import Recording

CONTEXT, LIMIT = 64, 24
PROMPT = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(6))
READ = PROMPT.shape[1] - 1
SAMPLING = Sampling(0.8, 20, seed=1, repetition_penalty=1.2)


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


def begun(decoder: DeviceDecoder, ends: frozenset[int] = frozenset(), limit: int = LIMIT,
          sampling: Sampling = SAMPLING):
    decoder.prefix.reset()
    return decoder.tokens(PROMPT[0].tolist(), sampling, None, ends, limit)


@torch.no_grad()
def answered(decoder: DeviceDecoder, *how, **named) -> list[int]:
    return [drawn.token for drawn in begun(decoder, *how, **named)]


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
    assert capture.n_replays == 2 * 2 + 4 * (LIMIT + 1)  # each graph proved itself at two positions
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
    reset, resets = step.runtime.reset, []
    monkeypatch.setattr(step.runtime, "reset", lambda: (resets.append(len(step.runtime.near.pools())), reset()))
    assert answered(decoder) == expected and len(resets) == 1  # near memory trusts nothing of a run that broke off
    assert decoder.reason.startswith("This model's step cannot be captured (") and decoder.reason.endswith("slower.")


@pytest.mark.parametrize("differs", [{5}, {2, 4}])
def test_a_graph_that_computes_something_else_is_not_used(decoder, monkeypatch, differs):
    """A count kept in Python is what captures get wrong: frozen, it repeats the position it was recorded at, and is
    right there. differs: the runs that are not as the others; the fifth is the recorded one, 2 and 4 are at the second
    position."""
    expected, step = answered(decoder), decoder.step
    compute, calls = step.compute, [0]

    def counting() -> None:
        compute()
        calls[0] += 1
        step.logits.mul_(-1.0 if calls[0] in differs else 1.0)
    monkeypatch.setattr(step, "compute", counting)
    decoder.graphs = Graphs(step, Recording())
    assert answered(decoder) == expected
    assert "other numbers" in decoder.reason


def test_settings_that_need_every_logit_have_a_graph_without_the_draw(decoder):
    whole, capture, found = Sampling(0.8, 0, seed=1), Recording(), []
    decoder.step.sampler.best = 64  # of 128 tokens, as 256 of a real vocabulary
    for graphs in (None, Graphs(decoder.step, capture)):
        decoder.graphs = graphs
        for sampling in (whole, SAMPLING, whole):
            found.append(answered(decoder, sampling=sampling))
    assert found[:3] == found[3:] and found[0] == found[2] != found[1]
    assert decoder.reason == "" and capture.n_graphs == 2


class Streams:
    """In torch.cuda's place: what is asked of it, in order."""

    def __init__(self) -> None:
        self.asked = []

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.asked.append(f"{name} waits for {other.name}"))


def test_a_run_that_fails_beside_is_waited_for(monkeypatch):
    """What it had launched still writes, and what comes next on the main stream would read it."""
    streams = Streams()
    main, own = streams.stream("main"), streams.stream("own")
    for name, value in {"graph_pool_handle": lambda: None, "Stream": lambda **_: own, "current_stream": lambda: main,
                        "stream": lambda stream: nullcontext(), "get_sync_debug_mode": lambda: 0,
                        "set_sync_debug_mode": lambda mode: streams.asked.append(f"mode {mode}")}.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def breaks() -> None:
        streams.asked.append("runs")
        raise RuntimeError("waits for the device")
    with pytest.raises(RuntimeError):
        Capture().beside(breaks, strictly=True)
    assert streams.asked == ["own waits for main", "mode error", "runs", "mode 0", "main waits for own"]
