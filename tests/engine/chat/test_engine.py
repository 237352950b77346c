"""The engine's answers: right, reproducible, stoppable, and only as much reading as is new."""
from __future__ import annotations

import gc
import threading
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from engine.chat import engine as generate
from engine.chat.engine import Engine
from engine.core import Event, MachineError, Options, Sampling, UserError
from engine.decode.sampling import Sampler, end_tokens, merged, most_tokens
from engine.machine.process_memory import own_bytes
from engine.model import load
from tests.support.architectures import build

GREEDY = Sampling(temperature=0, max_tokens=24)
DRAWN = Sampling(temperature=1.0, top_p=0.95, seed=7, max_tokens=24)


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


LONG = chat("Tell me about the sea. " * 20)
TALK = chat("Hi! How are you today?")


class Forwards:
    """Counts the forwards of an engine's model, fused ones too, and runs `on[n]` before the n-th (from 1)."""

    def __init__(self, prefix):
        self.sizes: list[int] = []
        self.on: dict[int, object] = {}
        self._prefix, self._forward = prefix, prefix._forward
        prefix._forward = self._counted

    def remove(self) -> None:
        del self._prefix._forward

    def _counted(self, ids: list[int]) -> torch.Tensor:
        self.sizes.append(len(ids))
        action = self.on.get(len(self.sizes))
        if action:
            action()
        return self._forward(ids)


@pytest.fixture(scope="module")
def trained(demo_checkpoint) -> load.Loaded:
    return load.load(demo_checkpoint, Options(level="exact", device="cpu"))


@pytest.fixture
def engine(trained):
    with Engine(trained, Options(chunk=16)) as opened:
        yield opened


@pytest.fixture
def forwards(engine):
    counter = Forwards(engine._turns.prefix)
    yield counter
    counter.remove()


def told(events: list[Event]) -> str:
    return "".join(event.text for event in events if event.kind == "answer")


def finish(answer) -> tuple[list[Event], Event]:
    events = list(answer)
    assert [event.kind for event in events].count("end") == 1 and events[-1].kind == "end"
    return events, events[-1]


# What comes out

def test_greedy_is_what_transformers_generates(engine, trained):
    model, tokenizer = trained.model, trained.tokenizer
    for messages in (TALK, LONG, chat("What is your name?", "I am Kim.", "And what do you like?")):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        trained.runtime.phase = "auto"
        with torch.inference_mode():
            expected = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1]:]
        events, end = finish(engine.chat(messages, GREEDY))
        assert told(events) == tokenizer.decode(expected, skip_special_tokens=True)
        assert end.n_tokens == len(expected)
        assert end.reason == ("stop" if expected[-1] == tokenizer.eos_token_id else "length")


def test_events_grow_token_by_token(engine):
    events, end = finish(engine.chat(LONG, GREEDY))
    reading = [event for event in events if event.kind == "prefill"]
    answer = [event for event in events if event.kind == "answer"]
    assert events == reading + answer + [end]
    total = engine.count_tokens(LONG)
    assert [event.n_tokens for event in reading] == [*range(0, total - 1, 16), total - 1]
    assert reading[1].text == f"Read 16 of {total} tokens"
    assert [event.n_tokens for event in answer] == list(range(1, end.n_tokens + 1))
    assert all(event.tokens_per_second > 0 for event in answer) and end.tokens_per_second > 0


def test_a_seed_repeats_the_answer_and_another_one_does_not(engine):
    first = told(finish(engine.chat(TALK, DRAWN))[0])
    assert told(finish(engine.chat(TALK, DRAWN))[0]) == first
    others = {told(finish(engine.chat(TALK, replace(DRAWN, seed=seed)))[0]) for seed in range(3)}
    assert others != {first}
    unseeded = (told(finish(engine.chat(TALK, replace(DRAWN, seed=None)))[0]) for _ in range(40))
    one = next(unseeded)
    assert any(another != one for another in unseeded)  # three may well be alike


