"""A base expert in place of missing ones: where experts have a part in common, and only there."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.core import Options, UserError
from engine.experts.base_experts import BaseExperts, common_of
from engine.experts.policy_hook import PolicyHook
from engine.library.compress import compress
from engine.model.load import load
from engine.policies.barycenter import common_part, paired
from engine.policies.choice import parse, refusal
from engine.policies.fidelity import stand_in
from engine.quality.evaluate import reference_of
from engine.quality.evidence.live import live_rows
from engine.quality.recorder import Recorder, record
from engine.quality.simulate import Simulator
from tests.support.folders import put_experts
from tests.support.small_model import EXPERTS, HIDDEN, LAYERS, NEURONS, TOKENIZER_FILES, make

DRAW = torch.Generator().manual_seed(0)


def turned(base: torch.Tensor, noise: float) -> torch.Tensor:
    """A copy [I, D] that was trained on a little, its neurons in another order."""
    return (base + noise * torch.randn(base.shape, generator=DRAW))[torch.randperm(len(base), generator=DRAW)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_checkpoint) -> Path:
    """Of a checkpoint, and of the same compressed: made-up experts, each for itself."""
    folder = tmp_path_factory.mktemp("base")
    make(folder, demo_checkpoint)
    return folder


@pytest.fixture(scope="module")
def copied(folder):
    """A model whose experts were all copied from one, open at level exact."""
    checkpoint = folder / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for layer in model.model.layers:
        base = torch.randn(NEURONS, 3 * HIDDEN, generator=DRAW) / 4
        experts = torch.stack([turned(base, 0.05) for _ in range(EXPERTS)])
        put_experts(layer.mlp.experts, *experts.unflatten(2, (3, HIDDEN)).unbind(2))
    model.save_pretrained(folder / "again-whole")
    for name in TOKENIZER_FILES:
        shutil.copyfile(checkpoint / name, folder / "again-whole" / name)
    compress(folder / "again-whole", folder / "again", device="cpu")
    loaded = load(folder / "again", Options("exact", device="cpu", predict=False))
    yield loaded
    loaded.runtime.close()


def test_copies_are_found_in_any_order_and_strangers_have_nothing_in_common():
    base = torch.randn(48, 512, generator=DRAW)
    found = common_part([turned(base, 0.2) for _ in range(6)].__getitem__, 6)
    assert found.is_there and found.unexplained < 0.1
    assert torch.allclose(found.base[paired(base, found.base)], base, atol=0.5)
    strangers = common_part([torch.randn(48, 512, generator=DRAW) for _ in range(6)].__getitem__, 6)
    assert not strangers.is_there and strangers.unexplained <= 1.0


def test_pairs_take_every_neuron_once():
    for _ in range(5):
        one, other = torch.randn(2, 30, 4, generator=DRAW)
        assert sorted(paired(one, other).tolist()) == list(range(30))
    same = torch.ones(5, 3)
    assert sorted(paired(same, same).tolist()) == list(range(5)), "of equals, too"


def test_the_best_expert_is_always_fetched_and_the_base_has_the_weight_of_the_rest():
    weights, near = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[False, False, True]])
    kept, base = stand_in(weights, near)
    assert torch.allclose(kept, torch.tensor([[0.0, 0.5, 0.3]])) and torch.allclose(base, torch.tensor([0.2]))
    kept, base = stand_in(weights, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(kept, weights) and not base.any()


def test_a_model_without_a_common_part_is_refused_in_a_sentence(folder):
    loaded = load(folder / "compressed", Options("exact", device="cpu"))
    with pytest.raises(UserError, match="have no part in common"):
        PolicyHook(loaded.runtime, loaded.model, parse("fidelity=base"))
    loaded.runtime.close()
    assert "choose exact" in refusal(parse("fidelity=base"), "balanced", "cpu")


def test_the_base_is_the_mean_of_the_aligned_experts(copied):
    assert all(common_of(copied.runtime, layer).unexplained < 0.2 for layer in range(LAYERS))
    x, layer = torch.randn(4, HIDDEN, generator=DRAW), copied.runtime.layers[1]
    own = common_of(copied.runtime, 1).base.view(NEURONS, 3, HIDDEN)
    wanted = (torch.nn.functional.silu(x @ own[:, 0].T) * (x @ own[:, 1].T)) @ own[:, 2]
    torch.testing.assert_close(BaseExperts(copied.runtime).of(layer, x), wanted, rtol=1e-3, atol=1e-4)


def test_a_base_expert_costs_less_than_leaving_out_and_no_byte(copied):
    """One token a step with near memory for half: the same experts are missing, the bytes are the same."""
    ids = torch.randint(3, 400, (40,), generator=DRAW).tolist()
    with torch.inference_mode():
        asked = [(ids, reference_of(copied, ids))]
    half = LAYERS * EXPERTS * copied.runtime.whole_bytes // 2
    exact, skipped, based = live_rows(copied, asked, half, [], "exact", ("", "route=skip:0", "fidelity=base"),
                                      lambda text: None)
    assert exact.kl < 1e-3 and based.kl < skipped.kl / 2
    assert based.dropped > 0 and 0 < based.counters.far_bytes < exact.counters.far_bytes
    everything = live_rows(copied, asked, 10 * half, [], "exact", ("fidelity=base",), lambda text: None)[0]
    assert everything.dropped == 0 and everything.kl == pytest.approx(exact.kl, abs=1e-6)


def test_a_replay_counts_what_the_engine_counted(copied, tmp_path):
    questions: Path = tmp_path / "questions.txt"
    questions.write_text("Hello!\nWhat is a boat?\n")
    runtime, half = copied.runtime, LAYERS * EXPERTS * copied.runtime.whole_bytes // 2
    runtime.set_level("exact", half)
    runtime.counts.zero_()
    recorder = Recorder(copied, 1, True, PolicyHook(runtime, copied.model, parse("predict=none,fidelity=base")))
    record(copied, questions, recorder, 40, 20)
    found = Simulator(recorder.trace("copied"), half).run_choice(parse("predict=none,fidelity=base"))
    counted = runtime.counters()
    assert [*vars(found.counters).values()][:5] == [*vars(counted).values()][:5] and counted.far_bytes > 0
    assert found.counters.dropped_weight == pytest.approx(float(recorder.inner.dropped))
