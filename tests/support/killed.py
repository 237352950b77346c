"""Work on models in processes of their own that die by kill -9: forked from one that has imported everything already.

Run as a script it is that process: each line it reads is the arguments of one piece of work; it answers with the
child's pid, and with its exit status when it has ended. A test kills the child, or tells it at which of its changes of
the disk it has to kill itself: a seed then always kills at the same place.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import Event

from engine import calibrate_installed, compress_installed
from engine.library.download import download
from engine.library.hub import Hub
from engine.library.installed import unfinished
from engine.library.transfer import CompressOptions
from kernels.dispatch import compile_all
from tests.support.loopback_hub import LoopbackHub

CHUNK = 64 << 10


class Nursery:
    """Use as a context manager. preload: modules that the work will need."""

    def __init__(self, *preload: str) -> None:
        self.preload = preload

    def __enter__(self) -> Nursery:
        self.process = subprocess.Popen([sys.executable, "-m", "tests.support.killed", *self.preload], text=True,
                                        bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        cwd=Path(__file__).resolve().parents[2])
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def killed_when(self, ready: Callable[[], bool], **arguments) -> bool:
        """Start work, kill -9 when `ready()`; -> whether it was in time. AssertionError if it failed by itself.

        arguments: of a function of WORK, with its name as `work` where that is not "download"; change, kind: at which
        of its changes of the disk, from 1, the work is to kill itself, counting all or those of a kind of CHANGES.
        """
        print(json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}),
              file=self.process.stdin)
        pid = int(self.process.stdout.readline())
        while not ready() and _alive(pid):
            Event().wait(0.001)
        _kill(pid)
        status = int(self.process.stdout.readline())
        assert status in (0, -signal.SIGKILL), f"the work failed by itself: {status}"
        return status != 0

    def killed_often(self, times: int, when: Callable[[], Callable[[], bool]], loopback: LoopbackHub,
                     whole: Callable[[Path], None], folder: Path, **arguments) -> int:
        """Kill so many downloads to `folder`, each at a point of its own that `when` makes. -> how many came to be
        whole in between: those are looked at by `whole` and removed, and the next begins anew."""
        kills = finished = 0
        while kills < times:
            killed = self.killed_when(when(), folder=folder, endpoint=loopback.endpoint, **arguments)
            loopback.settle()
            kills += killed
            assert killed or folder.exists()
            if folder.exists():
                whole(folder)
                finished += 1
                shutil.rmtree(folder)
                shutil.rmtree(unfinished(folder), ignore_errors=True)
        return finished


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def fetch(model: str, folder: str, endpoint: str, source: str | None = None, **choice) -> None:
    download(model, source, folder, hub=Hub(endpoint, chunk_bytes=CHUNK), choice=CompressOptions(**choice))


def compress(name: str, data: str, text: str = "") -> None:
    compress_installed(name, data, CompressOptions(16, "cpu", texts=(Path(text),) if text else ()))


def calibrate(name: str, data: str, text: str) -> None:
    calibrate_installed(name, data, Path(text), "cpu")


WORK = {"download": fetch, "compress": compress, "calibrate": calibrate}
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")     # as sys.audit names them; open: to write


def run(work: str = "download", change: int = 0, kind: str = "", **arguments) -> None:
    if change:
        _die_at(change, (kind,) if kind else CHANGES)
    WORK[work](**arguments)


def _die_at(change: int, kinds: tuple[str, ...]) -> None:
    left = change

    def seen(event: str, details: tuple) -> None:
        nonlocal left
        reading = event == "open" and not (isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR))
        if event in kinds and not reading:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(seen)


def serve() -> None:
    for name in sys.argv[1:]:
        __import__(name)
    compile_all()  # else each child would, and numba opens a file for every function, which is no change of the work's
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            try:
                run(**json.loads(line))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
