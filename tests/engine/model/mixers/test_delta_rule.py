"""flash-linear-attention reads prompts only where it was tried and is right; a small package of its name stands for it
here, since the real one needs a card."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next

from engine.model.mixers.delta_rule import CHUNKED, TAKEN, choose_delta_rule
from tests.support.architectures import build
from tests.support.folders import compressed

RIGHT = """
import inspect
from transformers.models.qwen3_next import modeling_qwen3_next as theirs
own, calls = inspect.unwrap(theirs.torch_chunk_gated_delta_rule), []
def chunk_gated_delta_rule(q, k, v, g, beta, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False):
    calls.append(q.shape)
    return own(q, k, v, g, beta, 64, initial_state, output_final_state, use_qk_l2norm_in_kernel)
"""
RETURNED = RIGHT.rpartition("    return ")[2]
WRONG = {why: RIGHT.replace(f"    return {RETURNED}", f"    {instead}\n") for why, instead in {
    "computes other numbers, 5": "return " + RETURNED.replace("k, v", "k, 1.05 * v"),
    "computes no such numbers": "return " + RETURNED.replace("k, v", "k, v * float('nan')"),
    "computes no such numbers.": "return q[..., 1:], q",
    "cannot be used: RuntimeError no such card": "raise RuntimeError('no such card')"}.items()} | {
    "cannot be used: ImportError": "from triton import of_another_version",
    "cannot be used: AttributeError": "another_name = 1"}
TOKENS = torch.randint(3, 128, (1, 80), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def names(monkeypatch):
    """transformers' module as a process finds it that has no such package; -> what it calls."""
    found = vars(modeling_qwen3_next)
    for name in (name for taken in TAKEN.values() for name in taken):
        monkeypatch.setitem(found, name, found[name])
    yield found
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        del sys.modules[name]


def package(tmp_path: Path, text: str) -> Path:
    place = tmp_path / "fla" / "ops" / "gated_delta_rule"
    place.mkdir(parents=True)
    for folder in (place.parent.parent, place.parent):
        (folder / "__init__.py").write_text("", "utf-8")
    (place / "__init__.py").write_text(text, "utf-8")
    return tmp_path


@torch.no_grad()
def test_a_right_one_reads_prompts_on_a_card_and_on_no_processor(names, tmp_path, monkeypatch):
    model = build("qwen3_next")
    expected, own = model(TOKENS).logits, names[CHUNKED].__wrapped__
    monkeypatch.syspath_prepend(package(tmp_path, RIGHT))
    assert choose_delta_rule(model, "cuda") == ""
    calls = sys.modules["fla.ops.gated_delta_rule"].calls
    assert {shape[1] for shape in calls} == {150}
    calls.clear()
    assert torch.equal(model(TOKENS).logits, expected) and [shape[1] for shape in calls] == [80]
    assert choose_delta_rule(model, "cpu") == "" and names[CHUNKED] is own
    assert torch.equal(model(TOKENS).logits, expected) and len(calls) == 1


@pytest.mark.parametrize("why", WRONG)
@torch.no_grad()
def test_a_wrong_one_is_left_aside_in_one_sentence(names, tmp_path, monkeypatch, why):
    model, own = build("qwen3_next"), names[CHUNKED].__wrapped__
    monkeypatch.syspath_prepend(package(tmp_path, WRONG[why]))
    said = choose_delta_rule(model, "cuda")
    assert said.startswith(f"Prompts are read without the installed flash-linear-attention, which on this card {why}")
    assert said.endswith(".") and "\n" not in said and names[CHUNKED] is own


def test_without_the_package_nothing_is_touched(names):
    before = dict(names)
    assert choose_delta_rule(build("qwen3_next"), "cuda") == ""
    assert choose_delta_rule(build("qwen3_moe"), "cuda") == ""
    assert {name: names[name] for name in before} == before


OPENED = """
import sys, torch
from engine.core import Options
from engine.model.load import load
from transformers.models.qwen3_next import modeling_qwen3_next as theirs
with torch.no_grad():
    own = theirs.torch_chunk_gated_delta_rule.__wrapped__
    loaded = load(sys.argv[1], Options("exact", device="cpu"))
    loaded.model(torch.arange(3, 73)[None])
assert "fla" in sys.modules and theirs.torch_chunk_gated_delta_rule is own
"""


def test_a_model_opens_on_a_processor_beside_the_package(tmp_path, repository):
    """transformers has taken the package's function by then, which cannot compute there."""
    folder = compressed("qwen3_next", tmp_path / "model", 16)[2]
    text = "def chunk_gated_delta_rule(q):\n    raise RuntimeError('needs a card')\n"
    places = os.pathsep.join((str(package(tmp_path, text)), str(repository)))
    done = subprocess.run([sys.executable, "-c", OPENED, str(folder)], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": places})
    assert done.returncode == 0, done.stderr[-3000:]
