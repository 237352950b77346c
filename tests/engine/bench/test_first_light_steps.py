"""First light's steps on a processor: Triton's interpreter, references and make_fx where a card would be."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from engine.bench import step_profile
from engine.bench.first_light import chat_checks, decode_checks, kernel_checks, machine, speed_checks
from engine.bench.first_light.process import ROOT
from engine.bench.gpu_kernels import Speeds
from engine.bench.step import Case
from engine.experts.device import DeviceRuntime
from engine.experts.runtime import Runtime
from engine.library import catalogue
from tests.engine.bench.test_synthetic import tiny
from tests.engine.decode.test_cuda_graph import Recording
from tests.engine.experts.test_far_locked import Ledger

QWEN = Case("qwen3.6-35b-a3b", None, "fast", 60_000, 12, None, n_prompt=9)
INTERPRETED = """
import tests.kernels.interpreter
from engine.bench.first_light import kernel_checks as k, speed_checks, table_checks as t
from engine.bench.rows import say
from kernels.layout import Layout
from tests.engine.experts.test_far_locked import Ledger
for row in ({rows}):
    say(row)
"""
without_triton = pytest.mark.skipif(sys.platform == "darwin", reason="needs Triton")


def rows_of(*command: str, **environment: str) -> list[dict]:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows, done.stderr[-3000:]
    return rows


def verdicts(rows: list[dict]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        if "verdict" in row:
            found.setdefault(row["finding"], set()).add(row["verdict"])
    return found


@without_triton
@pytest.mark.slow
@pytest.mark.parametrize("shape", ['k.KernelShape("tiny", 256, 40, 2)',
                                   'k.KernelShape("biased", 192, 24, 2, "clamped_swiglu", True)'])
def test_every_kernel_is_held_against_its_reference(shape):
    rows = rows_of("-c", INTERPRETED.format(rows=f'k.checked([{shape}], "cpu", (1, 2))'), TRITON_INTERPRET="1")
    assert verdicts(rows) == dict.fromkeys(kernel_checks.CHECKS, {"works"})
    assert len([row for row in rows if "verdict" in row]) == 2 * len(kernel_checks.CHECKS)
    assert all(row["seconds_with_compiling"] > 0 for row in rows if "measured" in row)


@without_triton
def test_tables_and_choices_are_the_references_to_the_bit():
    sizes = "t.Sizes(Layout(256, 6, 128), experts=7, top_k=3, clocks=3, scores=(300,), slots=100)"
    rows = rows_of("-c", INTERPRETED.format(rows=f't.tables({sizes}, "cpu")'), TRITON_INTERPRET="1")
    assert verdicts(rows) == dict.fromkeys(
        ("resolve and age, neurons", "resolve and age, experts", "select", "choose_neurons", "look_ahead", "age"),
        {"works"}) and len(rows) == 13


@without_triton
def test_fill_is_timed_alone_and_beside_score():
    given = ('2**20, speed_checks.FillCases((128, 256), (5, 9), (2, 4)), "cpu", Ledger(), '
             'lambda run: run() is None or 2.0, k.KernelShape("tiny", 256, 12, 2)')
    rows = rows_of("-c", INTERPRETED.format(rows=f"speed_checks.fill({given})"), TRITON_INTERPRET="1")
    timed = [row for row in rows if row.get("measured") == "fill"]
    assert len(timed) == 8 and {row["blocks"] for row in timed} == {2, 4}
    assert {"beside_ms", "other_ms", "overlap"} <= timed[0].keys()
    assert len([row for row in rows if row.get("finding") == "fill"]) == 4


def test_a_kernel_that_computes_something_else_is_wrong():
    one, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    found = [kernel_checks.compared("x", "y", lambda a=a, share=share: ((a,), (one,), share)) for a, share in (
        (one, 0.0), (one + 1e-4, 1e-3), (one + 1e-2, 1e-3), (one + 1e-7, 0.0), (nan, 1e-3), (one[:2], 1e-3))]
    assert [row["verdict"] for row in found] == ["works", "works", "wrong", "wrong", "wrong", "wrong"]
    assert found[3]["figure"] == 3 and found[4]["figure"] is None and "inf" in found[4]["note"]
    broken = kernel_checks.compared("x", "y", lambda: (1 / 0, (), 0.0))
    assert broken["verdict"] == "wrong" and "ZeroDivisionError" in broken["note"]


@pytest.fixture
def small_models(monkeypatch):
    monkeypatch.setattr(catalogue, "find", tiny)
    monkeypatch.setattr(step_profile, "PROFILED", 3)  # on a processor a profile is long


def test_a_recorded_step_and_every_place_where_it_breaks(small_models):
    rows = list(decode_checks.measured(QWEN, Ledger(), Speeds(1e9, 1e8), None, "cpu", Recording(),
                                       then=decode_checks.broken_off))
    found = verdicts(rows)
    assert all(seen == {"works"} for seen in found.values()), found
    assert len([name for name in found if "broken off" in name]) == 6
    assert {"prefill of 8 tokens", "the recorded step says what the step itself says", "decode"} <= found.keys()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_a_fused_step_is_held_against_transformers(small_models):
    case = Case("qwen3-30b-a3b", None, "exact", None, 4, n_prompt=5)
    rows = list(decode_checks.measured(case, Ledger(), Speeds(1e9, 1e8), None, "cpu", Recording(),
                                       then=decode_checks.against_transformers))
    found = verdicts(rows)
    assert "the fused step is transformers' own forward" in found
    assert all(seen == {"works"} for seen in found.values()), found


def test_what_a_broken_step_leaves_is_found(small_models, monkeypatch):
    """Were near memory not forgotten, a slot that was given and never filled would count as filled: where places are
    given and filled by two launches."""
    with decode_checks.opened(QWEN, decode_checks.shape_named(QWEN.name), Ledger(), device="cpu",
                              capture=Recording()) as run:
        fresh, _ = run.answer()
        monkeypatch.setattr(decode_checks, "BREAKS", {"take and fill": "fill"})
        monkeypatch.setattr(DeviceRuntime, "_links", lambda self, layer: False)
        monkeypatch.setattr(Runtime, "reset", lambda self: None)
        found = list(decode_checks.broken_off(run))
    assert not all(finding.works for finding in found), found
    assert "nothing was broken off" not in [finding.note for finding in found]


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    Case("gpt-oss-20b", None, "exact", 200_000, 24, n_prompt=40), Case("gemma-4-26b-a4b", None, "fast", None, 24,
                                                                       n_prompt=40)])
def test_steps_past_a_window(case, small_models):
    rows = list(decode_checks.measured(case, Ledger(), Speeds(1e9, 1e8), None, "cpu", Recording()))
    assert all(seen == {"works"} for seen in verdicts(rows).values())


def test_the_peak_is_held_against_the_plan():
    row = {"measured": "peak", "layers": 4, "vram_peak": 104, "vram_planned": 100, "memory": "sums"}
    (inside,), (outside,) = (list(decode_checks._found(row | {"vram_peak": n}, QWEN)) for n in (104, 106))
    assert inside.works and not outside.works and "sums" in outside.note


def test_the_embedded_models_conversation(monkeypatch):
    monkeypatch.setattr(chat_checks, "GREEDY", replace(chat_checks.GREEDY, max_tokens=8))
    rows = list(chat_checks.chat("cpu"))
    assert verdicts(rows) == {"the device computes the experts": {"works"}, "an answer is the processor's": {"works"},
                              "closing gives the card's memory back": {"works"},
                              "policies are recorded with the step": {"works"}}
    said = iter([(["a", "b"], False, ""), (["a", ""], False, ""), (["a", "b"], True, ""), (["a", "b"], True, ""),
                 (["a", "c"], True, ""), (["b", "b"], True, "cannot be captured")])
    monkeypatch.setattr(chat_checks, "conversation", lambda *given: next(said))
    found = [row["verdict"] for row in chat_checks.chat("cpu")]
    assert found == ["works", "works", "wrong", "wrong", "works", "works", "works",
                     "works", "works", "works", "wrong", "wrong"]
    said = iter([*[(["a", "b"], device, "") for device in (False, True, True, True, True, True)],
                 (["a", "b"], True, "rates"), (["a", "c"], True, "rates")])
    *_, beside = chat_checks.chat("cuda")
    assert beside["verdict"] == "wrong" and beside["note"] == "rates"


def test_page_locked_memory_is_read_back_or_refused():
    rows = list(machine.read_back(4 << 20, Ledger(), "cpu", 50))
    assert [row["verdict"] for row in rows] == ["works", "works"] and rows[1]["figure"] == 0
    row, = machine.read_back(4 << 20, Ledger(limit=0), "cpu", 50)
    assert row["verdict"] == "wrong" and "page-locks only" in row["note"]


def test_what_is_slow_is_said():
    node = {"measured": "node", "nodes": 4000}
    rows = [node | {"bytes": n, "fork": fork, "us_per_node": us} for n, fork, us in (
        (4, False, 3.0), (4, True, 3.5), (5 << 20, False, 9.0), (5 << 20, True, 9.0))]
    found = [(finding.what, finding.verdict, finding.figure) for finding in speed_checks.node_findings(rows)]
    assert found == [("a node of a graph", "slow", 3.0), ("a fork and its join", "works", 5.0),
                     ("a node of a graph", "works", 9.0), ("a fork and its join", "works", 0.0)]
    fill = {"measured": "fill", "record": 2304, "overlap": 0.5}
    rows = [fill | {"burst": burst, "blocks": blocks, "gb_per_second": speed, "of_copy_engine": speed / 20}
            for burst, blocks, speed in ((10, 16, 2.0), (450, 16, 12.0), (450, 32, 16.0))]
    few, many = speed_checks.fill_findings(rows)
    assert (few.verdict, many.verdict, many.figure) == ("works", "slow", 0.8) and "16.0 GB/s with 32" in many.note
    refused, = speed_checks.fill_findings([{"measured": "fill", "sentence": "Too little."}])
    assert refused.verdict == "wrong" and refused.note == "Too little."


def test_the_cards_tests_are_told_one_by_one(tmp_path):
    (tmp_path / "test_some.py").write_text("import pytest\ndef test_good(): pass\n"
                                           "def test_none(): pytest.skip('no card')\n"
                                           "def test_bad(): assert 1 == 2\ndef test_never(): pass\n")
    code = ("from pathlib import Path; from engine.bench.first_light.card_tests import tests; "
            "from engine.bench.rows import say\nfor row in tests(Path({!r}), '--rootdir', {!r}): say(row)")
    rows = rows_of("-c", code.format(str(tmp_path / "test_some.py"), str(tmp_path)))
    assert [(row.get("case") or row.get("name") or row["finding"], row.get("verdict")) for row in rows] == [
        ("test_good", "works"), ("test_none", None), ("test_bad", "wrong"), ("the tests for a card", "wrong")]
    assert "1 == 2" in rows[2]["note"] and "no card" in rows[1]["skipped"]


def test_the_cards_tests_need_nothing_that_a_bare_machine_lacks():
    """Neither the page's packages nor those of other tests."""
    lacking = ("latex2mathml", "playwright", "gradio", "hypothesis", "accelerate", "markdown_it", "gguf", "xdist")
    code = (f"import sys; sys.modules.update(dict.fromkeys({lacking!r})); import pytest; "
            "sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', 'tests/test_on_gpu.py']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == 0 and "test_a_kernel_reads_page_locked_memory" in done.stdout, done.stdout[-2000:]
