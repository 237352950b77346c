"""One running Floe Chat per folder: a lock that dies with its holders, and the output that says where the page is.

The launcher takes the lock and hands it on to the program it starts, so the lock is held as long as either lives,
whatever was killed. The program writes its link, and the next one when a link was used, into a file that only this user
can read; who finds the lock taken looks there and shows the page that is already up.
"""
from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from pathlib import Path

from installer.screen import Screen, Trouble

LINK = re.compile(rb"http://127\.0\.0\.1:(\d+)/\?t=[\w-]+")
ENDED = (0, -signal.SIGINT, -signal.SIGTERM, 130, 143)  # by the user
START_SECONDS = 300  # the first start compiles every module; a slow disk needs minutes


class Lock:
    """`taken` says whether this process got it; open until the process ends."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.taken = self.take()

    def take(self) -> bool:
        """Try (again) to get the lock."""
        try:
            if sys.platform == "win32":
                import msvcrt
                msvcrt.locking(self._file, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        self.taken = True
        return True

    def for_child(self) -> dict:
        """Arguments for Popen that let the child hold the lock too (on Windows a closed window ends both)."""
        return {} if sys.platform == "win32" else {"pass_fds": (self._file,)}

    def release(self) -> None:
        os.close(self._file)


def show_running(app: Path, lock: Lock, screen: Screen, browser: bool) -> bool:
    """Wait for the page of the instance that holds the lock and open it; False if the lock came free instead."""
    screen.say("Floe Chat is already running or being installed; waiting for its page ...")
    while True:
        link = running(app)
        if link:
            announce(link, app, screen, browser)
            return True
        if lock.take():
            return False
        time.sleep(0.3)


def running(app: Path) -> str | None:
    """The newest link of the page that answers, if there is one."""
    try:
        found = [*LINK.finditer(_output(app).read_bytes())]
    except OSError:
        return None
    return found[-1][0].decode() if found and _answers(int(found[-1][1])) else None


def forget(app: Path) -> None:
    """What an earlier instance wrote is no longer true. For the holder of the lock."""
    _output(app).unlink(missing_ok=True)


def run(command: list[str], app: Path, lock: Lock, screen: Screen, browser: bool, **options) -> int:
    """Start the program, show its page once the port answers, stay until it ends; its exit code, or Trouble."""
    with open(os.open(_output(app), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   **lock.for_child(), **options)
    try:
        announce(_wait_for_link(process, app), app, screen, browser)
        screen.say("Close this window or press Ctrl+C to end Floe Chat.")
        code = process.wait()
        if code not in ENDED:
            raise Trouble(f"Floe Chat ended unexpectedly: {_last_words(_output(app).read_bytes())}")
        return 0
    except KeyboardInterrupt:
        screen.say("Ending Floe Chat ...")
        return 0
    finally:
        if process.poll() is None:
            _end(process)


def announce(link: str, app: Path, screen: Screen, browser: bool) -> None:
    """Open the browser on the page, or say where it is. The link opens the page: it is not for the log, nor for `ps`,
    which shows everybody what a browser was started with, so a file that only this user can read leads there."""
    print(f"Floe Chat is at {link}", flush=True)
    screen.log("the page answers")
    if not browser:
        return
    if sys.platform.startswith("linux") and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))):
        return screen.say("There is no screen here: copy the link into a browser on this computer.")
    leads_there = app / "logs" / "open.html"
    leads_there.unlink(missing_ok=True)
    with open(os.open(leads_there, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={link}">')
    opening = threading.Thread(target=webbrowser.open, args=(leads_there.as_uri(),), daemon=True)
    opening.start()  # a thread, because a browser named by BROWSER is waited for
    opening.join(5)


def _wait_for_link(process: subprocess.Popen, app: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        ended = process.poll()
        link = running(app)
        if link:
            return link
        if ended is not None:
            raise Trouble(_last_words(_output(app).read_bytes()), 2 if ended == 2 else 3)
        time.sleep(0.1)
    raise Trouble(f"Floe Chat did not start within {START_SECONDS // 60} minutes. Start it again, then with --repair.")


def _last_words(text: bytes) -> str:
    """The last line that the program wrote: its sentence for the user."""
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "Floe Chat ended before its page was there. Start it with --repair."


def _output(app: Path) -> Path:
    return app / "logs" / "app.log"


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
