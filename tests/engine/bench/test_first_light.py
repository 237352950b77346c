"""First light's parent: whatever its children do, every row is kept, nothing stops the next step, nothing is left."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from engine.__main__ import main
from engine.bench.first_light import bad_day, child, findings, machine, parent, steps
from engine.bench.first_light.findings import Finding
from engine.bench.first_light.process import ROOT, Part
from engine.bench.first_light.record import MOST_BYTES, PART_BYTES, Record, row_in, rows_of
from engine.bench.first_light.steps import FAKES, STEPS, Step
from engine.core import MachineError, UserError
from engine.machine.detect import Gpu, Hardware
from engine.machine.table import GIB

posix = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs signals to a group of processes")


def outcomes(rows: list[dict]) -> dict[str, dict]:
    return {row.get("part", row.get("step")): row for row in rows if "outcome" in row}


def part(name: str, tmp_path, seconds: float = 10**6) -> tuple[Part, Record]:
    record = Record(tmp_path / "out")
    return Part(name, ["-m", parent.CHILD, name], seconds, record, {"step": 1}), record


def wait_for(seen) -> None:
    while not seen():
        time.sleep(0.02)


@posix
def test_a_bad_day_from_end_to_end(tmp_path, capsys):
    """Children that fail, hang, crash, print garbage, print without end, say nothing, leave a process behind."""
    out, kept = tmp_path / "out", tmp_path / "bench"
    assert main(["gpu", "first-light", "--fake", "--out", str(out), "--table", str(kept), "--json"]) == 0
    rows, said = rows_of(out), json.loads(capsys.readouterr().out)
    found = outcomes(rows)
    assert {name: row["outcome"] for name, row in found.items()} == {
        "card": "ended", "fail": "failed", "hang": "timed out", "crash": "crashed", "garbage": "ended",
        "endless": "said too much", "endless-errors": "said too much", "nothing": "said nothing", "orphan": "ended",
        8: "skipped", "work": "ended"}
    assert found["fail"]["exit"] == 1 and found["crash"]["signal"] == "SIGSEGV"
    log = (out / "log.txt").read_text(errors="replace")
    assert "RuntimeError: This child fails." in log and "Segmentation fault" in log and "bad_day.py" in log
    assert {"finding", "verdict"} <= {key for row in rows if row.get("part") == "garbage" for key in row}
    pid = next(row["pid"] for row in rows if "pid" in row)
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "rows.jsonl", "table.txt"]
    assert sum(path.stat().st_size for path in out.iterdir()) < 4 * PART_BYTES
    table = said["table"]
    assert (out / "table.txt").read_text() == "\n".join(table) + "\n" and table[0] == "First light on Fake card"
    assert [line.split()[0] for line in table if " 9 " in line] == ["wrong", "slow", "works"]
    assert any(line.startswith("not run") and "needs 1e+06 s" in line for line in table)
    assert any(line.endswith("0.0003 to 0.0005 of the largest value") for line in table)
    lines = (kept / "fake-card.csv").read_text().splitlines()
    assert any("link_gb_per_second=12.1" in line for line in lines) and all("date=20" in line for line in lines)


@posix
def test_a_second_run_adds_to_the_first_and_its_rows_count(tmp_path, capsys):
    out = str(tmp_path / "out")
    for chosen in ("0,1", "1,9"):   # the card is known by then
        assert main(["gpu", "first-light", "--fake", "--out", out, "--steps", chosen]) == 0
    rows = rows_of(tmp_path / "out")
    assert [row["step"] for row in rows if "outcome" in row] == [0, 1, 1, 9]
    assert len([row for row in findings.newest(rows) if row["step"] == 1]) == 2
    assert main(["gpu", "first-light", "--fake", "--out", str(tmp_path / "new"), "--steps", "9"]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "new") if "outcome" in row] == [0, 9]


@posix
def test_who_hangs_shows_where(tmp_path):
    late, record = part("hang", tmp_path)
    wait_for(lambda: record.rows)   # it hangs by now
    late.seconds = 0
    assert late.wait()["outcome"] == "timed out"
    assert "in hang" in (record.folder / "log.txt").read_text()


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_takes_its_child_along(number, tmp_path):
    command = [sys.executable, "-c", "import sys; from engine.bench.first_light import parent, steps\n"
               "hang = steps.Step(0, 10**4, 'hangs', ('hang',))\n"
               "from pathlib import Path\n"
               "parent.run(parent.Run(Path(sys.argv[1]), 80_000, (hang,)), (hang,), print)", str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: rows_of(tmp_path) or child.poll() is not None)
    below = psutil.Process(child.pid).children()
    child.send_signal(number)
    assert child.wait() != 0 and len(below) == 1
    wait_for(lambda: not below[0].is_running() or below[0].status() == psutil.STATUS_ZOMBIE)
    assert rows_of(tmp_path)[-1]["outcome"] == "stopped by hand" and (tmp_path / "table.txt").is_file()


def test_without_a_card_one_sentence(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this computer has a card")
    assert main(["gpu", "first-light", "--out", str(tmp_path)]) == 3
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].endswith("choose the processor.") and [row["step"] for row in rows_of(tmp_path)] == [0, 0]


def test_a_first_step_that_fails_ends_the_run(tmp_path):
    bad = (Step(0, 60, "fails", ("fail",)), Step(1, 60, "works", ("work",)))
    with pytest.raises(MachineError, match="first step failed"):
        parent.run(parent.Run(tmp_path, 100, bad), bad, print)
    assert {row.get("step") for row in rows_of(tmp_path)} == {0}


def test_the_limits_fit_nine_minutes():
    assert [step.number for step in STEPS] == list(range(11)) and sum(step.seconds for step in STEPS) == 540
    assert [step.number for step in FAKES] == list(range(len(FAKES)))


@pytest.mark.parametrize("given, sentence", [
    ([], "--out DIR"), (["--out", "OUT", "--steps", "2;3"], "commas"),
    (["--out", "OUT", "--steps", "77"], "no step 77"), (["--out", "OUT", "--seconds", "5"], "at least 20"),
    (["--out", "FILE"], "cannot be written"), (["--out", "FULL"], "is full")])
def test_what_cannot_be_run_is_one_sentence(given, sentence, tmp_path, capsys):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FULL").mkdir()
    for i in range(6):
        (tmp_path / "FULL" / str(i)).write_text("")
    given = [str(tmp_path / word) if word.isupper() else word for word in given]
    assert main(["gpu", "first-light", "--fake", *given]) == 2
    assert sentence in capsys.readouterr().err


def test_a_full_folder_takes_nothing_more(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"x" * MOST_BYTES)
    with pytest.raises(UserError, match="16 MB"):
        Record(tmp_path)


def test_lines_that_are_rows():
    assert row_in(b'{"a": 1}') == {"a": 1} and row_in(b'{"a": "\xc3\xa4"}') == {"a": "ä"}
    for line in (b"", b"[1]", b'{"a": NaN}', b'{"a": 1', b'{"a":' * 10**5, b'{"a": "\xff"}', b'warning {"a": 1}'):
        assert row_in(line) is None


def test_a_record_that_was_cut_off_keeps_its_whole_rows(tmp_path):
    record = Record(tmp_path)
    record.row({"step": 1})
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "fi')
    assert [row["step"] for row in rows_of(tmp_path)] == [1] and rows_of(tmp_path / "none") == []


@pytest.mark.parametrize("finding, verdict", [
    (Finding("x", True), "works"), (Finding("x", False, 5.0, at_least=9), "wrong"),
    (Finding("x", True, 5.0, at_least=9), "slow"), (Finding("x", True, 5.0, at_most=4), "slow"),
    (Finding("x", True, 5.0, at_least=4, at_most=9), "works"), (Finding("x", True, None, at_least=4), "works")])
def test_verdicts(finding, verdict):
    row = finding.row() | {"step": 1}
    assert row["verdict"] == verdict and json.loads(json.dumps(row, allow_nan=False)) == row
    assert findings.table([row], [Step(1, 5, "a step", ("x",))])[-1].startswith(verdict)


def test_the_parent_loads_no_torch():
    code = ("import sys; from engine.bench.first_light import parent, bad_day, child; import engine.cli.measure.gpu; "
            "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers', 'psutil')))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_part_has_its_child():
    assert {name for step in FAKES for name in step.parts} == set(bad_day.PARTS)
    assert {name for step in STEPS for name in step.parts} == set(child.PARTS)
    assert all(callable(child._part(name)) for name in child.PARTS)
    assert steps.chosen(STEPS, [3, 2]) == [STEPS[2], STEPS[3]] and steps.chosen(STEPS, None) == list(STEPS)


def test_every_module_imports_and_one_that_does_not_is_named(monkeypatch):
    row, = machine.imports()
    assert row["verdict"] == "works" and row["figure"] > 100
    monkeypatch.setattr(machine, "_modules", lambda: ["engine.core", "engine.nothing"])
    row, = machine.imports()
    assert row["verdict"] == "wrong" and row["case"] == "engine.nothing" and "ModuleNotFoundError" in row["note"]


def test_the_drivers_card_is_held_against_torchs():
    gpu = Gpu("NVIDIA A", "9.0", 80 * GIB, 79 * GIB, 5, 16, 5, 16, "580")
    seen = Hardware((gpu,), 1, 1, 1, 1)
    same, link = machine.same_card(seen, "NVIDIA A", 79 * GIB)
    assert (same["verdict"], link["verdict"]) == ("works", "works") and link["figure"] > 50
    assert next(machine.same_card(seen, "NVIDIA B", 79 * GIB))["verdict"] == "wrong"
    assert next(machine.same_card(seen, "NVIDIA A", 40 * GIB))["verdict"] == "wrong"
    row, = machine.same_card(Hardware((), 1, 1, 1, 1, ("No driver.",)), "NVIDIA A", 1)
    assert row["verdict"] == "wrong" and row["note"] == "No driver."
    assert machine.versions()["psutil"] and set(machine.versions()) == set(machine.PACKAGES)
