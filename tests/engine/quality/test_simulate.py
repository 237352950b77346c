"""A replayed trace against the engine in which it was recorded: the same bytes and hits, whatever the policies."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from engine.core import Options
from engine.experts.policy_hook import PolicyHook
from engine.experts.working_set import pin
from engine.model import load
from engine.policies.choice import parse
from engine.policies.trace import RoutingTrace
from engine.quality.evidence.replayed import RECORDS, record_rows
from engine.quality.recorder import Recorder, record
from engine.quality.simulate import Simulator

QUESTIONS = "Hello, who are you?\nTell me a story about a dog.\nName 3 colours.\n"
N_TOKENS = 36
SHARES = torch.tensor([1, 2, 3, 4, 5, 6])  # slots of each layer, for `divided`


@pytest.fixture(scope="module")
def demo(repository):
    loaded = load.load(repository / "assets" / "demo", Options("exact", device="cpu"))
    yield loaded
    loaded.runtime.close()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "questions.txt"
    path.write_text(QUESTIONS)
    return path


def run(demo, prompts: Path, near: float, choice: str | None, predict: bool = True, horizon: int = 1,
        ) -> tuple[RoutingTrace, int, PolicyHook | None]:
    """A few answers of the demo -> their trace, the near memory (a share of everything), the hook."""
    runtime, given = demo.runtime, parse(choice) if choice is not None else None
    everything = runtime.far.layers * runtime.far.experts * runtime.far.expert_bytes
    runtime.predict = predict
    runtime.set_level(runtime.level, int(near * everything))
    runtime.counts.zero_()
    hook = None if given is None else PolicyHook(runtime, demo.model, given, shares=SHARES)
    recorder = Recorder(demo, horizon, True, hook)
    try:
        record(demo, prompts, recorder, N_TOKENS, 16)
    finally:
        if hook is not None:
            hook.close()
    return recorder.trace("demo"), int(near * everything), hook


CASES = [("exact", 0.25, None), ("exact", 0.1, None), ("balanced", 0.25, None), ("balanced", 0.5, None),
         ("exact", 0.25, "predict=repeat,evict=lfu,admit=third"), ("exact", 0.5, "predict=popularity,evict=hobbit"),
         ("exact", 0.25, "predict=maps,evict=finemoe,free=layer"), ("exact", 0.25, "predict=next:2,evict=popularity"),
         ("exact", 0.1, "free=layer,admit=third,miss=place"),
         ("exact", 0.25, "predict=none,free=layer,evict=lfu,admit=third,miss=place,route=skip:0.5"),
         ("exact", 0.25, "free=layer"), ("exact", 0.25, "free=layer,evict=popularity,predict=none"),
         ("exact", 0.25, "predict=profile,evict=divided,route=near:0.1:1"), ("exact", 0.25, "route=skip:0.5"),
         ("balanced", 0.25, "predict=none,evict=lfu,fidelity=score:0.4:0.6"), ("balanced", 0.25, "fidelity=bits:2.6"),
         ("balanced", 0.25, "route=drop:0.4,admit=third"), ("balanced", 0.5, "predict=none,free=layer"),
         ("balanced", 0.25, "free=layer,evict=popularity")]


@pytest.fixture(scope="module")
def plain(demo, prompts) -> dict[str, RoutingTrace]:
    """What each level's routers say without any policy, near memory for everything."""
    found = {}
    for demo.runtime.level in ("exact", "balanced"):
        found[demo.runtime.level] = run(demo, prompts, 1.0, None, predict=False)[0]
    return found


@pytest.mark.parametrize("level, near, choice", CASES)
def test_a_replay_counts_what_the_engine_counted(demo, prompts, plain, level, near, choice):
    """Needed, hit, far, speculative and wasted bytes, each to the byte, whatever the policies; and with every exact
    choice each router says the same to the bit."""
    demo.runtime.level = level
    trace, near_bytes, hook = run(demo, prompts, near, choice, horizon=2)
    found = Simulator(trace, near_bytes).run_choice(parse(choice or ""), shares=SHARES)
    counted = demo.runtime.counters()
    assert found.tokens == N_TOKENS == trace.decode.sum() and counted.far_bytes > 0
    assert [*vars(found.counters).values()][:5] == [*vars(counted).values()][:5]
    if parse(choice or "").is_exact:
        assert np.array_equal(trace.token, plain[level].token) and np.array_equal(trace.logits, plain[level].logits)
    if hook is not None:
        assert found.counters.dropped_weight == pytest.approx(float(hook.dropped))
        assert found.changed == int(hook.changed)


def test_no_rule_for_records_passes_the_optimum(demo, plain):
    far, trace = demo.runtime.far, plain["balanced"]
    *rows, best = record_rows(trace, far.layers * far.experts * far.expert_bytes // 2)
    assert [row.name for row in rows] == list(RECORDS) and best.counters.far_bytes > 0
    assert all(row.counters.needed_bytes == best.counters.needed_bytes for row in rows)
    # fewest misses are promised; that they are the fewest bytes, where misses are of unlike size, is of this trace
    assert all(row.counters.far_bytes >= best.counters.far_bytes for row in rows)


@pytest.mark.parametrize("level, choice", [("exact", "route=near:0:1"), ("balanced", "fidelity=score:1:1,route=skip:1"),
                                           ("balanced", "fidelity=bits:9,route=drop:0")])
def test_neutral_numbers_change_no_output(demo, prompts, plain, level, choice):
    demo.runtime.level = level
    trace, _, hook = run(demo, prompts, 0.25, choice)
    assert np.array_equal(trace.logits, plain[level].logits) and float(hook.dropped) == 0


def test_cached_only_moves_no_byte_in_decode(demo):
    """From a working set that was brought before; the router's own choice is then often another."""
    runtime = demo.runtime
    runtime.set_level("exact", 5_000_000)
    hook = PolicyHook(runtime, demo.model, parse("route=near-only,predict=none"))
    pin(runtime, [(layer, expert) for layer in range(runtime.far.layers) for expert in range(3)])
    runtime.counts.zero_()
    try:
        with runtime.hooked(hook), torch.inference_mode():
            runtime.phase, cache = "decode", DynamicCache(config=demo.model.config)
            for token in (5, 60, 700, 8, 90):
                out = demo.model(torch.tensor([[token]]), past_key_values=cache)
    finally:
        hook.close()
    counted = runtime.counters()
    assert counted.far_bytes == counted.speculative_bytes == 0 < counted.needed_bytes == counted.hit_bytes
    assert bool(out.logits.isfinite().all()) and int(hook.changed) > 0
