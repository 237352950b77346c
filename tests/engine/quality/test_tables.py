"""The experiments behind the design: rules, quantised values, and the command on a small random checkpoint."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.__main__ import main
from engine.core import Options
from engine.model import load
from engine.quality.ablation import Comparison, Setting, both_views, chosen, plain
from kernels.layout import Layout
from tests.support import small_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> tuple[Path, Path]:
    return small_model.make(tmp_path_factory.mktemp("small"), demo_checkpoint)


def test_joint_and_separate_choice() -> None:
    scores = torch.tensor([[[4.0, 3, 2, 1], [8, 7, 6, 5]]])
    weights = torch.tensor([[0.9, 0.1]])
    best, rest = chosen(scores, weights, Setting("product", 0.25, 0.25))
    assert best.tolist() == [[[True, True, False, False], [False] * 4]]
    assert rest.tolist() == [[[False, False, True, True], [False] * 4]]
    best, rest = chosen(scores, weights, Setting("up", 0.5, joint=False))
    assert best.tolist() == [[[True, True, False, False]] * 2] and not rest.any()
    assert chosen(scores, weights, Setting())[0].all()


def test_more_bits_are_closer_and_the_fine_view_is_as_good_as_plain() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [float((plain(weight, 64, bits) - weight).square().mean()) for bits in (2, 3, 4)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0
    coarse, fine = (float((view - weight).square().mean()) for view in both_views(weight, Layout(256, 64, 64)))
    assert fine < 1.05 * errors[2] and coarse < 1.3 * errors[0]


def test_settings_that_leave_nothing_out_are_the_model_itself(folders) -> None:
    rows = torch.randint(4096, (2, 40), generator=torch.Generator().manual_seed(0))
    compare = Comparison(load.load(folders[0], Options(level="full", device="cpu")), 64)
    for folder, values in ((folders[0], "full"), (folders[1], "nested")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = float(model(rows, labels=rows).loss)
        for setting in (Setting(), Setting("sketch"), Setting("up", joint=False)):
            assert compare.loss(rows, replace(setting, values=values)) == pytest.approx(expected, rel=1e-5)
        assert compare.loss(rows, Setting("product", 0.1, values=values)) != pytest.approx(expected, rel=1e-4)


def test_the_command(folders, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The dog ran to the big tree and sat down there. " * 10)
    assert main(["tables", str(folders[0]), "--text", str(text), "--text", str(text), "--tokens", "60", "--json"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out)
    assert out.count("\n") == 1 and len(document["perplexity"]) == 2
    assert [len(document[key]) for key in ("masks", "quantisers", "bytes")] == [16, 4, 7]
    assert all(len(row["change"]) == 2 for key in ("masks", "quantisers", "bytes") for row in document[key])
    assert main(["tables", str(folders[1]), "--text", str(text)]) == 2
    assert "is compressed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tables_of_the_design_on_the_trained_model(shared: Path) -> None:
    """Not the last digit, which hangs on the text: which rule beats which, and by about how much."""
    from engine.cli.measure.tables import _rows
    loaded = load.load(shared / "models" / "tiny-chat", Options(level="full", device="cpu"))
    compare = Comparison(loaded, 64)
    texts = [_rows(shared / "data" / f"heldout_{name}.xz", loaded, 4096) for name in ("chat.jsonl", "tinystories.txt")]
    for rows in texts:
        base = compare.loss(rows, Setting())
        def rise(*setting, base=base, rows=rows, **named) -> float:
            return compare.loss(rows, Setting(*setting, **named)) - base
        floe, oracle = rise("up", 0.2, joint=False), rise("product", 0.2, joint=False)
        joint, sketch = rise("product", 0.2), rise("sketch", 0.2)
        assert joint < oracle < floe, "one budget for all routed experts, by the true product"
        assert sketch < 0.3 * floe and sketch < joint + 0.02, "the sketch costs almost nothing against the oracle"
        four, coarse = rise(values="nested"), rise(values="sketch")
        assert abs(four) < 0.015 and coarse > 0.03, "the 2-bit view chooses, it is no value"
        whole, mixed = rise("sketch", 0.1, values="nested"), rise("sketch", 0.05, 0.1, values="nested")
        assert mixed < whole, "the same bytes: half for refined neurons, half for down rows alone"