def test_limits_end_the_answer(engine):
    events, end = finish(engine.chat(TALK, replace(GREEDY, max_tokens=3)))
    assert (end.reason, end.n_tokens) == ("length", 3)
    text = told(finish(engine.chat(TALK, GREEDY))[0])
    word = text[5:9]
    events, end = finish(engine.chat(TALK, replace(GREEDY, stop=(word,))))
    assert end.reason == "stop" and told(events) == text[:text.index(word)]


def test_the_context_ends_the_answer(trained):
    with Engine(trained, Options(context=40)) as engine:
        n_prompt = engine.count_tokens(TALK)
        _, end = finish(engine.chat(TALK, replace(DRAWN, max_tokens=1000, stop=(), temperature=3.0, top_p=1.0)))
        # the last token is drawn after all 40 have been read
        assert end.reason == "length" and end.n_tokens == 40 - n_prompt + 1
        assert engine.snapshot()["context_used"] == 40


# How much is read

def test_only_what_is_new_is_read(engine, forwards):
    events, end = finish(engine.chat(TALK, GREEDY))
    first = engine.count_tokens(TALK)
    assert sum(forwards.sizes) == first - 1 + end.n_tokens
    longer = TALK + [{"role": "assistant", "content": told(events)}, *chat("And now?")]
    forwards.sizes.clear()
    _, end = finish(engine.chat(longer, GREEDY))
    read = sum(forwards.sizes) - end.n_tokens
    assert read <= engine.count_tokens(longer) - first - 8   # the answer itself was not read again
    forwards.sizes.clear()
    _, end = finish(engine.chat(longer, GREEDY))              # regenerated
    assert sum(forwards.sizes) == end.n_tokens
    edited = chat("Hi! How are you my friend?")
    forwards.sizes.clear()
    _, end = finish(engine.chat(edited, GREEDY))
    assert sum(forwards.sizes) - end.n_tokens < engine.count_tokens(edited) - 5


def test_a_job_beside_the_conversation_leaves_what_was_read(engine, forwards):
    events, _ = finish(engine.chat(TALK, GREEDY))
    kept, other = list(engine._turns.prefix.ids), chat("Tell me about the sea.")
    beside, _ = finish(engine.side_chat(other, GREEDY))
    assert engine._turns.prefix.ids == kept and engine.snapshot()["context_used"] == len(kept)
    longer = [*TALK, {"role": "assistant", "content": told(events)}, *chat("And now?")]
    forwards.sizes.clear()
    after, end = finish(engine.chat(longer, GREEDY))
    assert sum(forwards.sizes) - end.n_tokens < engine.count_tokens(longer) - len(kept)
    assert told(beside) == told(finish(engine.chat(other, GREEDY))[0])
    assert told(after) == told(finish(engine.chat(longer, GREEDY))[0])
    assert "too many for the context of 512" in finish(engine.side_chat(LONG + LONG + LONG + LONG, GREEDY))[1].text


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next", "qwen3_5_moe_text", "qwen3_moe"])
def test_a_conversation_reads_little_and_answers_as_if_it_read_all(demo_checkpoint, tmp_path, name):
    build(name, vocab_size=4096, max_position_embeddings=512).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_checkpoint).save_pretrained(tmp_path)
    loaded = load.load(tmp_path, Options(level="full", device="cpu"))
    first = [{"role": "system", "content": "Be brief and kind, and never sing."}, *TALK]

    def fresh(messages: list[dict]) -> str:
        with Engine(loaded, Options(chunk=16)) as other:
            return told(finish(other.chat(messages, GREEDY))[0])

    with Engine(loaded, Options(chunk=16)) as engine:
        counter = Forwards(engine._turns.prefix)
        text = told(finish(engine.chat(first, GREEDY))[0])
        second = first + [{"role": "assistant", "content": text}, *chat("Why? " * 6)]
        cases = {"next": (second, 12), "again": (second, 0), "edited": (first + chat("No.") + chat("Oh?"), 12),
                 "first": (first, 12)}
        for case, (messages, saved) in cases.items():
            counter.sizes.clear()
            events, end = finish(engine.chat(messages, GREEDY))
            read = sum(counter.sizes) - end.n_tokens
            assert read == 0 if case == "again" else read <= engine.count_tokens(messages) - saved, case
            counter.remove()
            assert told(events) == fresh(messages), case
            counter = Forwards(engine._turns.prefix)
        counter.remove()


