"""What waits for a card, up to where it is needed: the measurement with make_fx in its place, the notes' commands."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from engine import catalogue
from engine.__main__ import main
from engine.card_step import Case, steps
from engine.spec import MachineError
from tests.test_far_locked import Ledger
from tests.test_graphs import Recording
from tests.test_synthetic import tiny

NOTES = (Path(__file__).resolve().parents[1] / "NOTES.md").read_text(encoding="utf-8")
WAITING = NOTES.partition("## Waits for a GPU")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"`(?:compute-sanitizer )?python -m engine ([^`]+)`", WAITING)
without_card = pytest.mark.skipif(torch.cuda.is_available(), reason="this computer has a card")


@pytest.mark.parametrize("name", ["qwen3.6-35b-a3b", pytest.param("gpt-oss-20b", marks=pytest.mark.slow)])
def test_a_synthetic_step_is_measured(name, monkeypatch):
    monkeypatch.setattr(catalogue, "find", tiny)
    case, ledger = Case(name, None, "fast", 60_000, 24), Ledger()
    rows = list(steps(case, case.shape(), ledger, device="cpu", capture=Recording()))
    found = {row["measured"]: row for row in rows}
    assert found["capture"]["equal"] is True and found["capture"]["sentence"] == ""
    assert found["step"]["ms_per_token"] > 0 and 0 < found["step"]["hit_rate"] < 1
    assert found["step"]["near_bytes"] <= 60_000 < found["step"]["far_bytes_per_token"] * 24
    assert not ledger.registered
    with pytest.raises(MachineError, match="page-locks only"):
        list(steps(case, case.shape(), Ledger(limit=0), device="cpu"))


@without_card
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_wait_end_with_one_sentence(command, monkeypatch, repository, capsys):
    monkeypatch.chdir(repository)
    assert main(shlex.split(command)) == 3
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].endswith(".") and "CPU" in said[-1]


def test_the_notes_have_commands():
    assert len(COMMANDS) >= 12 and {"card", "chat", "bench"} == {command.split()[0] for command in COMMANDS}


def test_bad_arguments_come_before_the_card(capsys):
    assert main(["card", "step", "--model", "llama"]) == 2 and "choose one of" in capsys.readouterr().err
    assert main(["card", "step", "--layers", "99"]) == 2 and "layers" in capsys.readouterr().err
