"""How calibration sees a level, many tokens at once, is how decode computes it; traces miss as caches do."""
from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch

from engine.core import Options
from engine.experts.layer import LevelPlan
from engine.model import load
from engine.quality.loss_probe import LossProbe, Rise, highest_ratio, log_probabilities
from engine.quality.sparse_forward import DecodedExperts, LayerTrace, Simulation
from engine.quality.traces import SHARES, Trace, miss_curve, replay
from kernels.select import DOWN_ONLY
from tests.support.folders import compressed

L, E, K, N, HIDDEN = 3, 8, 2, 48, 64
BUDGETS = LevelPlan(((20, 30), (0, 25), (48, 0)))
THRESHOLDS = LevelPlan(thresholds=tuple(tuple(0.2 + 0.3 * e for e in range(E)) for _ in range(L)))
NOTHING = LevelPlan(thresholds=((1e9,) * E,) * L)


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "minimax_m3_vl_text"])
def loaded(request, tmp_path_factory) -> load.Loaded:
    """Plain experts; biased and interleaved ones; clamped ones."""
    changes = {"num_hidden_layers": L}
    if request.param == "gpt_oss":
        changes |= {"num_local_experts": E, "layer_types": ["full_attention"] * L}
    if request.param == "minimax_m3_vl_text":
        changes |= {"num_local_experts": E}
    folder = compressed(request.param, tmp_path_factory.mktemp(request.param), **changes)[2]
    return load.load(folder, Options("exact", device="cpu", predict=False))


@pytest.mark.parametrize("level, plan", [("balanced", BUDGETS), ("floe", THRESHOLDS), ("floe", NOTHING)])
@torch.no_grad()
def test_many_tokens_at_once_are_the_tokens_of_decode(loaded, level, plan):
    """The same outputs, and the bytes that decode asks for are those of the neurons that the observer saw kept."""
    runtime, layout = loaded.runtime, loaded.runtime.far.layout
    runtime.plans[level] = plan
    runtime.set_level(level)
    runtime.phase = "decode"
    draw, seen = torch.Generator().manual_seed(5), []
    ids = torch.stack([torch.randperm(runtime.far.experts, generator=draw)[:K] for _ in range(7)])
    weights, x = torch.rand(7, K, generator=draw), torch.randn(7, HIDDEN, generator=draw)
    for layer in runtime.layers:
        before = runtime.counters()
        alone = torch.cat([runtime.forward(layer, x[t:t + 1], ids[t:t + 1], weights[t:t + 1]) for t in range(7)])
        needed = (runtime.counters() - before).needed_bytes
        with runtime.hooked(Simulation(DecodedExperts(runtime), plan, seen.append)):
            together = runtime.forward(layer, x, ids, weights)
        assert together.shape == x.shape and (together - alone).abs().max() <= 1e-4 * alone.abs().max()
        fidelity = seen[-1].fidelity
        records = int((fidelity >= 0).sum()) * layout.record - int((fidelity == DOWN_ONLY).sum()) * (
            layout.record - layout.prefix)
        assert needed == 7 * K * layout.sketch_bytes + records
        assert (records == 0) == (plan is NOTHING)


@torch.no_grad()
def test_without_a_plan_it_is_exact_and_afterwards_it_is_gone(loaded):
    runtime = loaded.runtime
    runtime.set_level("exact")
    runtime.phase = "auto"
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(1))
    expected = loaded.model(ids).logits
    with pytest.raises(KeyboardInterrupt), runtime.hooked(Simulation(DecodedExperts(runtime))):
        # The experts' step takes activations of 16 bits.
        assert (loaded.model(ids).logits - expected).abs().max() < 1e-3 * expected.abs().max()
        raise KeyboardInterrupt
    assert "forward" not in vars(runtime) and torch.equal(loaded.model(ids).logits, expected)


@torch.no_grad()
def test_what_does_not_fit_is_decoded_again(loaded, monkeypatch):
    """With room for nothing the values are the same."""
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(1))
    with loaded.runtime.hooked(Simulation(DecodedExperts(loaded.runtime), BUDGETS)):
        expected = loaded.model(ids).logits
    monkeypatch.setattr(DecodedExperts, "LIMIT", 0)
    bare = DecodedExperts(loaded.runtime)
    with loaded.runtime.hooked(Simulation(bare, BUDGETS)):
        assert torch.equal(loaded.model(ids).logits, expected) and not bare._kept


# --- traces ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("slots", [3, 6, 11, L * E])
def test_a_replayed_trace_misses_what_the_cache_misses(loaded, slots):
    """Whole experts at `exact`: the second half of a decode run, by the runtime's own counters."""
    runtime, n_tokens = loaded.runtime, 40
    far, trace = runtime.far, Trace(runtime.far.experts)
    draw = torch.Generator().manual_seed(slots)
    picks = torch.stack([torch.stack([torch.randperm(far.experts, generator=draw)[:K] for _ in range(L)])
                         for _ in range(n_tokens)])
    bounce = 0 if slots == far.layers * far.experts else K
    runtime.set_level("exact", (slots + bounce) * far.expert_bytes)
    runtime.phase = "decode"
    for t in range(n_tokens):
        if t == n_tokens // 2:
            half = runtime.counters()
        for layer in runtime.layers:
            runtime.forward(layer, torch.ones(1, HIDDEN), picks[t, layer.index][None], torch.ones(1, K))
            trace.add(layer.index, picks[t, layer.index], torch.ones(K))
    used = runtime.counters() - half
    assert trace.tokens == n_tokens
    assert replay(trace, slots) == pytest.approx(used.far_bytes / used.needed_bytes)
    assert (used.far_bytes == 0) == (bounce == 0)


