"""What users of transformers do with a model works on a compressed folder, or is refused in a sentence, never ignored.

Levels: what generation makes of a model in batches, without a cache and with guesses is the text of greedy decoding.
"""
from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from engine.core import Options, UserError
from engine.experts.layer import LevelPlan
from engine.files.manifest import CONFIG, EXPERTS
from engine.files.skeleton import experts_modules, spec_of_folder
from engine.model.load import load
from tests.support.architectures import build
from tests.support.folders import as_format_1, compressed, edit, put_experts, stored_experts

PROMPT = torch.randint(3, 128, (9,), generator=torch.Generator().manual_seed(4))
GREEDY = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """Two layers, the trunk in ordinary weights -> (the original with the stored 4-bit experts, the folder)."""
    original, _, folder = compressed("qwen3_moe", tmp_path_factory.mktemp("door"))
    for layer, module in enumerate(experts_modules(original, "qwen3_moe").values()):
        put_experts(module, *stored_experts(folder, layer))
    return original, folder


def opened(folder: Path, level: str = "exact"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    runtime = model.floe
    if level != "exact":
        few = runtime.top_k * runtime.far.neurons // 8
        runtime.plans["balanced"] = LevelPlan(((few, few),) * runtime.far.layers)
        runtime.plans["floe"] = LevelPlan(thresholds=((0.5,) * runtime.far.experts,) * runtime.far.layers)
        runtime.set_level(level)
    return model


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
for door in (AutoModelForCausalLM, Qwen3MoeForCausalLM):
    try:
        door.from_pretrained(sys.argv[1])
    except ValueError as error:
        print(error)
"""


def test_without_the_import_it_does_not_open(made):
    run = subprocess.run([sys.executable, "-c", WITHOUT, made[1]], capture_output=True, text=True, timeout=300)
    said = run.stdout.splitlines()
    assert len(said) == 2 and all("import engine.hf" in line and "is not supported" in line for line in said), run


def test_an_older_folder_opens_as_before(made, tmp_path):
    old = tmp_path / "old"
    opened(made[1]).save_pretrained(old)
    edit(old / CONFIG, experts_implementation=None)
    model = opened(as_format_1(old))
    assert model.config._experts_implementation == EXPERTS
    assert model.generate(PROMPT[None], **GREEDY).tolist() == opened(made[1]).generate(PROMPT[None], **GREEDY).tolist()


@pytest.mark.parametrize("level", ["exact", "balanced", "floe"])
def test_every_way_of_generating_gives_the_text_of_greedy(made, level):
    model = opened(made[1], level)
    greedy = model.generate(PROMPT[None], **GREEDY)
    rows = torch.stack([PROMPT, PROMPT.flip(0), PROMPT.roll(3)])
    each = torch.cat([model.generate(row[None], **GREEDY) for row in rows])
    assert torch.equal(each[0], greedy[0])
    assert torch.equal(model.generate(rows, **GREEDY), each)
    assert torch.equal(model.generate(rows, use_cache=False, **GREEDY), each)
    repeating = torch.cat([PROMPT, PROMPT])[None]
    plain = model.generate(repeating, **GREEDY)
    for guesses in (3, 10):
        assert torch.equal(model.generate(repeating, prompt_lookup_num_tokens=guesses, **GREEDY), plain)
    assert model.floe.window is None


def test_a_level_is_seen_in_all_of_them(made):
    """Or the test above would hold for a runtime that reads everything whole."""
    exact, sparse = opened(made[1]), opened(made[1], "balanced")
    text = exact.generate(PROMPT[None], **GREEDY)
    with torch.no_grad():
        for given in ({}, {"use_cache": False}):
            for model in (exact, sparse):
                model(text[:, :-2], **given)
            differ = [model(text[:, -2:] if not given else text, **given).logits[:, -1] for model in (exact, sparse)]
            assert not torch.allclose(*differ, atol=1e-3)
        whole = [model(text).logits for model in (exact, sparse)]
    assert torch.allclose(*whole, atol=1e-5), "a prompt is read with every neuron"


@pytest.mark.parametrize("trunk_bits", [16, 8])
def test_gradients_at_exact_are_those_of_the_stored_values(trunk_bits, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.files.trunk.SMALLEST", 1024)
    original, _, folder = compressed("gpt_oss", tmp_path, trunk_bits)
    for layer, module in enumerate(experts_modules(original, "gpt_oss").values()):
        put_experts(module, *stored_experts(folder, layer))
    model, ids = opened(folder), PROMPT[None]
    if trunk_bits == 8:
        own = dict(model.named_parameters())
        original.load_state_dict({name: own[name] for name, _ in original.named_parameters() if name in own},
                                 strict=False)
    found, expected = ({name: p.grad for name, p in each.named_parameters() if p.grad is not None}
                       for each in (model, original) if each(ids, labels=ids).loss.backward() is None)
    names = [name for name in found if name in expected]
    assert any("router" in name for name in names) and any("layernorm" in name for name in names)
    for name in names:
        scale = expected[name].abs().max()
        assert scale > 0 and (found[name] - expected[name]).abs().max() < 0.02 * scale, name


def test_gradients_of_a_checkpoint_are_its_own(made):
    """Level `full` leaves nothing out either."""
    model, original = load(made[1].parent / "source", Options("full", device="cpu")).model, build("qwen3_moe")
    assert model.floe.level == "full"
    for each in (model, original):
        each(PROMPT[None], labels=PROMPT[None]).loss.backward()
    expected, own = dict(original.named_parameters()), dict(model.named_parameters())
    assert len(own) > 10
    for name, found in own.items():
        torch.testing.assert_close(found.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_at_a_sparse_level_are_refused(made):
    model = opened(made[1], "balanced")
    loss = model(PROMPT[None], labels=PROMPT[None]).loss
    with pytest.raises(UserError, match="no gradients at level balanced.*exact") as caught:
        loss.backward()
    assert "\n" not in str(caught.value)
    model.floe.set_level("exact")
    model(PROMPT[None], labels=PROMPT[None]).loss.backward()


def test_a_copy_lives_on_its_own(made):
    model = opened(made[1], "balanced")
    expected = model.generate(PROMPT[None], **GREEDY)
    twin = copy.deepcopy(model)
    assert twin.floe is not model.floe and twin.floe.far is model.floe.far
    model.floe.set_level("exact")
    del model
    assert twin.floe.level == "balanced" and torch.equal(twin.generate(PROMPT[None], **GREEDY), expected)


def test_saved_is_a_copy_of_the_folder(made, tmp_path):
    model = opened(made[1])
    model.save_pretrained(tmp_path / "new" / "copy")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "new" / "copy").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in made[1].iterdir()}
    assert torch.equal(opened(tmp_path / "new" / "copy").generate(PROMPT[None], **GREEDY),
                       model.generate(PROMPT[None], **GREEDY))
    for given, why in ((dict(save_directory=tmp_path / "new" / "copy"), "not empty"),
                       (dict(save_directory=tmp_path / "hub", push_to_hub=True), "push_to_hub")):
        with pytest.raises(UserError, match=why):
            model.save_pretrained(**given)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("given, why", [
    ({"experts_implementation": "eager"}, "experts_implementation='eager'"),
    ({"experts_implementation": "grouped_mm"}, "experts_implementation='grouped_mm'"),
    ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "device_map"),
    ({"device_map": {"model": 0, "lm_head": "cpu"}}, "device_map"),
    ({"device_map": "auto", "max_memory": {"cpu": 20_000}}, "device_map"),
])
@pytest.mark.parametrize("door", [AutoModelForCausalLM, Qwen3MoeForCausalLM])
def test_what_it_cannot_do_is_refused(made, given, why, door):
    with pytest.raises(UserError, match=why) as caught:
        door.from_pretrained(made[1], **given)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_another_implementation_is_refused_later_too(made):
    model = opened(made[1])
    model.set_experts_implementation("eager")
    with pytest.raises(UserError, match="'eager'"):
        model(PROMPT[None])
    model.set_experts_implementation(EXPERTS)
    model(PROMPT[None])


def test_one_device_is_allowed_and_planning_needs_no_experts(made):
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        assert AutoModelForCausalLM.from_pretrained(made[1], device_map=device_map).floe.level == "exact"
    assert spec_of_folder(made[1], "x").experts == 8
