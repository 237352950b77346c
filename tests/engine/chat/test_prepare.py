"""Opening on a card prepares the first answer: with make_fx in CUDA's place, what was compiled and recorded is used."""
from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from engine.chat import turn
from engine.chat.engine import Engine
from engine.core import Counters, MachineError, Options
from engine.decode.cuda_graph import Graphs
from engine.decode.decoder import COMPILING, RECORDING, Decoder, decoder_for
from engine.model import load
from engine.model.placement import experts_on_gpu
from tests.engine.chat.test_engine import GREEDY, LONG, TALK, finish, told
from tests.engine.experts.test_far_locked import Ledger
from tests.support.recorded import Recording

OPTIONS = Options("exact", device="cpu", chunk=16, context=400)


class Card(Recording):
    """What opening finds in place of a card: a driver's memory, captures, and what is said meanwhile."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.ledger, self.said, self.on, self.sizes = Ledger(), [], {}, []
        self._load = load.load
        monkeypatch.setattr(load, "load", self.load)
        monkeypatch.setattr(turn, "decoder_for", self.decoder)

    def load(self, folder, options: Options, report: load.Report) -> load.Loaded:
        """The real opening, then the experts for the device, with room for half of them."""
        loaded = self._load(folder, options, report)
        far, level = loaded.runtime.far, options.level
        near_bytes = far.layers * far.experts * far.expert_bytes // 2
        loaded.runtime = experts_on_gpu(loaded.model, far, folder, level, loaded.planner,
                                        replace(options, near_bytes=near_bytes), report, self.ledger, "cpu")
        loaded.model.register_forward_pre_hook(
            lambda model, args, named: self.sizes.append(named["input_ids"].shape[1]), with_kwargs=True)
        self.near_used = loaded.runtime.near_used_bytes()
        return loaded

    def decoder(self, *given) -> Decoder:
        decoder = decoder_for(*given)
        if decoder.on_device:
            decoder.graphs = Graphs(decoder.step, self)
        return decoder

    def report(self, text: str, share: float) -> None:
        self.said.append((text, share))
        if action := self.on.get(text):
            action()


@pytest.fixture
def card(monkeypatch) -> Card:
    return Card(monkeypatch)


def untouched(engine: Engine, card: Card) -> bool:
    runtime, prefix = engine._turns.runtime, engine._turns.prefix
    assert runtime.counters() == Counters() and not any(map(any, runtime.activity()))
    assert runtime.near_used_bytes() == card.near_used and runtime.prefill_far_bytes == 0 and runtime.headroom
    assert prefix.ids == [] and int(prefix.cache.clock.pos) == 0 and not bool(prefix.cache.clock.done)
    return engine.snapshot()["counters"]["needed_bytes"] == engine.snapshot()["n_tokens_total"] == 0


@pytest.mark.parametrize("level", ["exact", "fast"])
def test_the_first_answer_finds_its_graphs(demo_checkpoint, card, level):
    options = replace(OPTIONS, level=level)
    with Engine(card._load(demo_checkpoint, options), options) as host:
        expected = told(finish(host.chat(TALK, GREEDY))[0])
    with Engine.open(demo_checkpoint, options, card.report) as engine:
        assert untouched(engine, card) and engine.snapshot()["note"] == ""
        names, shares = zip(*card.said, strict=True)
        assert card.n_graphs == names.count(RECORDING) > 0 and names.count(COMPILING) == 2
        preparing = shares[names.index(COMPILING):]
        assert min(shares[-1], *preparing) == preparing[0] == load.LOADED == max(shares[:-len(preparing)])
        assert list(preparing) == sorted({*preparing}) and card.said[-1] == ("Ready.", 1.0)
        assert max(card.sizes) > 4  # a piece of a prompt, which other kernels compute than a step
        made = card.n_graphs
        assert told(finish(engine.chat(TALK, GREEDY))[0]) == expected
        engine._turns.runtime.link_bytes_per_second = 1.0  # from now on nothing is fetched ahead
        finish(engine.chat(LONG, GREEDY))
        assert card.n_graphs == made and card.n_replays > 2 * 2 * made
        assert level != "exact" or not engine._turns.runtime.looks_ahead


@pytest.mark.parametrize("where", [COMPILING, RECORDING])
def test_opening_can_be_stopped_while_it_prepares(demo_checkpoint, card, where):
    def stop() -> None:
        raise KeyboardInterrupt
    card.on[where], before = stop, set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        Engine.open(demo_checkpoint, OPTIONS, card.report)
    assert card.said[-1][0] == where and card.n_graphs == 0
    assert not card.ledger.registered and not {t for t in set(threading.enumerate()) - before if t.name == "model"}


def test_a_model_whose_step_cannot_be_recorded_opens_and_says_so(demo_checkpoint, card):
    def breaks(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")
    card.record = breaks
    with Engine.open(demo_checkpoint, OPTIONS, card.report) as engine:
        assert untouched(engine, card)
        assert "cannot be captured (operation not permitted" in engine.snapshot()["note"]
        assert finish(engine.chat(TALK, GREEDY))[1].reason in ("stop", "length")


def test_a_card_that_is_full_while_it_prepares_is_said(demo_checkpoint, card):
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.10 GiB.")
    card.record = full
    with pytest.raises(MachineError, match="ran out of memory"):
        Engine.open(demo_checkpoint, OPTIONS, card.report)
    assert not card.ledger.registered