def test_a_curve_falls_from_everything_to_nothing():
    trace, draw = Trace(16), torch.Generator().manual_seed(0)
    for _ in range(60):
        for layer in range(2):
            trace.add(layer, torch.randperm(16, generator=draw)[:3], torch.tensor([2, 4, 4]))
    curve = miss_curve(trace)
    assert [slots for slots, _ in curve] == [round(share * 32) for share in SHARES]
    rates = [rate for _, rate in curve]
    assert rates[0] == 1 and rates[-1] == 0 and rates == sorted(rates, reverse=True) and len(set(rates)) > 4


def test_a_token_that_asks_for_nothing_misses_nothing():
    trace = Trace(4)
    for t in range(8):
        trace.add(0, torch.tensor([t % 4] if t % 2 else []), torch.tensor([5] if t % 2 else []))
    assert replay(trace, 4) == 0 and replay(trace, 1) == 1


# --- probe -----------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def test_a_rise_is_the_difference_of_losses_and_the_divergence(loaded):
    """Of whole documents, against plain sums over the full distributions (128 tokens: all are kept)."""
    draw, decoded = torch.Generator().manual_seed(3), DecodedExperts(loaded.runtime)
    texts = [[torch.randint(3, 128, (1, n), generator=draw) for n in sizes] for sizes in ((9, 5, 12), (7, 14))]

    def simulating(plan: LevelPlan | None) -> AbstractContextManager:
        return loaded.runtime.hooked(Simulation(decoded, plan))

    probe = LossProbe(loaded.model, simulating, texts)
    measured = probe.measure(BUDGETS)
    assert probe.measure(BUDGETS) is measured
    for documents, rise in zip(texts, measured, strict=True):
        assert rise.n_tokens == sum(ids.shape[1] - 1 for ids in documents)
        for i, ids in enumerate(documents):
            with simulating(None):
                exact = log_probabilities(loaded.model, ids)
            with simulating(BUDGETS):
                found = log_probabilities(loaded.model, ids)
            target = ids[0, 1:, None]
            assert float(rise.losses[i]) == pytest.approx(float((exact - found).gather(1, target).sum()), abs=1e-4)
            divergence = float((exact.exp() * (exact - found)).sum())
            assert divergence > 1e-3 and float(rise.divergences[i]) == pytest.approx(divergence, rel=1e-3)
    assert probe.ratios([BUDGETS]) == [max(0.1, rise.loss / rise.divergence) for rise in measured]
    highest = [max(0.1, highest_ratio([rise])) for rise in measured]
    worst = max(ratio * rise.divergence for ratio, rise in zip(highest, measured, strict=True))
    assert probe.worst(BUDGETS, [BUDGETS]) == worst
    assert all(found > rise.loss / rise.divergence for found, rise in zip(highest, measured, strict=True))


def test_the_upper_end_of_the_ratio_lies_above_the_true_one_9_times_of_10():
    """Two plans on documents of any length, each with a ratio of its own besides the chance of its tokens, which is the
    same for both plans; how many documents there are changes how far the end lies off, not how often it holds."""
    draw, true, off = torch.Generator().manual_seed(6), 0.4, {}
    for n_documents in (6, 60):
        held, found = 0, []
        for _ in range(2000):
            tokens = torch.randint(20, 400, (n_documents,), generator=draw).double()
            own, chance = torch.randn(2, n_documents, generator=draw, dtype=torch.float64)
            unit = tokens * (true + 0.2 * own) + 6 * tokens.sqrt() * chance
            rises = [Rise(share * unit, share * tokens, int(tokens.sum())) for share in (0.02, 0.05)]
            found.append(highest_ratio(rises))
            held += found[-1] >= true
        assert 0.88 <= held / 2000 <= 0.92, n_documents
        off[n_documents] = sum(found) / 2000 - true
    assert 3 * off[60] < off[6]


def test_what_an_observer_sees_is_one_layer_of_all_tokens(loaded):
    seen: list[LayerTrace] = []
    ids = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), loaded.runtime.hooked(Simulation(DecodedExperts(loaded.runtime), BUDGETS, seen.append)):
        loaded.model(ids)
    assert [one.layer for one in seen] == list(range(L))
    for one, (refined, down_only) in zip(seen, BUDGETS.budgets, strict=True):
        assert one.scores.shape == (6, K * N) and (one.scores >= 0).all()
        kept = one.fidelity >= 0
        assert (kept.sum(1) == refined + down_only).all() and ((one.fidelity == DOWN_ONLY).sum(1) == down_only).all()
        lowest = one.scores.masked_fill(~kept, torch.inf).amin(1)
        assert (one.scores.masked_fill(kept, -1).amax(1) <= lowest).all()
