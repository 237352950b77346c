"""Policies on made-up routers: what is neutral changes nothing, what is extreme does what it says."""
from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.core import UserError
from engine.policies import route
from engine.policies.build import guesses_of, rules_of
from engine.policies.choice import Choice, Named, parse
from engine.policies.fidelity import by_score, within_bits, without
from engine.policies.learned import TwoLayers, load_predictors, save_predictors, sparsemax
from engine.policies.predict import Guesses, NextRouter, Payoff, Popularity, Profile, Repeat
from engine.policies.residency import RULES, Admitted, Divided, Recency, stamps
from engine.policies.slots import Slots
from engine.policies.split import divide, recency_curve
from engine.policies.trace import RoutingTrace, RunNumbers, load_trace
from kernels.evict import age
from kernels.pool import PINNED, new_pool, take
from kernels.select import DOWN_ONLY, REFINED

T, E, K, L, N = 64, 12, 3, 2, 8
MADE = torch.Generator().manual_seed(0)
LOGITS = torch.randn(T, E, generator=MADE)
NEAR = torch.rand(T, E, generator=MADE) < 0.4
NEAR[:, :K] = True  # at least k of every layer


def router(renormalises: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = LOGITS.softmax(-1).topk(K)
    return ids, weights / weights.sum(1, keepdim=True) if renormalises else weights


@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("kind", sorted(route.KINDS))
def test_how_a_router_weighs_is_told_from_what_it_says(kind, renormalises):
    weights, ids = route.KINDS[kind](LOGITS).topk(K)
    weights = 2.5 * (weights / weights.sum(1, keepdim=True) if renormalises else weights)
    found = route.Weights(LOGITS, ids, weights)
    assert found.kind == kind and bool(found.sums_to) == renormalises
    assert torch.allclose(found.of(LOGITS, ids), weights, rtol=1e-4)
    with pytest.raises(UserError, match="without a route"):
        route.Weights(LOGITS, ids, torch.rand(T, K))


@pytest.mark.parametrize("renormalises", [True, False])
def test_neutral_numbers_change_nothing_to_the_bit(renormalises):
    ids, weights = router(renormalises)
    weigh = route.Weights(LOGITS, ids, weights)
    for name, numbers in (("near", (0.0, 1)), ("near", (1e-9, 1)), ("drop", (0.0,)), ("skip", (1.0,))):
        found = route.routed(name, numbers, LOGITS, ids, weights, NEAR, weigh)
        assert torch.equal(found[0], ids) and torch.equal(found[1], weights), name
    neurons = torch.arange(K * N, dtype=torch.int32).expand(T, -1)
    fidelity, near = torch.full_like(neurons, REFINED, dtype=torch.int8), torch.zeros(T, K * N, dtype=torch.bool)
    for found in (by_score(neurons, fidelity, weights, near, N, 1.0, 1.0),
                  within_bits(neurons, fidelity, weights, near, N, 5.0, (2.0, 5.0))):
        assert torch.equal(found[0], neurons) and torch.equal(found[1], fidelity)


def test_an_infinite_margin_never_takes_what_is_far():
    ids, weights = router()
    weigh = route.Weights(LOGITS, ids, weights)
    chosen, given = route.prefer_near(LOGITS, ids, weights, NEAR, weigh.of, float("inf"), kept=0)
    assert bool(NEAR.gather(1, chosen).all()) and torch.allclose(given.sum(1), torch.ones(T))
    best = LOGITS.masked_fill(~NEAR, -9e9).topk(K).indices
    assert torch.equal(chosen.sort(1).values, best.sort(1).values)
    kept, _ = route.prefer_near(LOGITS, ids, weights, NEAR, weigh.of, float("inf"), kept=1)
    assert bool((kept == ids[:, :1]).any(1).all())
    few = torch.zeros_like(NEAR)
    few[:, 5] = True
    chosen, given = route.routed("near-only", (), LOGITS, ids, weights, few, weigh)
    assert torch.equal((given != 0).sum(1), torch.ones(T, dtype=torch.int64)) and bool((given.sum(1) - 1 < 1e-5).all())
    assert bool((chosen[given != 0] == 5).all())


def test_what_is_dropped_is_light_or_missing_and_the_best_stays():
    ids, weights = router()
    dropped = route.drop_below(weights, 0.3, 1.0)
    assert torch.equal(dropped == 0, (weights < 0.3) & (weights != weights.amax(1, keepdim=True)))
    assert torch.allclose(dropped.sum(1), torch.ones(T))
    near = NEAR.gather(1, ids)
    skipped = route.skip_missing(weights, near, 0.5, 1.0)
    assert torch.equal(skipped == 0, ~near & (route.unimportance(weights) > 0.5)) and bool((skipped[:, 0] > 0).all())
    assert torch.allclose(route.unimportance(weights), weights.cumsum(1) - weights)  # best first


def test_less_fidelity_only_of_what_is_far():
    _, weights = router()
    neurons = torch.arange(K * N, dtype=torch.int32).expand(T, -1)
    fidelity, near = torch.full_like(neurons, REFINED, dtype=torch.int8), torch.rand(T, K * N, generator=MADE) < 0.5
    kept, found = by_score(neurons, fidelity, weights, near, N, 0.0, 0.6)
    before = route.unimportance(weights).repeat_interleave(N, 1)
    for t in range(T):
        left = kept[t][kept[t] >= 0].long()
        assert torch.equal(left, (near[t] | (before[t] <= 0.6)).nonzero()[:, 0])
        assert torch.equal(found[t, :len(left)] == DOWN_ONLY, (~near[t] & (before[t] > 0))[left])
    _, found = within_bits(neurons, fidelity, weights, near, N, 3.5, (2.0, 5.0))
    bits = torch.where(found == REFINED, 5.0, 2.0)
    assert bool(((bits * ~near).sum(1) <= 3.5 * (~near).sum(1)).all()) and bool((found[near] == REFINED).all())
    some = torch.zeros_like(near)
    some[:, ::2] = True
    assert torch.equal(without(neurons, fidelity, some)[0][:, :K * N // 2], neurons[:, 1::2])


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_programming_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    curves = [sorted(rng.integers(0, 30, 6).tolist(), reverse=True) for _ in range(3)]
    shares, misses = divide(curves, 7, least=1)
    every = [(sum(curve[s] for curve, s in zip(curves, split, strict=True)), split)
             for split in itertools.product(range(1, 6), repeat=3) if sum(split) <= 7]
    assert misses == min(every)[0] == sum(curve[s] for curve, s in zip(curves, shares, strict=True))
    assert sum(shares) <= 7 and min(shares) >= 1


def test_a_curve_from_one_pass_is_a_cache_of_every_size():
    rng = np.random.default_rng(0)
    tokens = [rng.choice(6, 2, replace=False).tolist() for _ in range(200)]
    for slots, misses in enumerate(recency_curve(tokens, 6)):
        near: list[int] = []
        missed = 0
        for thing in itertools.chain(*tokens):
            missed += thing not in near
            near = ([thing] + [other for other in near if other != thing])[:slots]
        assert missed == misses, slots


@pytest.mark.parametrize("parts", [False, True])
def test_slots_follow_the_tables_of_near_memory(parts):
    """The replayed pool and kernels/pool.py with kernels/evict.py: the same places after every step. parts: prefixes
    are wanted, as of records, and nothing is fetched ahead."""
    rng, pool, slots = np.random.default_rng(1), new_pool(20, 8), Slots(20, 8)
    for clock in range(60):
        wasted = int(age(pool, clock, 4)[1])
        assert wasted == slots.age(clock, 4)
        for turn in range(3):
            things, need = rng.choice(20, 3, replace=False).tolist(), int(rng.integers(1, 4)) if parts else 5
            if turn == 1 and not parts:
                _, have = take(pool, torch.tensor(things, dtype=torch.int32), torch.full((3,), 5, dtype=torch.int32),
                               clock + 1, ahead=True)
                slots.take_ahead(things, 5, clock + 1, 2**31)
            else:
                _, have = take(pool, torch.tensor(things, dtype=torch.int32), torch.full((3,), need, dtype=torch.int32),
                               clock + 1)
                assert int(have.sum()) == slots.take(things, [need] * 3, clock + 1)[0]
        assert pool.slot_of.tolist() == list(slots.slot_of) and pool.stamp.tolist() == slots.stamp.tolist()


@pytest.mark.parametrize("name", sorted(RULES))
def test_what_a_rule_puts_last_leaves_first(name):
    given = {"finemoe": {"expected": torch.rand(12, generator=MADE)}, "divided": {"shares": torch.tensor([2, 2])},
             "pinned": {"chosen": torch.arange(12) % 4 == 3}}
    rule = RULES[name](12, L, **given.get(name, {}))
    for things in ([0, 1, 6, 7], [0, 2, 6, 8], [0, 3, -1, 9], [0, 1, 6, -1]):
        rule.used(torch.tensor(things), torch.tensor([0.9, 0.1, 0.6, 0.4]))
    pool = new_pool(12, 8)
    take(pool, torch.tensor([0, 1, 2, 3, 6, 7, 8], dtype=torch.int32), torch.ones(7, dtype=torch.int32), 4)
    pool.stamp[0] = PINNED
    found = stamps(rule, pool.object_of, pool.stamp, 4)
    assert found[0] == PINNED and bool((found[1:7] < 4).all())
    order = rule.order(pool.object_of.clamp(min=0).long())
    lowest = int(order[1:7].argmin()) + 1
    pool.stamp.copy_(found)
    age(pool, 4, 2)
    assert int(pool.object_of[lowest]) == -1 and int(pool.object_of[0]) == 0


def test_admission_takes_three_uses_within_sixteen_tokens():
    rule = Admitted(Recency(8, 1))
    for clock in range(1, 41):
        rule.used(torch.tensor([3 if clock in (1, 3, 5) else -1, 4 if clock in (1, 20, 40) else -1,
                                6 if clock == 40 else -1]))
    order = rule.order(torch.tensor([3, 4, 6]))
    assert order[0] > order[2] >= order[1] and rule.claim.tolist()[:8] == [i == 3 for i in range(8)]
    rule.order(torch.tensor([4, 6]))
    assert not rule.claim[:8].any(), "a claim ends with the place"


def test_a_layer_beyond_its_share_gives_first():
    rule = Divided(12, 2, shares=torch.tensor([1, 5]))
    for thing in (6, 7, 0, 1):
        rule.used(torch.tensor([thing]))
    assert rule.order(torch.tensor([6, 7, 0, 1])).argsort().tolist() == [2, 0, 1, 3]


def test_a_layers_own_router_is_always_right():
    guesses, picks = Guesses(NextRouter(L, 0), L, E, K), LOGITS.topk(K).indices
    for t in range(T):
        guesses.begin(torch.zeros(4))
        for layer in range(L):
            guesses.at(layer, torch.zeros(1, E), LOGITS[t], torch.zeros(4))
        guesses.end(picks[t].expand(L, K), LOGITS[t].expand(L, E))
    assert guesses.recall() == [1.0] * L


@pytest.mark.parametrize("made", [Repeat, lambda layers, experts: Popularity(layers, experts, 0), Profile])
def test_what_has_no_weights_is_no_expert(made):
    """An identity, -1, is neither remembered nor guessed nor asked for; least of all as expert 0."""
    predictor, nothing = made(L, E), torch.zeros(L, E)
    guesses, picks = Guesses(predictor, L, E, K), torch.tensor([3, -1, -1]).expand(L, K)
    for _ in range(2):
        predictor.start()
        guesses.begin(torch.zeros(4))
        for layer in range(L):
            guesses.at(layer, nothing, nothing[0], torch.zeros(4))
        guesses.end(picks, nothing)
    predictor.start()
    scores = predictor.begin(torch.zeros(4))
    assert bool((scores[:, 3] > 0.9).all()) and bool((scores[:, [e for e in range(E) if e != 3]] < 0.1).all())
    assert guesses.asked.tolist() == [2.0] * L and guesses.recall(1)[0] >= 0.5


def test_fetching_ahead_that_does_not_pay_rests_and_is_tried_again():
    payoff = Payoff()
    said = [payoff.pays(10 * token, 9 * token if token < 100 else 900) for token in range(700)]
    assert said[:63] == [True] * 63 and not any(said[63:318]) and all(said[319:]) and payoff.rests == 1


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    scores = torch.randn(50, 7, generator=MADE)
    found = sparsemax(scores)
    assert torch.allclose(found.sum(1), torch.ones(50), atol=1e-5) and bool((found >= 0).all())
    others = torch.rand(200, 7, generator=MADE)
    others = others / others.sum(1, keepdim=True)
    nearest = (scores - found).norm(dim=1)
    assert bool((torch.cdist(scores, others) >= nearest[:, None] - 1e-6).all())


def test_what_was_trained_comes_back(tmp_path):
    from engine.policies.learned import SequenceNetwork
    made = {"learned": TwoLayers(L, E, 16), "sequence": SequenceNetwork(L, E, 16)}
    save_predictors(tmp_path / "p.safetensors", made, L, E, 16)
    found = load_predictors(tmp_path / "p.safetensors")
    embeddings = torch.randn(1, 9, 16, generator=MADE)
    whole = found["sequence"](embeddings)[0]
    found["sequence"].start()
    steps = torch.stack([found["sequence"].begin(row) for row in embeddings[0]])
    assert torch.allclose(whole, steps, atol=1e-4), "a token at a time says what a sequence at once does"
    assert torch.allclose(whole, made["sequence"](embeddings)[0], atol=0.05)
    x = torch.randn(1, L, 16, generator=MADE)
    assert torch.allclose(found["learned"](x)[0, 0], found["learned"].layer(0, x, x, x[0, 0])[1], atol=1e-5)
    (tmp_path / "p.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="train them again"):
        load_predictors(tmp_path / "p.safetensors")


@pytest.mark.parametrize("text, word", [
    ("evict=best", "choose one of"), ("place=near", "KIND=NAME"), ("route=near", "takes 2 numbers"),
    ("route=near:x", "a number"), ("admit=third:4", "takes 0 numbers"), ("lambda=abc", "KIND=NAME"),
    ("route=near:-1", "from 0 to inf"), ("route=near:nan", "from 0 to inf"), ("route=drop:1e999", "from 0 to 1"),
    ("predict=next:1e999", "a whole number from 0 to 3"), ("predict=profile:1.5", "a whole number"),
    ("predict=profile:0", "from 1"), ("predict=popularity:-3", "from 0"), ("fidelity=bits:nan", "from 0"),
    ("evict=lfu,evict=hobbit", "chosen twice"), ("evict=finemoe", "add predict=maps"),
    ("admit=third,miss=place", "add free=layer")])
def test_a_policy_that_there_is_not(text, word):
    with pytest.raises(UserError, match=word):
        parse(text)
    assert parse("") == Choice() and parse("").is_exact
    assert parse("route=near:0.1, predict=next").route == Named("near", (0.1, 1))
    assert not parse("fidelity=score:0.6:0.9").is_exact
    assert parse("route=near:inf:99").route == Named("near", (float("inf"), 99))


@pytest.mark.parametrize("name", ["pinned", "divided"])
def test_a_rule_without_what_it_was_to_learn_says_so(name):
    with pytest.raises(UserError, match="--train"):
        rules_of(parse(f"evict={name}"), [(12, "cpu")], L, None)


def test_a_map_that_expects_an_expert_keeps_it():
    """FineMoE's rule reads what the maps said of the token under way; records go by their expert."""
    guesses = guesses_of(parse("predict=maps"), L, E, K, 4)
    rules = rules_of(parse("predict=maps,evict=finemoe"), [(L * E, "cpu"), (L * E * N, "cpu")], L, guesses)
    guesses.predictor.embeddings[0], guesses.predictor.n = torch.tensor([1.0, 0, 0, 0]), 1
    guesses.predictor.maps[0, :, 7] = 0.9
    guesses.begin(torch.tensor([1.0, 0, 0, 0]))
    assert rules[0].order(torch.arange(E)).argmax() == 7
    assert rules[1].order(torch.arange(E * N)).topk(N).indices.sort().values.tolist() == [*range(7 * N, 8 * N)]


def test_a_trace_comes_back_from_its_file(tmp_path):
    run = RunNumbers("m", "exact", L, E, K, N, 100, 40, 12, 6, 64, (0,) * L, {"spec": {}})
    made = RoutingTrace(run, np.arange(5, dtype=np.int32), np.array([0, 0, 1, 1, 2], np.int32), np.ones(5, bool),
                        np.zeros((5, 4), np.float16), np.zeros((5, L, E), np.float32),
                        np.zeros((5, L, 1, E), np.float32), np.zeros((5, L, K), np.uint8),
                        np.ones((5, L, K), np.float32), *(np.zeros((5, L, 0), np.uint8),) * 2,
                        np.zeros((5, L, 0), np.float16))
    made.save(tmp_path / "t.npz")
    found = load_trace(tmp_path / "t.npz")
    assert found.run == run and found.token.tolist() == made.token.tolist() and found.experts.dtype == np.uint8
    assert found.of_answers(0.5, 1).token.tolist() == [4]
    with np.load(tmp_path / "t.npz", allow_pickle=False) as stored:
        assert int(stored["version"]) == 1, "NumPy alone reads it"
    with pytest.raises(ValueError, match="does not exist"):
        replace(made, experts=np.full((5, L, K), E, np.uint8))
    (tmp_path / "t.npz").write_bytes((tmp_path / "t.npz").read_bytes()[:300])
    with pytest.raises(UserError, match="record it again"):
        load_trace(tmp_path / "t.npz")
    with pytest.raises(UserError, match="cannot be read"):
        load_trace(tmp_path / "none.npz")
