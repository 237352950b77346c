"""Part of what a card lacks, computed by the processor where it lies: the same numbers whatever part that is, by a rule
that is as good as trying everything."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.core import Options, UserError
from engine.experts import policy_hook
from engine.experts.policy_hook import PolicyHook, choose_policies
from engine.model import load
from engine.policies.choice import parse, refusal
from engine.policies.split import Rates, host_takes
from engine.quality.simulate import _Run
from kernels.activation import Gate
from tests.engine.experts.on_device import take_over
from tests.engine.experts.test_host import PLANS, E, L
from tests.support.folders import compressed

N_TOKENS = 24


@pytest.mark.parametrize("rates", [Rates(4e9, 1e9), Rates(1e9, 4e9), Rates(3e9, 3e9, 1e-3), Rates(1e9, 1e12, 1.0)])
def test_the_share_is_as_good_as_trying_every_one(rates):
    each = 2_000_000
    for missing in range(9):
        tried = [max((missing - n) * each / rates.link, n * each / rates.host + (rates.asking if n else 0))
                 for n in range(missing + 1)]
        found = host_takes(missing, each, rates)
        assert tried[found] == min(tried) and found == tried.index(min(tried))
    assert host_takes(8, each, Rates(1, 1e9)) == 8 and host_takes(8, each, Rates(1e9, 1)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compressed("qwen3_moe", tmp_path_factory.mktemp("beside"), num_hidden_layers=L)[2]


def written(folder, monkeypatch, near: float, rates: Rates, level: str, text: str = "miss=beside"):
    """Logits of tokens, one a step, on the device's side with near memory for a share of the experts -> them, and what
    was counted."""
    loaded = load.load(folder, Options("exact", device="cpu"))
    loaded.runtime.plans.update(PLANS)
    runtime = take_over(loaded)
    runtime.set_level(level)
    runtime.set_level(level, max(runtime.smallest_bytes(), int(near * runtime.everything_bytes())))
    monkeypatch.setattr(policy_hook, "measured", lambda runtime, beside: rates)
    choose_policies(runtime, loaded.model, text)
    runtime.phase, state, logits = "decode", None, []
    for token in range(5, 5 + N_TOKENS):
        out = loaded.model(torch.tensor([[token]]), past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits[0, -1])
    return torch.stack(logits), runtime.counters()


@pytest.fixture
def opened(folder, monkeypatch):
    """-> the device's side at a level with such policies, near memory for 40 % of the experts, and its model; the
    processor is the quicker by far."""
    def opened(level: str, text: str, tokens: int = 1):
        loaded = load.load(folder, Options("exact", device="cpu"))
        loaded.runtime.plans.update(PLANS)
        runtime = take_over(loaded, tokens=tokens)
        runtime.set_level(level)
        runtime.set_level(level, max(runtime.smallest_bytes(), int(0.4 * runtime.everything_bytes())))
        monkeypatch.setattr(policy_hook, "measured", lambda runtime, beside: Rates(1e-9, 1e9))
        choose_policies(runtime, loaded.model, text)
        runtime.phase = "decode"
        return runtime, loaded.model
    return opened


def filled(runtime, records: bool) -> torch.Tensor:
    """A pool full of the first objects of the last layer, all used long ago -> its number of free slots."""
    pool = runtime.near.pools()[records][0]
    n = len(pool.object_of)
    assert 2 < n <= len(pool.slot_of) // L
    runtime.bring(L - 1, torch.arange(n, dtype=torch.int32), records=records)
    runtime.clock.add_(9)
    assert int(pool.n_free) == 0
    return pool.n_free


def test_a_step_that_wants_a_thing_twice_makes_room_for_it_once(opened):
    runtime, _ = opened("exact", "free=layer", tokens=3)
    n_free = filled(runtime, records=False)
    runtime.hook.demanded(0, torch.tensor([[0, 1], [1, 0], [-1, 1]]))
    assert int(n_free) == 2


@pytest.mark.parametrize("text, is_freed", [("free=layer", True), ("free=layer,miss=beside", False)])
@torch.no_grad()
def test_no_room_is_made_for_neurons_that_the_processor_computes(opened, text, is_freed):
    runtime, model = opened("fast", text)
    n_free = filled(runtime, records=True)
    before = runtime.near.pools()[1][0].slot_of.clone()
    model(torch.tensor([[5]]))
    assert runtime.counters().needed_bytes > 0 and int(n_free) == 0
    assert torch.equal(runtime.near.pools()[1][0].slot_of, before) != is_freed


@pytest.mark.parametrize("level", ["exact", "fast"])
@torch.no_grad()
def test_behind_an_answers_end_nothing_is_counted(opened, level):
    runtime, model = opened(level, "miss=beside")
    runtime.done.fill_(True)
    model(torch.tensor([[5]]))
    assert not any(runtime.counts.tolist())


@pytest.mark.parametrize("level", ["exact", *PLANS])
@torch.no_grad()
def test_what_is_written_depends_neither_on_the_share_nor_on_what_is_near(folder, monkeypatch, level):
    """Of experts, and of the neurons that a sparse level keeps, whose sketches always come over the link."""
    alone, slow, even = Rates(1e9, 1e-9), Rates(1e-9, 1e9), Rates(1e9, 1e9)
    expected, everything = written(folder, monkeypatch, 1.0, alone, level)
    counted = {}
    for near, rates in ((0.4, alone), (0.4, even), (0.4, slow), (0.1, even)):
        found, counted[near, rates] = written(folder, monkeypatch, near, rates, level)
        assert torch.equal(found, expected), (near, rates)
    assert all(counts.needed_bytes == everything.needed_bytes for counts in counted.values())
    far = [counted[0.4, rates].far_bytes for rates in (alone, even, slow)]
    assert far[0] > far[1] > far[2], "the more the processor takes, the less crosses the link"
    assert level != "exact" or far[2] == 0
    plain, _ = written(folder, monkeypatch, 0.4, alone, level, "")
    share = 1e-2 if level == "exact" else 5e-2     # rounding may choose another neuron
    torch.testing.assert_close(plain, expected, rtol=share, atol=share * float(plain.abs().max()))


@torch.no_grad()
def test_rates_are_measured_and_told_and_a_step_is_not_recorded(folder):
    loaded = load.load(folder, Options("exact", device="cpu"))
    runtime = take_over(loaded)
    assert not runtime.asks_the_host
    choose_policies(runtime, loaded.model, "miss=beside")
    rates = runtime.hook.rates
    assert rates.link > 0 and rates.host > 0 and rates.asking > 0 and runtime.asks_the_host
    assert "a second" in runtime.hook.note and "missing ones it takes" in runtime.hook.note
    assert runtime.residency() == [0.0] * L and len(runtime.layers) == L and runtime.far.experts == E
    assert "experts come" in runtime.hook.note
    runtime.plans.update(PLANS)
    runtime.set_level("fast", runtime.smallest_bytes())
    assert runtime.hook.note == "", "measured anew before the first step of a level of another kind"
    runtime.phase = "decode"
    loaded.model(torch.tensor([[5]]))
    assert "neurons come" in runtime.hook.note and runtime.hook.rates != rates and runtime.counters().needed_bytes > 0


def test_where_it_cannot_be_it_says_why(folder):
    choice = parse("miss=beside")
    assert "miss=place" in refusal(choice, "exact", "cpu") and refusal(choice, "exact", "cuda") == ""
    assert refusal(choice, "fast", "cuda") == "" and "has to be exact" in refusal(parse(
        "free=layer,miss=place"), "fast", "cpu")
    loaded = load.load(folder, Options("exact", device="cpu"))
    runtime = take_over(loaded)
    runtime.layers[0].gate = replace(runtime.layers[0].gate, kind="gelu") if runtime.layers else Gate("gelu")
    with pytest.raises(UserError, match="round alike"):
        PolicyHook(runtime, loaded.model, choice)
    with pytest.raises(UserError, match="replay another miss"):
        _Run(type("Of", (), {"run": None, "trace": None}), choice, {})
