"""The page of evidence from replays and figures that are there, without the minutes that measuring takes."""
from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from engine.core import Counters, UserError
from engine.policies.choice import parse
from engine.policies.learned import fit
from engine.policies.presets import Cost
from engine.policies.trace import RoutingTrace, RunNumbers
from engine.quality.evidence.beforehand import Made, Shared
from engine.quality.evidence.first_tokens import START, restored, warm_up, while_typing
from engine.quality.evidence.live import Live
from engine.quality.evidence.replayed import coverage, lossless_rows, on_demand
from engine.quality.evidence.report import Found, Judged, bars, costs, gap_closed, page, scatter
from engine.quality.evidence.tested import TESTED
from engine.quality.simulate import Simulator, _last_wanted, baselines, optimum, recalls, sizes_of, taught
from engine.quality.specialists.make import Losses

L, E, K, H, N = 3, 8, 2, 16, 4


def made(seed: int, answers: int = 5, prompt: int = 3, steps: int = 16) -> RoutingTrace:
    """Routers that like some experts more and repeat themselves; the next one is nearly guessed."""
    rng, n = np.random.default_rng(seed), answers * (prompt + steps)
    logits = rng.normal(size=(n, L, E)).astype(np.float32) + 2 * np.eye(E, dtype=np.float32)[rng.integers(0, 3, (n, L))]
    ahead = np.zeros((n, L, 3, E), np.float32)
    for step in (1, 2):
        ahead[:, :-step, step - 1] = logits[:, step:] + rng.normal(size=(n, L - step, E)) * 0.3 * step
    experts = np.argsort(-logits, axis=2)[:, :, :K]
    share = np.exp(np.take_along_axis(logits, experts, 2))
    decode = np.tile(np.arange(prompt + steps) >= prompt, answers)
    run = RunNumbers("made", "exact", L, E, K, N, 1000, 400, 100, 50, 64, (0,) * L, {})
    answer = np.repeat(np.arange(answers, dtype=np.int32), prompt + steps)
    return RoutingTrace(run, np.arange(n, dtype=np.int32), answer, decode, rng.normal(size=(n, H)).astype(np.float16),
                        logits, ahead, experts.astype(np.uint8),
                        (share / share.sum(2, keepdims=True)).astype(np.float32), *(np.zeros((n, L, 0), np.uint8),) * 2,
                        rng.normal(size=(n, L, H)).astype(np.float16))


@pytest.fixture(scope="module")
def traces() -> tuple[RoutingTrace, RoutingTrace]:
    return made(0), made(1)


@pytest.fixture(scope="module")
def learned(traces):
    return fit(traces[0], 1)


@pytest.fixture(scope="module")
def rows(traces, learned):
    return lossless_rows(*traces, 10_000, learned)


def test_no_rule_passes_the_optimum_and_all_see_the_same_picks(rows, traces):
    best = next(row for row in rows if row.name == "Belady's optimum")
    for row in rows:
        left = row.counters.needed_bytes - row.counters.hit_bytes - row.counters.far_bytes
        assert row.counters.needed_bytes == 5 * 16 * L * K * 1000 and (left > 0) == ("miss=place" in row.name)
        if left:  # computed where it lies, which the optimum is not allowed
            continue
        assert row.crossed_per_token >= best.far_per_token > 0, row.name
    assert gap_closed(rows, best) == 1 and gap_closed(rows, rows[0]) == 0
    for n_slots in (2, 5, 9):
        size = (n_slots + K) * 1000
        assert optimum(traces[1], size).far_per_token <= on_demand(traces[1], size, False).far_per_token


@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_hits_as_often_as_trying_everything(seed):
    """Nine uses of five things in two slots; a miss may pass through."""
    uses = np.random.default_rng(seed).integers(0, 5, 9)
    best = {frozenset(): 0}      # what is near -> hits, over every choice so far
    for use in uses.tolist():
        after: dict[frozenset, int] = {}
        for near, hits in best.items():
            kept = [near] if use in near or len(near) == 2 else []
            kept += [near - {gone} | {use} for gone in near] if use not in near and len(near) == 2 else []
            for each in kept or [near | {use}]:
                after[each] = max(after.get(each, 0), hits + (use in near))
        best = after
    assert _last_wanted(uses, np.full(9, 7), 2)[0] == 7 * max(best.values())


def test_a_prefix_that_is_near_hits_as_much_as_it_has():
    """The second use wants more than the first brought, the third less; the other thing passes through."""
    uses, needs = np.array([1, 1, 2, 1]), np.array([10, 30, 30, 10])
    assert _last_wanted(uses, needs, 1) == (10 + 10, 30)


def test_popularity_is_another_traces_or_says_that_it_is_hindsight(traces, rows):
    """The row of the page pins what the answers it learned from took; without those it says so."""
    simulator = Simulator(traces[1], 10_000)
    own, own_train = baselines(simulator, None)[2], baselines(simulator, traces[1])[2]
    assert own.name == "popularity (pinned, in hindsight)" and rows[2].name == "popularity (pinned)"
    assert own.counters == own_train.counters != rows[2].counters
    assert rows[2].counters == simulator.run_choice(parse("predict=none,evict=pinned"),
                                                    **taught("pinned", traces[0], simulator)).counters


