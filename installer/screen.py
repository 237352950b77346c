"""What the person sees: plain sentences in the window, everything else in a log file that errors name.

Knows nothing of what is being installed or started.
"""
from __future__ import annotations

import sys
import time
from pathlib import Path


class Trouble(Exception):
    """Something went wrong that the person can do something about; the text is the sentence that says what.

    code: 2 when what was asked for cannot be, 3 when the computer or the network failed.
    """

    def __init__(self, sentence: str, code: int = 3):
        super().__init__(sentence)
        self.code = code


class Screen:
    """Sentences to the window and to `log`, a file that is opened for every line and so survives a kill."""

    def __init__(self, log: Path):
        self.log_path = log
        self._unfinished = 0  # width of the progress line that the next sentence has to overwrite

    def say(self, sentence: str) -> None:
        self._clear()
        print(sentence, flush=True)
        self.log(sentence)

    def progress(self, text: str) -> None:
        """One line that replaces itself; nothing where the output is not a window."""
        if sys.stdout.isatty():
            text = text[:76]
            print("\r  " + text.ljust(self._unfinished), end="", flush=True)
            self._unfinished = len(text)

    def log(self, text: str) -> None:
        try:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")
        except OSError:
            pass  # a full disk must not hide the sentence that says so

    def fail(self, trouble: Trouble) -> int:
        """Say it, name the log, keep the window open until a key where there is one; returns the exit code."""
        self.say(f"\n{trouble}\nThe log is {self.log_path}")
        if sys.stdin is not None and sys.stdin.isatty():
            input("Press Enter to close this window. ")
        return trouble.code

    def _clear(self) -> None:
        if self._unfinished:
            print("\r" + " " * (self._unfinished + 2) + "\r", end="")
            self._unfinished = 0
