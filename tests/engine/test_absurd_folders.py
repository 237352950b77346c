"""Three hundred folders made to hurt, met in one process: a sentence or an answer each, and the good one still answers.

What they are: tests/support/absurd_folders.py.
"""
from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

MOST_SECONDS = 10           # of the processor, for one folder: listed, planned and opened
PATIENCE = 120              # by the clock, on a busy machine
MOST_KILOBYTES = 3_000_000


def rows(process: subprocess.Popen) -> Iterator[dict]:
    """What it says, line by line. queue.Empty when it hangs."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put("")
    threading.Thread(target=read, daemon=True).start()
    while line := lines.get(timeout=PATIENCE):
        yield json.loads(line)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices among files")
def test_a_folder_that_was_made_to_hurt_is_refused_in_words(repository, tmp_path):
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "tests.support.absurd_folders", str(tmp_path)],
                                   cwd=repository, stdout=subprocess.PIPE, stderr=log, text=True)
    case, n, sentences, ended = "the beginning", 0, 0, False
    try:
        for row in rows(process):
            case, ended = row.get("case", case), "end" in row
            if "said" in row:
                n += 1
                sentences += not row["said"].startswith(("answered", "imported"))
                assert "TRACEBACK" not in row["said"], f"{case}: {row['said']}"
                assert row["seconds"] < MOST_SECONDS and row["most_kilobytes"] < MOST_KILOBYTES, f"{case}: {row}"
    except queue.Empty:
        raise AssertionError(f"{case}: no word for {PATIENCE} seconds") from None
    finally:
        process.kill()
        process.wait()
    assert ended, f"it died of {case}"
    assert n >= 300 and sentences > 0.8 * n
