"""How the start link reaches the person: printed, and shown to the browser by a file that only this user can read.

`ps` shows everybody on a computer what a browser was started with, so that is a file's name and not the link.
"""
from __future__ import annotations

import os
import threading
import webbrowser
from contextlib import suppress
from html import escape
from pathlib import Path

from app.strings import TEXT


class StartLink:
    """`file` leads to the page from the start until the link is used."""

    def __init__(self, data: Path, browser: bool):
        self.file, self._browser = data / "open.html", browser

    def announce(self, url: str) -> None:
        print(TEXT["ready"].format(url=url), TEXT["loopback"], sep="\n", flush=True)
        if self._browser:
            try:
                self._write(url)
            except OSError:  # a full disk: the printed link leads there as well
                return
            threading.Thread(target=webbrowser.open, args=(self.file.as_uri(),), daemon=True).start()

    def entered(self, url: str) -> None:
        self.forget()
        with suppress(OSError):  # the window that showed it is gone
            print(TEXT["next_link"].format(url=url), flush=True)

    def forget(self) -> None:
        with suppress(OSError):  # Windows: the browser is still reading it
            self.file.unlink(missing_ok=True)

    def _write(self, url: str) -> None:
        self.forget()  # so that it is new, and nobody else's
        with open(os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={escape(url)}">')