def test_where_everything_fits_each_expert_is_fetched_once(traces):
    size = (L * E + K) * 1000
    taken = len(np.unique(traces[1].experts[traces[1].steps] + E * np.arange(L)[:, None]))
    for row in (optimum(traces[1], size), on_demand(traces[1], size, False), on_demand(traces[1], size, True)):
        assert row.counters.far_bytes == taken * 1000 and row.passed_bytes == 0


def test_recall_grows_with_the_guesses_and_the_control_is_perfect(traces, learned):
    found = recalls(traces[1], ("popularity", "repeat", "next:0", "next:1", "sequence"), learned)
    assert found["next:0"] == [1.0] * 3 and found["next:1"][0] > found["popularity"][0]
    for row in found.values():
        assert 0 < row[0] <= row[1] <= row[2] <= 1


def test_coverage_and_warm_up_are_shares(traces, learned):
    assert all(0 < share < 1 for share in coverage(*traces, 0.5)) and coverage(*traces, 1.0) == (1.0, 1.0)
    found = warm_up(traces[1], 10_000, learned)
    assert found["taken by the prompt"] < found["cold"] and all(0 < share < 1 for share in found.values())


def test_the_page_holds_every_row_and_every_system(rows):
    live = [Live(name, "exact", 10, 5.0 + at, 0.01, Counters(100, 60, 40 - at), 0.1) for at, name in enumerate(
        ("exact", "route=near:0.2:1"))]
    found = Found("made", "the command", (144, 144), {0.25: rows, 0.5: rows}, {0.25: live, 0.5: live},
                  [Judged("something", "less", False)], [Made("merge by reap", 4, 8, Losses(2.0, 3.5, 4.0, 5.25))],
                  Shared((0.5, 0.95)))
    text = page(found, ["gap.svg", "cost.svg"])
    assert all(f"| {row.name} |" in text for row in rows) and "does **not** hold" in text
    for system in ("FloE", "SiDA-MoE", "eMoE", "HOBBIT", "FineMoE", "MoLE"):
        assert f"\n| {system} |" in text
    assert "| merge by reap | 4 of 8 | 3.500 | 2.000 | 5.250 | 4.000 |" in text
    assert "| a common expert and small residuals | refused, of a layer's experts 50% to 95%" in text
    told = costs(found)["presets"]
    cost = {"perplexity": 0.2, "kl": 0.01, "moved": 0.975}
    assert told == {"prefer_cached": [{"near_share": share} | cost for share in (0.25, 0.5)]}
    assert Cost(**told["prefer_cached"][0]).kl == 0.01
    for drawn in (bars(found.replayed, [row.name for row in rows]), scatter(found.live)):
        assert ElementTree.fromstring(drawn).tag.endswith("svg") and "NaN" not in drawn


def test_every_test_that_the_page_names_is_there(repository):
    for line in TESTED:
        file, name = line.test.split("::")
        assert f"\ndef {name}(" in (repository / "tests" / file).read_text(encoding="utf-8"), line.claim


def test_too_little_near_memory_is_one_sentence(traces):
    with pytest.raises(UserError, match="give at least 2,000"):
        Simulator(traces[1], sizes_of(traces[1].run).least_bytes - 1)


def test_a_restored_working_set_is_what_the_conversation_took():
    """Two conversations that share no expert, room for one of them: all of the first token misses, or nothing does."""
    trace, n = made(2, answers=2, prompt=0, steps=4 * START), 4 * START
    one = np.arange(2 * n)[:, None, None] < n
    trace = replace(trace, experts=np.broadcast_to(np.where(one, [0, 1], [2, 3]), (2 * n, L, K)).astype(np.uint8))
    near_bytes = next(size for size in range(2000, 20_000, 1000) if sizes_of(trace.run).divided(size).slots == L * K)
    assert restored(trace, near_bytes) == {"as it was left": 1 / START, "restored": 0}
    assert set(restored(trace, sizes_of(trace.run).least_bytes).values()) == {1.0}  # no slot at all


def test_habits_know_what_similar_questions_took_and_the_others_do_not(learned):
    """Two kinds of questions in turns, whose answers share no expert with each other nor with their questions; room
    for one of them. Only who has seen both kinds answered knows what comes."""
    one, other = (made(seed, answers=6, prompt=2, steps=START) for seed in (3, 4))
    kind = np.repeat(np.arange(6) % 2, 2 + START)
    taken = np.where(one.decode, 2 * kind, 4 + 2 * kind)[:, None, None]
    change = {"experts": np.broadcast_to(taken + np.arange(K), (len(kind), L, K)).astype(np.uint8),
              "embedding": np.eye(H, dtype=np.float16)[kind]}
    train, test = (replace(trace, **change) for trace in (one, other))
    near_bytes = next(size for size in range(2000, 20_000, 1000) if sizes_of(train.run).divided(size).slots == L * K)
    found = while_typing(train, test, near_bytes, learned)
    assert found["what similar ones took"] == 0
    assert found["as it was left"] == found["what the draft takes"] == 1 / START
    assert all(0 < share <= 1 for name, share in found.items() if name != "what similar ones took")