# Stopping

def test_stop_in_prefill_ends_within_the_chunk(engine, forwards):
    forwards.on[2] = engine.stop
    events, end = finish(engine.chat(LONG, GREEDY))
    assert end.reason == "stopped" and end.n_tokens == 0
    assert forwards.sizes == [16, 16]
    assert told(finish(engine.chat(TALK, GREEDY))[0])


def test_stop_in_decode_ends_within_the_token(engine, forwards):
    n_prefill = -(-(engine.count_tokens(TALK) - 1) // 16)
    forwards.on[n_prefill + 4] = engine.stop
    events, end = finish(engine.chat(TALK, GREEDY))
    assert (end.reason, end.n_tokens, len(forwards.sizes)) == ("stopped", 4, n_prefill + 4)
    assert told(events)
    whole = told(finish(engine.chat(TALK, GREEDY))[0])
    assert whole.startswith(told(events))


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_leaving_the_iterator_early_stops_the_model(engine, forwards, leave):
    reached, left = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        assert left.wait(60)

    forwards.on[6] = wait
    answer = engine.chat(LONG, GREEDY)
    assert next(answer).kind == "prefill"
    assert reached.wait(60)
    if leave == "close":
        answer.close()
        assert list(answer) == []
    else:
        del answer
    left.set()
    finish(engine.chat(TALK, GREEDY))
    assert sum(forwards.sizes[:6]) == 96 and forwards.sizes[6] < 16   # the seventh belongs to the next answer


def test_a_second_answer_waits_and_stop_is_for_the_first(engine, forwards):
    both = threading.Event()
    forwards.on[1] = lambda: both.wait(60)
    first, second = engine.chat(LONG, GREEDY), engine.chat(TALK, GREEDY)
    engine.stop()
    both.set()
    assert finish(first)[1].reason == "stopped"
    events, end = finish(second)
    assert end.reason in ("stop", "length") and told(events)
    engine.stop()  # nothing runs: nothing happens
    assert finish(engine.chat(TALK, GREEDY))[1].reason == end.reason


def test_a_stopped_answer_ends_though_the_model_is_in_the_middle_of_a_step(engine, forwards):
    reached, gate, stop = threading.Event(), threading.Event(), threading.Event()
    forwards.on[2] = lambda: reached.set() or gate.wait(60)
    answer = engine.chat(LONG, GREEDY, None, stop)
    assert reached.wait(60)
    stop.set()
    assert finish(answer)[1].reason == "stopped" and not gate.is_set()
    following = engine.chat(TALK, GREEDY)
    engine.stop()  # is for the one that somebody still reads
    gate.set()
    assert finish(following)[1].reason == "stopped" and len(forwards.sizes) == 2
    assert told(finish(engine.chat(TALK, GREEDY))[0])


# Errors

@pytest.mark.parametrize("error", [RuntimeError("kernel failed"), SystemExit(1), KeyboardInterrupt()])
def test_nothing_ends_the_models_thread(engine, forwards, monkeypatch, error):
    def fail(*given):
        raise error
    forwards.on[1] = fail
    with monkeypatch.context() as patch:
        patch.setattr(generate, "reason_for", fail)  # not even an error that cannot be put into words
        events, end = finish(engine.chat(TALK, GREEDY))
    assert end.reason == "error" and end.text.endswith(".")
    engine._jobs.put((fail,))
    assert told(finish(engine.chat(TALK, GREEDY))[0])


def test_a_conversation_that_is_too_long_is_refused_before_it_is_read(engine, forwards):
    long = chat("one two three four " * 400)
    n = engine.count_tokens(long)
    answer = engine.chat(long, GREEDY)
    events, end = finish(answer)
    assert events == [end] and end.reason == "error" and isinstance(answer.error, UserError)
    assert f"{n:,} tokens" in end.text and f"{n - 1023:,} too many" in end.text and "1,024" in end.text
    assert forwards.sizes == []


@pytest.mark.parametrize("error", [RuntimeError("kernel\nfailed"), MemoryError(), MachineError("The disk is gone."),
                                   UserError("The file is damaged.")])
def test_after_an_error_the_engine_goes_on(engine, forwards, error):
    expected = told(finish(engine.chat(TALK, GREEDY))[0])

    def fail(*_) -> None:
        raise error

    def lose_a_layer() -> None:  # in the middle of the third forward: some layers have read the token, some have not
        runtime.near.there[3] = False
        patch.setattr(runtime.far, "verify", fail)

    runtime, patch = engine._turns.runtime, pytest.MonkeyPatch()
    forwards.on[len(forwards.sizes) + 3] = lose_a_layer
    answer = engine.chat(TALK, GREEDY)
    _, end = finish(answer)
    patch.undo()
    assert end.reason == "error" and answer.error is error
    assert "\n" not in end.text and end.text.endswith(".") and len(end.text) > 15
    assert engine.snapshot()["phase"] == "idle"
    forwards.on.clear()
    assert told(finish(engine.chat(TALK, GREEDY))[0]) == expected


def test_broken_values_are_an_error_not_a_token():
    with pytest.raises(MachineError, match="not numbers"):
        Sampler(GREEDY, None)(torch.tensor([0.0, float("nan")]), [1])


# The rest of the door

def test_configure_between_answers(engine, trained, forwards):
    expected = told(finish(engine.chat(TALK, GREEDY))[0])
    everything = trained.runtime.near_bytes
    engine.configure(replace(engine.options, near_bytes=trained.runtime.smallest_bytes() * 4, chunk=4, context=200))
    assert engine.snapshot()["near_bytes"] < everything and engine.snapshot()["context"] == 200
    forwards.sizes.clear()
    assert told(finish(engine.chat(LONG[:1] + chat("x"), GREEDY))[0]) is not None
    assert forwards.sizes[:2] == [4, 4]
    assert told(finish(engine.chat(TALK, GREEDY))[0]) == expected
    for wrong, match in ((dict(context=2000), "at most 1,024"), (dict(predict=False), "open it again"),
                         (dict(level="quality" if trained.runtime.level == "full" else "full"), "cannot run at level")):
        with pytest.raises(UserError, match=match):
            engine.configure(replace(engine.options, **wrong))
    assert engine.options.context == 200
    assert told(finish(engine.chat(TALK, GREEDY))[0]) == expected
    engine.configure(replace(engine.options, near_bytes=None))
    assert engine.snapshot()["near_bytes"] == everything


def test_the_snapshot_follows_the_answer(engine, forwards):
    phases = {}
    forwards.on[3] = lambda: phases.setdefault("prefill", engine.snapshot())
    assert engine.snapshot()["phase"] == "idle"
    _, end = finish(engine.chat(LONG, GREEDY))
    assert phases["prefill"]["phase"] == "prefill" and phases["prefill"]["context_used"] == 32
    done = engine.snapshot()
    assert done["phase"] == "idle" and done["n_tokens_total"] == end.n_tokens
    assert done["tokens_per_second"] == pytest.approx(end.tokens_per_second)
    assert done["rss_bytes"] > 0 and len(done["residency"]) == engine.info["layers"] == 6
    assert 0 < done["near_used_bytes"] <= done["near_bytes"] and done["far_total_bytes"] > 0
    assert done["answer"]["tokens"] == end.n_tokens and done["answer"]["needed_bytes"] == end.counters.needed_bytes
    assert done["answer"]["seconds"] > 0 and done["prompt"]["seconds"] > 0 and done["prompt"]["tokens"] > 32
    for row in done["activity"]:  # every token picks top_k experts of each layer
        assert len(row) == engine.info["experts"] and sum(row) == pytest.approx(engine.info["top_k"], abs=0.02)


def test_a_snapshot_while_near_memory_is_made_anew_shows_what_was(engine, trained, monkeypatch):
    runtime, make, seen = trained.runtime, trained.runtime._new_cache, []
    before = engine.snapshot()

    def making():
        kept, runtime.near = runtime.near, None
        seen.append(engine.snapshot())
        runtime.near = kept
        return make()
    monkeypatch.setattr(runtime, "_new_cache", making)
    engine.configure(replace(engine.options, near_bytes=before["near_bytes"] // 2))
    for key in ("near_bytes", "near_most_bytes", "near_least_bytes", "near_used_bytes"):
        assert seen[0][key] == before[key] > 0 or key == "near_used_bytes"
    assert engine.snapshot()["near_bytes"] < before["near_bytes"]
    engine.configure(replace(engine.options, near_bytes=None))


def test_closing_stops_what_runs_and_refuses_what_comes(trained):
    engine = Engine(trained, Options(chunk=16))
    forwards = Forwards(engine._turns.prefix)
    closer = threading.Thread(target=engine.close)
    forwards.on[2] = closer.start
    running, waiting = engine.chat(LONG, replace(GREEDY, max_tokens=900)), engine.chat(TALK, GREEDY)
    assert finish(running)[1].reason == "stopped" and finish(waiting)[1].reason == "stopped"
    closer.join(60)
    assert not closer.is_alive() and not engine._thread.is_alive()
    forwards.remove()
    with pytest.raises(UserError, match="closed"):
        engine.chat(TALK)
    engine.close()


# Sampling

def test_settings_come_from_the_user_then_the_model_then_neutral():
    model = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.9)
    assert merged(Sampling(top_p=0.5), model) == {"temperature": 0.6, "top_k": 20, "top_p": 0.5, "min_p": 0.0,
                                                  "repetition_penalty": 1.0}
    assert merged(Sampling(), None)["temperature"] == 0
    assert merged(Sampling(), GenerationConfig(do_sample=True))["temperature"] == 1
    assert merged(Sampling(), GenerationConfig(do_sample=False, temperature=0.6))["temperature"] == 0
    assert merged(Sampling(min_p=0.1), GenerationConfig())["temperature"] == 1


def test_a_recommendation_that_cannot_be_is_none(trained):
    odd = SimpleNamespace(do_sample=True, temperature="hot", top_k=-1, top_p=7, min_p=None, repetition_penalty=0.0)
    assert merged(Sampling(), odd) == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
                                       "repetition_penalty": 1.0}
    own = trained.tokenizer.eos_token_id
    for listed, expected in ((None, {own}), (7, {7, own}), ([7, 8], {7, 8, own}), ("x", {own}), (["x", 8], {8, own})):
        assert end_tokens(SimpleNamespace(eos_token_id=listed), trained.tokenizer) == expected
    lengths = [most_tokens(SimpleNamespace(max_new_tokens=length)) for length in (None, 7, 0, -1, "long")]
    assert lengths == [None, 7, None, None, None]


def test_draws_follow_transformers_own_processors():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    settings = Sampling(temperature=0.5, top_k=3, top_p=0.999, repetition_penalty=2.0, seed=3)
    sampler = Sampler(settings, None)
    penalised = torch.tensor([1.5, 2.0, 1.0, 0.0, -1.0])     # token 0 was there before: 3 / 2
    expected = (penalised / 0.5).masked_fill(torch.arange(5) > 2, -torch.inf).softmax(-1)
    draws = torch.bincount(torch.tensor([sampler(logits, [0]) for _ in range(4000)]), minlength=5) / 4000
    assert (draws - expected).abs().max() < 0.03


@pytest.mark.slow
def test_a_thousand_short_answers_leave_nothing_behind(engine):
    """Descriptors and threads are as many as after the first few; memory may grow by what the allocator keeps, a
    token's logits for each answer."""
    this, brief = psutil.Process(), replace(GREEDY, max_tokens=1)

    def ask(times: int) -> tuple[int, int, int]:
        for n in range(times):
            assert finish(engine.chat(chat(("Hi!", "How are you?")[n % 10 == 0]), brief))[1].n_tokens == 1
        gc.collect()
        return this.num_fds(), this.num_threads(), own_bytes()
    descriptors, threads, memory = ask(100)
    after = ask(900)
    assert after[0] <= descriptors and after[1] <= threads
    assert after[2] - memory < 900 * 4 * engine._turns.model.config.vocab_size
