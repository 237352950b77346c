"""The model that is open now: opened in a thread with visible steps, changed between answers, closed when replaced.

The engine (and with it torch) is imported in that thread, so the page answers within seconds of the start. The only
holder of an Engine in the app; everybody else asks here.
"""
from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from app.library.load_progress import Opening
from app.library.machine_status import Surroundings
from app.strings import TEXT
from engine import (
    PRESETS,
    Habits,
    MachineError,
    ModelInfo,
    Options,
    Picks,
    Stopped,
    UserError,
    demo_model,
    look_up,
    plan_for,
    preset_of,
    title_of,
    what_binds,
    why_not,
)

_log = logging.getLogger(__name__)
METER_SECONDS = 5.0  # that counting a conversation may take, for nothing but a meter


class Models:
    """`state` is "loading", "ready" or "failed"; `step` says in words what is happening or what went wrong."""

    def __init__(self, folder: Path, options: Options, around: Surroundings, plan_level: bool = False,
                 on_change: Callable[[], None] = lambda: None, remember: Callable[[dict], None] = lambda opened: None):
        """plan_level: the first model opens at the level that its plan chooses, not at that of the options. remember:
        told what the next start should open: {"folder", "level", "context", "preset"}, nothing while a model is being
        opened."""
        self.folder, self._plan_level, self._remember = folder, plan_level, remember
        self.around = around
        self.options = options
        self.state = "loading"
        self.step = TEXT["step_start"]
        self.refused = ""  # why the last wish for another level or near memory came to nothing
        self.engine = None
        self.on_change = on_change
        self._changed = threading.Condition()
        self._opening: Opening | None = None
        self._opener: threading.Thread | None = None
        self._applier: threading.Thread | None = None
        self._known: ModelInfo | None = None

    def open(self, folder: Path | None = None, level: str = "", context: int | None = None,
             near_bytes: int | None = None, preset: str = "lossless") -> None:
        """Start opening `folder` at `level` in the background; what is open is closed first. Without: as at birth."""
        with self._changed:
            if self._opener and self.state == "loading":  # one at a time: both would be in memory
                raise UserError(TEXT["still_opening"])
            if folder:
                self.folder, self._plan_level = folder, False
                self.options = replace(self.options, level=level, context=context, near_bytes=near_bytes,
                                       policies=PRESETS[preset])
            self._opening = None
            self._tell("loading", TEXT["step_start"])
            self._opener = threading.Thread(target=self._open, name="open-model", daemon=True)
        self._opener.start()

    def wait(self, stop: threading.Event, deadline: float = math.inf):
        """The model, once it is ready; None if `stop` was set first, or the deadline (of time.monotonic()) passed.
        UserError if it could not be opened."""
        with self._changed:
            while self.state == "loading" and not stop.is_set() and time.monotonic() < deadline:
                self._changed.wait(0.1)
            if self.state == "failed":
                raise UserError(self.step)
            return None if stop.is_set() or self.state == "loading" else self.engine

    def used(self, messages: list[dict], wishes: dict) -> int | None:
        """Tokens of a conversation; None where that cannot be known: no model yet, a template that refuses or loops."""
        engine, end = self.engine, time.monotonic() + METER_SECONDS
        if not engine or self.state != "ready":
            return None
        try:
            return engine.count_tokens(messages, wishes, lambda: time.monotonic() > end)
        except (UserError, MachineError, Stopped):
            return None

    def warm(self, picks: Picks) -> None:
        """Bring near what a conversation picks most, while nobody waits; nothing where no model is open."""
        if self.engine and self.state == "ready":
            self.engine.warm(picks)

    def expect(self, draft: str, habits: Habits) -> None:
        """The same for what a person is writing."""
        if self.engine and self.state == "ready":
            self.engine.expect(draft, habits)

    def learn(self, asked: str, picks: Picks, habits: Habits) -> None:
        """What an answer picked becomes a habit."""
        if self.engine and self.state == "ready":
            self.engine.learn(asked, picks, habits)

    def configure(self, **changes) -> None:
        """Another level or near memory: `options` at once, the engine's before its next answer; of several wishes the
        last counts. UserError while no model is open."""
        with self._changed:
            if not self.engine:
                raise UserError(self.step if self.state == "failed" else TEXT["still_opening"])
            self.options, self.refused = replace(self.options, **changes), ""
            if not self._applier:
                self._applier = threading.Thread(target=self._apply, args=(self.engine,), name="options", daemon=True)
                self._applier.start()
        self.on_change()

    def refuse(self, error: UserError | MachineError) -> None:
        """Told by every page."""
        self.refused = str(error)
        self.on_change()

    def levels(self) -> dict[str, float]:
        """Tokens a second that the plan expects here of each level of the open model."""
        known, machine, expected = self._known, self.around.machine, {}
        for level in self.info().get("levels") or () if known and machine else ():
            with suppress(UserError):  # it does not fit
                expected[level] = plan_for(known, machine, level).decode_tokens_per_second
        return expected

    def snapshot(self) -> dict:
        """What the panel draws; the engine's own numbers once there is an engine."""
        state, engine = {"state": self.state, "step": self.step}, self.engine
        if not engine or self.state != "ready":
            return state
        try:
            return state | engine.snapshot()
        except UserError:  # it was closed between the two lines
            return state

    def opening(self) -> dict | None:
        """The steps so far and the time left, while a model is being opened."""
        return self._opening.shown() if self._opening and self.state == "loading" else None

    def opened(self) -> list[str] | None:
        """The steps that opening the model took, once it is open."""
        return [name for name, _ in self._opening.steps] if self._opening and self.state == "ready" else None

    def why_slow(self, snapshot: dict) -> dict | None:
        """What binds the answer of this snapshot: {"bound", "text"}; None while nothing has been measured."""
        machine, known = self.around.machine, self._known
        if machine is None or known is None or "answer" not in snapshot:
            return None
        found = what_binds(known.spec, known.calibration, machine, snapshot)
        return {"bound": found.bound, "text": found.text} if found else None

    @property
    def title(self) -> str:
        """What a person calls it."""
        return shown_title(self.folder)

    @property
    def level(self) -> str:
        """The level that runs; the wished one while nothing is open."""
        return self.snapshot().get("level", self.options.level)

    def info(self) -> dict:
        """The engine's description of the open model; empty while there is none."""
        return dict(self.engine.info) if self.engine and self.state == "ready" else {}

    def close(self) -> None:
        if self.state == "loading":  # ended in order: a model that takes the program down is not tried again
            self._note()
        self._let_go()

    def _let_go(self) -> None:
        with self._changed:
            engine, self.engine, self._applier = self.engine, None, None
        if engine:
            engine.close()

    def _note(self) -> None:
        options = self.options
        self._remember({"folder": str(self.folder), "level": "" if self._plan_level else options.level,
                        "context": options.context, "preset": preset_of(options.policies)})

    def _apply(self, engine) -> None:
        """Bring the engine to the newest wish; it takes one between two answers."""
        while True:
            with self._changed:
                wish = self.options
                if self.engine is not engine or engine.options == wish:
                    if self.engine is engine:
                        self._applier = None
                    return
            try:
                engine.configure(wish)
                self._note()
            except (UserError, MachineError) as error:
                with self._changed:
                    if self.engine is engine and self.options == wish:
                        self.options = engine.options
                self.refuse(error)
            self.on_change()

    def _open(self) -> None:
        self._remember({})
        try:
            self._opening = Opening(self.folder.name, _size(self.folder), self.around.data / "cache" / "openings.json")
            self._let_go()
            self._progress(TEXT["step_import"])
            from engine import Engine
            self._progress(TEXT["step_measure"])
            self.around.measure()
            if self._plan_level:
                self._take_planned_level()
            self._leave_out_what_cannot_be()
            self.engine = Engine.open(self.folder, self.options, progress=self._progress)
            self.options = self.engine.options  # the folder may not offer the wished level
            self._known = look_up(str(self.folder))
            self._opening.finish()
            self._note()
            self._tell("ready", "")
        except (UserError, MachineError) as error:
            self._tell("failed", str(error))
        except MemoryError:
            self._tell("failed", TEXT["out_of_memory"])
        except BaseException as error:  # whoever waits must hear of it, whatever it was
            self._tell("failed", TEXT["open_failed"].format(error=f"{type(error).__name__}: {error}"))
            raise

    def _take_planned_level(self) -> None:
        try:
            made = plan_for(look_up(str(self.folder)), self.around.machine)
        except UserError:
            return  # opening it says what is wrong
        self.options = replace(self.options, level=made.level)

    def _leave_out_what_cannot_be(self) -> None:
        """A preset of the last start does not keep the model shut where a card has come meanwhile, say."""
        options = self.options
        if why_not(preset_of(options.policies), options.level, self.around.machine.device):
            self.options = replace(options, policies="")

    def _progress(self, step: str, share: float = 0.0) -> None:
        self._opening.step(step)
        self._tell("loading", step)

    def _tell(self, state: str, step: str) -> None:
        if state != self.state or state == "failed":
            _log.info("Model %s: %s %s", self.folder.name, state, step)
        with self._changed:
            self.state, self.step = state, step
            self._changed.notify_all()
        self.on_change()


def shown_title(folder: Path) -> str:
    """What the page calls a model everywhere."""
    return TEXT["demo_title"] if folder == demo_model() else title_of(folder.name)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
