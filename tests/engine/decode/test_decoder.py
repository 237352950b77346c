"""Whole answers by the device's path, run on the CPU: the host's text, the host's bytes, nothing read twice."""
from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from engine.chat.engine import Engine
from engine.core import MachineError, Options, UserError
from engine.decode.decoder import HostDecoder, decoder_for
from engine.experts import runtime as experts_runtime
from engine.experts.device import DeviceRuntime
from engine.experts.working_set import pin
from engine.machine.table import described
from engine.model import load
from engine.model.placement import experts_on_gpu, onto_gpu
from engine.policies import prefetch
from tests.engine.chat.test_engine import DRAWN, GREEDY, LONG, TALK, chat, finish, told
from tests.engine.experts.test_far_locked import Ledger
from tests.support.folders import compressed

OPTIONS = Options("exact", device="cpu", chunk=16, context=400)


def on_device(folder, ledger: Ledger | None = None, said: list | None = None) -> load.Loaded:
    loaded = load.load(folder, OPTIONS)
    near_bytes = loaded.runtime.far.layers * loaded.runtime.far.experts * loaded.runtime.far.expert_bytes // 2
    said = [] if said is None else said
    loaded.runtime = experts_on_gpu(loaded.model, loaded.runtime.far, folder, "exact", loaded.planner,
                                    replace(OPTIONS, near_bytes=near_bytes), lambda text, share: said.append(text),
                                    ledger or Ledger(), "cpu")
    return loaded


@pytest.fixture(scope="module")
def engines(demo_checkpoint):
    """The same model by either path."""
    with Engine(load.load(demo_checkpoint, OPTIONS), OPTIONS) as host:
        with Engine(on_device(demo_checkpoint), OPTIONS) as device:
            assert isinstance(device._turns.runtime, DeviceRuntime) and device._turns.decoder.on_device
            yield host, device


def test_conversations_read_the_same(engines):
    texts, greedy, ended, kept = ["What is your name?"], replace(GREEDY, max_tokens=40), False, 0
    for question in ("And what do you like?", "Tell me more.", "Hi! How are you today?", "Goodbye!"):
        answers = [finish(engine.chat(chat(*texts), greedy)) for engine in engines]
        mine, theirs = (end for _, end in answers)
        assert told(answers[0][0]) == told(answers[1][0])
        assert (mine.n_tokens, mine.reason) == (theirs.n_tokens, theirs.reason)
        assert mine.counters.needed_bytes == theirs.counters.needed_bytes > 0
        prefix = engines[1]._turns.prefix
        assert engines[0]._turns.prefix.ids == prefix.ids and int(prefix.cache.clock.pos) == len(prefix.ids)
        begun = next(event for event in answers[1][0] if event.kind == "prefill")
        assert begun.n_tokens == kept  # what it had read, and written itself, was not read again
        ended, kept = ended or mine.reason == "stop", len(prefix.ids)
        texts += [told(answers[0][0]), question]
    assert ended, "an answer that ends by itself is what may leave the device's flag set"


def test_a_job_beside_the_conversation_leaves_what_was_read(engines):
    host, device = engines
    talk, other = chat("What is your name?"), chat("Tell me about the sea.")
    texts = [told(finish(device.chat(talk, replace(GREEDY, max_tokens=40)))[0])]
    kept = list(device._turns.prefix.ids)
    beside = [told(finish(engine.side_chat(other, GREEDY))[0]) for engine in engines]
    assert beside[0] == beside[1] and device._turns.prefix.ids == kept
    talk = chat("What is your name?", *texts, "And what do you like?")
    answers = [finish(engine.chat(talk, GREEDY)) for engine in engines]
    assert told(answers[0][0]) == told(answers[1][0])
    assert next(event for event in answers[1][0] if event.kind == "prefill").n_tokens == len(kept)


QUESTIONS = ("Hi!", "What is your name?", "Tell me about the sea.", "Why?", "Tell me a story about a dragon. " * 4)


