"""What waits for a card, up to where it is needed: the measurement with make_fx in its place, the notes' commands."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from engine.__main__ import build_parser, main
from engine.bench import step_profile
from engine.bench.gpu_kernels import Speeds
from engine.bench.step import Case, steps
from engine.bench.step_profile import gpu_named
from engine.bench.synthetic import shape_named
from engine.core import MachineError
from engine.library import catalogue
from engine.model.static_cache import StepCache
from tests.engine.bench.test_synthetic import tiny
from tests.engine.decode.test_cuda_graph import Recording
from tests.engine.experts.test_far_locked import Ledger

NOTES = (Path(__file__).resolve().parents[3] / "NOTES.md").read_text(encoding="utf-8")
WAITING = NOTES.partition("## Waits for a GPU")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"(?:`|^    )(?:compute-sanitizer )?python -m engine ([^`\n]+)", WAITING, re.MULTILINE)
without_card = pytest.mark.skipif(torch.cuda.is_available(), reason="this computer has a card")


@pytest.mark.parametrize("name, level, near_bytes", [
    ("qwen3.6-35b-a3b", "fast", 60_000), pytest.param("gpt-oss-20b", "fast", 160_000, marks=pytest.mark.slow),
    pytest.param("qwen3-30b-a3b", "exact", 200_000, marks=pytest.mark.slow)])
def test_a_synthetic_step_is_measured(name, level, near_bytes, monkeypatch):
    monkeypatch.setattr(catalogue, "find", tiny)
    monkeypatch.setattr(step_profile, "PROFILED", 3)  # on a processor a profile is long
    gpu, speeds, ledger = gpu_named("rtx-3060-12gb"), Speeds(1e9, 1e8), Ledger()
    case = Case(name, None, level, near_bytes, 16, gpu)
    rows = list(steps(case, shape_named(case.name, case.layers), ledger, speeds, device="cpu", capture=Recording()))
    found = {row["measured"]: row for row in rows}
    assert found["capture"]["equal"] is True and found["capture"]["sentence"] == ""
    step, outside, other = found["step"], found["outside memory"], found["projection"]
    assert step["ms_per_token"] > 0 and 0 < step["hit_rate"] < 1 and step["near_bytes"] <= near_bytes
    assert step["far_bytes_per_token"] == pytest.approx((1 - step["hit_rate"]) * step["needed_bytes_per_token"])
    assert outside["link_bytes"] == other["link_bytes"] == int(step["far_bytes_per_token"])
    assert outside["vram_bytes"] == other["vram_bytes"] > step["needed_bytes_per_token"]
    seconds = (other["vram_ms"] + other["link_ms"] + other["outside_ms"]) / 1e3
    assert other["tokens_per_second"] == pytest.approx(1 / seconds) and other["card"] == "GeForce RTX 3060"
    assert found["nodes"]["waits_per_token"] == 0
    assert ("whole experts" in found) == (level == "fast")
    if level == "fast":
        whole = found["whole experts"]
        assert whole["level"] == "exact" and whole.get("near_bytes", near_bytes) <= near_bytes
    assert all("synthetic" in row["model"] for row in rows)
    assert not ledger.registered


def test_too_little_locked_memory_is_a_sentence(monkeypatch):
    monkeypatch.setattr(catalogue, "find", tiny)
    case, ledger = Case("qwen3-30b-a3b", n_tokens=24), Ledger(limit=0)
    with pytest.raises(MachineError, match="page-locks only"):
        list(steps(case, shape_named(case.name, case.layers), ledger, Speeds(1e9, 1e8), device="cpu"))
    assert not ledger.registered


@without_card
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_wait_end_with_one_sentence(command, monkeypatch, repository, capsys, tmp_path):
    monkeypatch.chdir(repository)
    assert main(shlex.split(command.replace("--out first-light", f"--out {tmp_path}"))) == 3
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].endswith(".") and "processor" in said[-1]


def test_the_notes_have_commands():
    assert len(COMMANDS) >= 10 and {"gpu", "bench"} == {command.split()[0] for command in COMMANDS}
    said = {word for command in COMMANDS for word in command.split()}
    assert {"first-light", "fill", "kernels", "step", "--small-pages", "--vram", "--project", "--table"} <= said


def test_the_layers_that_the_notes_name_can_be_run():
    """A model's first layers need one with attention; shapes alone are looked at."""
    for command in filter(lambda text: "--layers" in text, COMMANDS):
        given = build_parser("gpu").parse_args(shlex.split(command)[1:])
        shape = shape_named(given.model, given.layers)
        StepCache(shape.config, 16, "meta")


def test_bad_arguments_come_before_the_card(capsys):
    assert main(["gpu", "step", "--model", "llama"]) == 2 and "choose one of" in capsys.readouterr().err
    assert main(["gpu", "step", "--layers", "99"]) == 2 and "layers" in capsys.readouterr().err
    assert main(["gpu", "step", "--tokens", "1"]) == 2 and "Two tokens" in capsys.readouterr().err
    assert main(["gpu", "step", "--project", "voodoo"]) == 2 and "no machine 'voodoo'" in capsys.readouterr().err
    assert main(["bench", "assets/none", "--vram", "11GiB"]) == 2 and "no folder" in capsys.readouterr().err
    for option in (["--vram", "11GiB"], ["--project", "rtx-3060-12gb"], ["--table", "here"]):
        assert main(["bench", "assets/demo", "--device", "cpu", *option]) == 2
        assert "about a graphics card" in capsys.readouterr().err
