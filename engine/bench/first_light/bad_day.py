"""Children of `first-light --fake`: what the real ones do on a bad day. Standard library alone."""
from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from engine.bench.first_light.findings import Finding
from engine.bench.rows import Row


def card() -> Iterator[Row]:
    yield {"measured": "machine", "gpu": "Fake card", "torch": "none", "cuda": "none"}


def work() -> Iterator[Row]:
    yield Finding("a product", True, 3e-4, "of the largest value", case="2048/512").row()
    yield Finding("a product", True, 5e-4, "of the largest value", case="2880/2880").row()
    yield Finding("a product", False, float("nan"), case="4096/14336", note="not numbers").row()
    yield Finding("a copy", True, 12.1, "GB/s", at_least=20).row()
    yield {"measured": "bandwidth", "link_gb_per_second": 12.1}


def fail() -> Iterator[Row]:
    yield Finding("before it failed", True).row()
    raise RuntimeError("This child fails.")


def hang() -> Iterator[Row]:
    """Nothing but the end of the process ends it."""
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    yield Finding("before it hung", True).row()
    time.sleep(10**6)


def crash() -> Iterator[Row]:
    """Reads where nothing is mapped, as a driver that lost its card may."""
    yield Finding("before it crashed", True).row()
    ctypes.string_at(8)


def garbage() -> Iterator[Row]:
    lines = (bytes(range(256)) * 4, b'{"half": ', b'{"a": NaN}', b"[1]", b'{"a":' * 10_000, b"\xff\xfe{}", b"")
    sys.stdout.buffer.write(b"\n".join(lines))
    sys.stdout.flush()
    yield Finding("among garbage", True).row()
    sys.stdout.write('{"cut off')


def endless() -> Iterator[Row]:
    while True:
        sys.stdout.write("x" * 4096)


def endless_errors() -> Iterator[Row]:
    yield Finding("before it said too much", True).row()
    while True:
        sys.stderr.write("an error, and another\n" * 100)


def nothing() -> Iterator[Row]:
    yield from ()


def orphan() -> Iterator[Row]:
    """A process of its own goes on and holds both pipes open."""
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10**6)"])
    yield {"measured": "orphan", "pid": left.pid}


PARTS = {"card": card, "work": work, "fail": fail, "hang": hang, "crash": crash, "garbage": garbage,
         "endless": endless, "endless-errors": endless_errors, "nothing": nothing, "orphan": orphan}


