"""One child of first light: started, read, watched, ended. Standard library alone.

Its lines on standard output that are JSON objects become rows at once; everything else it prints goes to the log.
Whatever it does, `wait` comes back: a child that is late shows where it hangs (faulthandler, on SIGABRT) and is then
killed with all that it started; one that prints without end is killed as soon as it has said too much.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from engine.bench.first_light.record import PART_BYTES, Record, row_in
from engine.bench.rows import Row

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 1 << 16         # bytes read at a time, and the longest row
SHOW_SECONDS, DIE_SECONDS = 2.0, 5.0


class Part:
    """A child at work on one part of a step. known: what each of its rows says as well."""

    def __init__(self, name: str, command: list[str], seconds: float, record: Record, known: Row) -> None:
        self.name, self.seconds, self._record, self._known = name, seconds, record, known
        self._left, self._n_rows, self._why, self._begin = PART_BYTES, 0, "", time.monotonic()
        settings = {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        self._process = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | settings,
                                         start_new_session=True)
        self._readers = [threading.Thread(target=read, args=(pipe,), daemon=True) for read, pipe in (
            (self._read_rows, self._process.stdout), (self._read_log, self._process.stderr))]
        for reader in self._readers:
            reader.start()

    def wait(self) -> Row:
        """-> how it ended, as a row that is kept."""
        try:
            self._process.wait(max(0.0, self._begin + self.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._why = self._why or "timed out"
        self.end()
        for reader in self._readers:
            reader.join(DIE_SECONDS)    # a pipe that somebody else holds open is left alone
        row = self._known | {"part": self.name, **self._outcome(), "n_rows": self._n_rows,
                             "seconds": round(time.monotonic() - self._begin, 2), "limit": round(self.seconds, 1)}
        self._record.row(row)
        return row

    def end(self) -> None:
        """Whatever it is doing, and whatever it has started."""
        if self._process.poll() is None:
            self._signal("SIGABRT")
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(SHOW_SECONDS)
        self._signal("SIGKILL")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DIE_SECONDS)     # a process stuck in the driver cannot even die

    def _signal(self, name: str) -> None:
        """To the child and its children; where there are no such signals, the child alone ends."""
        if not hasattr(os, "killpg"):
            self._process.kill()
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, getattr(signal, name))

    def _outcome(self) -> Row:
        code = self._process.returncode
        if self._why:
            return {"outcome": self._why} | ({"note": "and could not be ended"} if code is None else {})
        if code is not None and code < 0:
            return {"outcome": "crashed", "signal": _name_of(-code)}
        if code:
            return {"outcome": "failed", "exit": code}
        return {"outcome": "ended" if self._n_rows else "said nothing"}

    def _spend(self, n_bytes: int) -> bool:
        """Whether it may say so much more; the first time that it may not, it ends."""
        self._left -= n_bytes
        if min(self._left, self._record.left) >= 0:
            return True
        if not self._why:
            self._why = "said too much"
            self._signal("SIGKILL")
        return False

    def _read_rows(self, pipe) -> None:
        begun = b""
        while data := os.read(pipe.fileno(), CHUNK):
            *lines, begun = (begun + data).split(b"\n")
            if len(begun) > CHUNK:      # no row is so long
                lines, begun = [*lines, begun], b""
            self._take(lines)
        self._take([begun])
        pipe.close()

    def _take(self, lines: list[bytes]) -> None:
        others = []
        for line in lines:
            row = row_in(line)
            if row is None:
                others.append(line)
            elif self._spend(len(line) + 100):
                self._record.row(self._known | {"part": self.name} | row | self._known)
                self._n_rows += 1
        said = b"\n".join(filter(None, others))
        if said and self._spend(len(said)):
            self._record.log(said + b"\n")

    def _read_log(self, pipe) -> None:
        while data := os.read(pipe.fileno(), CHUNK):
            if self._spend(len(data)):
                self._record.log(data)
        pipe.close()


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
