"""Policies inside a recorded step: replayed for 200 tokens they choose, keep and fetch as in the step run anew every
time, to the bit and to the byte; with an exact choice the numbers are those without any policy."""
from __future__ import annotations

import pytest
import torch

from engine.core import UserError
from engine.decode.step import Step
from engine.experts.policy_hook import PolicyHook
from engine.model.static_cache import forward
from engine.policies.choice import parse
from engine.policies.learned import TwoLayers
from tests.engine.decode.test_recorded_step import N_TOKENS, PROMPT, opened
from tests.support.folders import compressed
from tests.support.recorded import asks_the_host, from_here, record

EXACT = [("exact", "predict=next:2,evict=lfu,admit=third"), ("exact", "predict=repeat,evict=popularity"),
         ("fast", "predict=popularity,evict=hobbit,admit=third"), ("exact", "free=layer,predict=none,evict=popularity"),
         ("fast", "predict=profile,free=layer"), ("exact", "predict=learned,evict=hobbit")]
LOSSY = [("exact", "route=near:0.2:1"), ("exact", "route=skip:0.3,evict=lfu"), ("fast", "route=drop:0.45")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compressed("qwen3_moe", tmp_path_factory.mktemp("policies"), num_hidden_layers=3, hidden_size=256)[2]


def hooked(folder, level: str, text: str) -> Step:
    """A step behind a prompt that its policies saw as well."""
    step = opened(folder, level)
    far = step.runtime.far
    network = TwoLayers(far.layers, far.experts, far.hidden, 8).requires_grad_(False)
    step.runtime.hook = PolicyHook(step.runtime, step.model, parse(text), {"learned": network})
    step.cache.reset()
    step.runtime.phase = "prefill"
    forward(step.model, PROMPT[:, :-1], step.cache)
    step.runtime.phase = "decode"
    return step


@pytest.mark.parametrize("level, text", [*EXACT, *LOSSY])
@torch.no_grad()
def test_a_replay_chooses_as_the_step_itself(folder, level, text):
    step = hooked(folder, level, text)
    hook, start = step.runtime.hook, step.save(PROMPT.shape[1] - 1)
    step.run()
    graph, names = record(step.run)
    assert not asks_the_host(names)
    found = []
    for once in (step.run, graph):
        packets, logits = from_here(step, start, once, N_TOKENS)
        found.append((packets, torch.stack(logits), float(hook.dropped), int(hook.changed)))
    (eager, logits, *lost), (replayed, others, *lost_too) = found
    assert replayed == eager and torch.equal(logits, others) and lost == lost_too
    assert eager[-1][1] == 1 and len({packet[0] for packet in eager}) > 10
    assert eager[-1][5] == 0 if "near-only" in text else 0 < eager[-1][5] < eager[-1][3]
    if hook.choice.is_exact:
        assert torch.equal(torch.stack(from_here(step, start, step.run, N_TOKENS, is_hooked=False)[1]), logits)
    else:
        assert hook.lossy and (lost[0] > 0) == hook.leaves_out


@pytest.mark.parametrize("text, word", [("predict=maps", "grows"), ("predict=sequence", "looks back"),
                                        ("free=layer,miss=place", "cannot read"), ("route=near-only", "exact")])
def test_what_needs_the_host_is_refused_with_its_reason(folder, text, word):
    step = opened(folder, "fast" if "near-only" in text else "exact")
    with pytest.raises(UserError, match=word):
        PolicyHook(step.runtime, step.model, parse(text))