@pytest.mark.parametrize("seed", range(4))
def test_any_talk_reads_the_same(engines, seed):
    """Questions, the same again, edits, other talks, stops and jobs beside: by either path the same words follow."""
    draw = random.Random(seed)
    texts, device = [draw.choice(QUESTIONS)], engines[1]
    for _ in range(10):
        act, some = draw.choice(("ask", "ask", "again", "edit", "new", "beside", "stop")), draw.choice((1, 3, 8, 40))
        greedy = replace(GREEDY, max_tokens=some)
        if act == "stop":
            for event in device.chat(chat(*texts), replace(GREEDY, max_tokens=40)):
                if event.n_tokens == some and event.kind == "answer":
                    device.stop()
            continue
        if act == "new":
            texts = [draw.choice(QUESTIONS)]
        if act == "edit":
            texts = [*texts[:2 * draw.randrange((len(texts) + 1) // 2)], draw.choice(QUESTIONS)]
        asks = [engine.side_chat if act == "beside" else engine.chat for engine in engines]
        answers = [finish(ask(chat(*texts), greedy)) for ask in asks]
        said = told(answers[0][0])
        assert said == told(answers[1][0]) and answers[0][1].reason == answers[1][1].reason != "error"
        assert int(device._turns.prefix.cache.clock.pos) == len(device._turns.prefix.ids)
        if act != "beside":
            texts = [*texts, said, draw.choice(QUESTIONS)] if said and len(texts) < 7 else [draw.choice(QUESTIONS)]


def test_a_chunk_makes_the_logits_of_its_last_token_alone(engines):
    """Logits of 2,048 tokens over 250,000 words would take 2 GB."""
    rows = []
    head = engines[1]._turns.model.lm_head.register_forward_hook(lambda module, given, out: rows.append(out.shape[1]))
    finish(engines[1].chat(chat("Something new. " * 20), GREEDY))
    head.remove()
    assert len(rows) > 3 and set(rows) == {1}


def test_levels_and_near_memory_change_between_answers(engines):
    device, texts = engines[1], {}
    for level in ("exact", "fast", "exact", "fast"):
        device.configure(replace(OPTIONS, level=level, near_bytes=device._turns.runtime.near_bytes))
        text = told(finish(device.chat(LONG, GREEDY))[0])
        assert texts.setdefault(level, text) == text
    device.configure(OPTIONS)


def test_a_seed_repeats_the_answer(engines):
    texts = {told(finish(engines[1].chat(TALK, replace(DRAWN, seed=seed)))[0]) for seed in (7, 7, 8, 9)}
    assert 1 < len(texts) <= 3


def test_stopping_keeps_what_was_read(engines):
    device = engines[1]
    answer = device.chat(LONG, replace(GREEDY, max_tokens=20))
    for event in answer:
        if event.n_tokens == 4 and event.kind == "answer":
            device.stop()
    prefix = device._turns.prefix
    assert int(prefix.cache.clock.pos) == len(prefix.ids)
    again, host = (finish(engine.chat(LONG, GREEDY)) for engine in reversed(engines))
    assert told(again[0]) == told(host[0])


def test_the_context_is_a_limit_and_can_be_changed(engines):
    n_prompt, ends = engines[1].count_tokens(TALK), []
    for engine in engines:
        engine.configure(replace(OPTIONS, context=n_prompt + 5))
        _, end = finish(engine.chat(TALK, replace(GREEDY, max_tokens=100)))
        ends.append((end.n_tokens, end.reason))
        engine.configure(OPTIONS)
    assert ends[0] == ends[1] and ends[0][0] <= 6  # the last one is not read
    assert finish(engines[1].chat(TALK, GREEDY))[1].n_tokens > 6


def test_context_and_near_memory_are_traded_without_loading(demo_checkpoint):
    """As on a small card: more context leaves less near memory, and back; the trunk stays where it is."""
    with Engine(on_device(demo_checkpoint), OPTIONS) as engine:
        engine._planner, near = _Small(engine._planner), {}
        weights, text = engine._turns.model.lm_head.weight, told(finish(engine.chat(TALK, GREEDY))[0])
        for context in (100, 500, 100):
            engine.configure(replace(OPTIONS, context=context))
            assert engine._turns.prefix.cache.clock.context == context
            assert near.setdefault(context, engine._turns.runtime.near_bytes) == engine._turns.runtime.near_bytes
            assert told(finish(engine.chat(TALK, GREEDY))[0]) == text
        assert near[500] < near[100] and engine._turns.model.lm_head.weight is weights


class _Small:
    """A card with so little memory that every token of context costs near memory."""

    machine = described("rtx-3060-12gb")

    def __init__(self, planner):
        self.plan = planner.plan

    def near_bytes(self, level, options):
        return 1_500_000 - 1_000 * options.context


def test_a_card_that_is_lost_leaves_the_answer_so_far(demo_checkpoint):
    """The words that CUDA uses; after them the engine is closed and opened again."""
    with Engine(on_device(demo_checkpoint), OPTIONS) as engine:
        step, calls = engine._turns.decoder.step, [0]
        draw = step.sampler.draw

        def lost(logits):
            calls[0] += 1
            if calls[0] == 6:
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")
            return draw(logits)
        step.sampler.draw = lost
        events, end = finish(engine.chat(TALK, GREEDY))
        assert end.reason == "error" and "stopped in the middle" in end.text and "kept" in end.text
        assert [event.n_tokens for event in events if event.kind == "answer"] == [1, 2, 3, 4]
        step.sampler.draw = draw
    with Engine(on_device(demo_checkpoint), OPTIONS) as engine:
        assert finish(engine.chat(TALK, GREEDY))[1].reason in ("stop", "length")


@pytest.mark.parametrize("level", ["exact", "fast"])
@pytest.mark.parametrize("locked, readable", [(0.0, 0), (0.6, 3)])
def test_what_cannot_be_locked_is_fetched_by_the_host_and_said(demo_checkpoint, engines, level, locked, readable,
                                                                   monkeypatch):
    """The same answer, the same bytes; layers that are locked whole stay the device's own."""
    folder_bytes = engines[1]._turns.runtime.far.layers * engines[1]._turns.runtime.far.experts \
        * engines[1]._turns.runtime.far.expert_bytes
    said, found = [], []
    loaded = on_device(demo_checkpoint, Ledger(limit=int(locked * folder_bytes)), said)
    far = loaded.runtime.far
    assert isinstance(loaded.runtime, DeviceRuntime) and far.readable_layers == readable
    fetched: list[int] = []
    through_host = experts_runtime.fill_through_host
    monkeypatch.setattr(experts_runtime, "fill_through_host", lambda *given: fetched.append(1) or through_host(*given))

    def fill(far_memory, *rest) -> None:
        at = far_memory.data_ptr() - far.memory.bytes.data_ptr()  # outside it is the other engine's
        assert not far.memory.locked_bytes <= at < far.memory.n_bytes, "no kernel can read it"
        by_device(far_memory, *rest)
    by_device = experts_runtime.fill
    monkeypatch.setattr(experts_runtime, "fill", fill)
    with Engine(loaded, OPTIONS) as engine:
        assert "page-locks only" in engine.snapshot()["note"] and engine.snapshot()["note"] in said
        for each in (engine, engines[1]):
            each.configure(replace(OPTIONS, level=level, near_bytes=loaded.runtime.near_bytes))
            before = each.snapshot()["counters"]["needed_bytes"]
            events, end = finish(each.chat(TALK, GREEDY))
            found.append((told(events), end.n_tokens, each.snapshot()["counters"]["needed_bytes"] - before))
        engines[1].configure(OPTIONS)
    assert found[0] == found[1] and fetched


@pytest.mark.parametrize("level", ["exact", "fast"])
def test_what_cannot_be_locked_stays_near_where_it_fits(demo_checkpoint, engines, level, monkeypatch):
    """The same answer, the host fetches nothing for it, and neither a reset nor other pins change that."""
    far = engines[1]._turns.runtime.far
    said, ledger = [], Ledger(limit=int(0.9 * far.layers * far.experts * far.expert_bytes))
    loaded, found = on_device(demo_checkpoint, ledger, said), []
    runtime = loaded.runtime
    assert runtime.far.readable_layers == far.layers - 1 and "stay on the card for good" in said[-1]
    with Engine(loaded, OPTIONS) as engine:
        for each in (engine, engines[1]):
            each.configure(replace(OPTIONS, level=level, near_bytes=loaded.runtime.near_bytes))
        assert not runtime.asks_the_host and runtime.residency()[-1] == 1.0
        with torch.inference_mode():
            pin(runtime, [(0, 0), (far.layers - 1, 1)])
            pin(runtime)
        monkeypatch.setattr(experts_runtime, "fill_through_host", lambda *given: pytest.fail("the host was asked"))
        for each in (engine, engines[1]):
            events, end = finish(each.chat(TALK, GREEDY))
            found.append((told(events), end.n_tokens))
        assert runtime.residency()[-1] == 1.0
        engines[1].configure(OPTIONS)
    assert found[0] == found[1]
    if level == "exact":  # of sketches there is room for all
        with pytest.raises(UserError, match="pinned parts"):
            pin(runtime, [(layer, expert) for layer in range(far.layers) for expert in range(far.experts)])


@pytest.mark.parametrize("name", ["lfm2_moe", "minimax"])
def test_a_model_without_a_cache_of_fixed_form_still_uses_the_devices_experts(name, tmp_path):
    folder = compressed(name, tmp_path)[2]
    loaded = load.load(folder, replace(OPTIONS, context=64))
    runtime = experts_on_gpu(loaded.model, loaded.runtime.far, folder, "exact", loaded.planner,
                             replace(OPTIONS, near_bytes=1 << 20), lambda text, share: None, Ledger(), "cpu")
    decoder = decoder_for(loaded.model, runtime, 64)
    prefix = decoder.prefix
    assert isinstance(decoder, HostDecoder) and "runs step by step" in runtime.reason
    with torch.no_grad():
        assert prefix.feed([3, 4, 5]).isfinite().all() and prefix.feed([6]).isfinite().all()
    assert runtime.counters().needed_bytes > 0


def test_a_full_card_is_said_with_the_plans_sum(demo_checkpoint, monkeypatch):
    loaded = load.load(demo_checkpoint, OPTIONS)
    planner = replace(loaded.planner, machine=described("rtx-3060-12gb"))

    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.10 GiB.")
    monkeypatch.setattr(loaded.model, "to", full)
    with pytest.raises(MachineError, match=r"ran out of memory.*Planned was: Video memory: .* trunk .* experts "):
        onto_gpu(loaded.model, loaded.runtime.far, demo_checkpoint, "exact", planner, OPTIONS, lambda text, share: None,
                 Ledger())


def test_opening_that_fails_late_gives_locked_memory_back(demo_checkpoint, monkeypatch):
    ledger = Ledger()
    loaded = on_device(demo_checkpoint, ledger)
    monkeypatch.setattr(load, "load", lambda *given: loaded)
    assert ledger.registered
    with pytest.raises(UserError, match="at most"):
        Engine.open(demo_checkpoint, replace(OPTIONS, context=10**6))
    assert not ledger.registered


def test_an_answer_counts_its_own_bytes_alone(demo_checkpoint):
    """Not those of a job beside it, nor of the step that was under way when the one before was stopped."""
    needed = []
    with Engine(on_device(demo_checkpoint), OPTIONS) as engine:
        for before in ("nothing", "aside", "stop"):
            if before == "aside":
                _, end = finish(engine.side_chat(TALK, GREEDY))
                assert end.counters.needed_bytes == needed[0]
            if before == "stop":
                for event in engine.chat(LONG, GREEDY):
                    if event.n_tokens == 3 and event.kind == "answer":
                        engine.stop()
            needed.append(finish(engine.chat(TALK, GREEDY))[1].counters.needed_bytes)
    assert needed[0] == needed[1] == needed[2] > 0


def test_closing_gives_locked_memory_back(demo_checkpoint):
    ledger = Ledger()
    with Engine(on_device(demo_checkpoint, ledger), OPTIONS):
        assert ledger.registered
    assert not ledger.registered


def test_a_context_beyond_the_model_is_refused(demo_checkpoint):
    with pytest.raises(UserError, match="reads at most"):
        Engine(on_device(demo_checkpoint), replace(OPTIONS, context=10**9))


def test_nothing_is_fetched_ahead_where_the_link_is_busy(demo_checkpoint):
    """The policy, and that an answer follows it: the same text, from then on without a byte ahead."""
    assert prefetch.has_headroom(True, 79, 1.0, 100) and not prefetch.has_headroom(True, 81, 1.0, 100)
    assert prefetch.has_headroom(False, 49, 1.0, 100) and not prefetch.has_headroom(False, 51, 1.0, 100)
    with Engine(on_device(demo_checkpoint), OPTIONS) as engine:
        runtime = engine._turns.runtime
        text = told(finish(engine.chat(LONG, GREEDY))[0])
        assert runtime.counters().speculative_bytes > 0 and runtime.looks_ahead
        with torch.inference_mode():
            engine._turns.prefix.reset()
        runtime.link_bytes_per_second, before = 1.0, runtime.counters().speculative_bytes
        assert told(finish(engine.chat(LONG, GREEDY))[0]) == text and not runtime.looks_ahead
        used = runtime.counters().speculative_bytes - before
        assert used > 0  # of the first tokens
        finish(engine.chat(LONG, GREEDY))
        assert runtime.counters().speculative_bytes - before == used
        runtime.link_bytes_per_second = float("inf")
        finish(engine.chat(LONG, GREEDY))
        assert runtime.looks_ahead
