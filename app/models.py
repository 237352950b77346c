"""The model that is open now: opened in a thread with visible steps, changed between answers, closed when replaced.

The engine (and with it torch) is imported in that thread, so the page answers within seconds of the start. The only
holder of an Engine in the app; everybody else asks here.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from app.strings import TEXT
from engine import MachineError, Options, UserError


class Models:
    """`state` is "loading", "ready" or "failed"; `step` says in words what is happening or what went wrong."""

    def __init__(self, folder: Path, options: Options, on_change: Callable[[], None] = lambda: None):
        self.folder = folder
        self.options = options
        self.state = "loading"
        self.step = TEXT["step_start"]
        self.engine = None
        self.on_change = on_change
        self._changed = threading.Condition()
        self._started = 0.0

    def open(self, folder: Path | None = None) -> None:
        """Start opening `folder` in the background; what is open is closed first."""
        self.folder = folder or self.folder
        self._tell("loading", TEXT["step_start"])
        self._started = time.monotonic()
        threading.Thread(target=self._open, name="open-model", daemon=True).start()

    def wait(self, stop: threading.Event) -> bool:
        """Wait until the model is ready; False if `stop` was set first. UserError if it could not be opened."""
        with self._changed:
            while self.state == "loading" and not stop.is_set():
                self._changed.wait(0.1)
            if self.state == "failed":
                raise UserError(self.step)
        return not stop.is_set()

    def configure(self, options: Options) -> None:
        """Change level or near memory; takes effect before the next answer."""
        self.engine.configure(options)
        self.options = options
        self.on_change()

    def snapshot(self) -> dict:
        """What the panel draws; the engine's own numbers once there is an engine."""
        state = {"state": self.state, "step": self.step, "loading_seconds": 0.0}
        if self.state == "loading":
            state["loading_seconds"] = time.monotonic() - self._started
        return state | (self.engine.snapshot() if self.engine and self.state == "ready" else {})

    @property
    def level(self) -> str:
        """The level that runs; the wished one while nothing is open."""
        return self.snapshot().get("level", self.options.level)

    def info(self) -> dict:
        """The engine's description of the open model; empty while there is none."""
        return dict(self.engine.info) if self.engine and self.state == "ready" else {}

    def close(self) -> None:
        if self.engine:
            self.engine.close()
            self.engine = None

    def _open(self) -> None:
        try:
            self.close()
            self._tell("loading", TEXT["step_import"])
            from engine import Engine
            self.engine = Engine.open(self.folder, self.options, progress=self._progress)
            self._tell("ready", "")
        except (UserError, MachineError) as error:
            self._tell("failed", str(error))
        except MemoryError:
            self._tell("failed", TEXT["out_of_memory"])
        except Exception as error:
            self._tell("failed", TEXT["open_failed"].format(error=error))
            raise

    def _progress(self, step: str, share: float = 0.0) -> None:
        self._tell("loading", TEXT["step_share"].format(step=step, percent=round(100 * share)))

    def _tell(self, state: str, step: str) -> None:
        with self._changed:
            self.state, self.step = state, step
            self._changed.notify_all()
        self.on_change()
