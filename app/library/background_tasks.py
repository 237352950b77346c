"""Long work on models: downloads, compressions, imports, measuring levels. Each in a thread of its own that survives
closed tabs.

Pausing keeps what is there and starting again goes on; cancelling is pausing and then deleting, which is the shelf's.
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from app.strings import TEXT
from engine import MachineError, Progress, Stopped, UserError, title_of

Report = Callable[[Progress], None]
Run = Callable[[Report, threading.Event], object]


@dataclass
class Work:
    """state: running, paused or failed. Finished work is no longer here: its result is a model on the disk.

    asked: what `run` was made of, so that the next start can make it again. run: does it; called again it goes on.
    """

    name: str
    kind: str
    asked: dict
    run: Run
    state: str = "running"
    text: str = ""
    progress: Progress | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def shown(self) -> dict:
        numbers = {"done": 0, "total": 0, "speed": 0.0, "left": None}
        if self.progress:
            numbers = {"done": self.progress.done_bytes, "total": self.progress.total_bytes,
                       "speed": self.progress.bytes_per_second, "left": self.progress.seconds_left}
        return {"name": self.name, "title": title_of(self.name), "kind": self.kind, "state": self.state,
                "text": self.text} | numbers


class Works:
    """All work under way, by the name of its model. `on_change` may be called from any thread.

    keep: told what is not finished, [{"name", "kind", "asked"}], whenever that changes; `restore` takes it at a start.
    """

    def __init__(self, on_change: Callable[[], None], keep: Callable[[list[dict]], None] = lambda unfinished: None):
        self.on_change, self._keep = on_change, keep
        self._works: dict[str, Work] = {}
        self._lock = threading.Lock()
        self.finished: list[dict] = []  # {"name", "title", "kind"} of all since the program was started, in order

    def shown(self) -> list[dict]:
        with self._lock:
            return [work.shown() for work in self._works.values()]

    def start(self, name: str, kind: str, asked: dict, run: Run) -> None:
        """Begin, or begin again. UserError while it is running."""
        with self._lock:
            if name in self._works and self._works[name].state == "running":
                raise UserError(TEXT["already_working"].format(name=title_of(name)))
            work = self._works[name] = Work(name, kind, asked, run)
            self._note()
        threading.Thread(target=self._run, args=(work,), name=f"{kind} {name}", daemon=True).start()
        self.on_change()

    def restore(self, unfinished: list, run_of: Callable[[str, dict], Run]) -> None:
        """Paused work that an earlier start has begun. unfinished: a stored document, which may hold anything."""
        for found in unfinished:
            with suppress(LookupError, TypeError):
                name, kind, asked = str(found["name"]), found["kind"], dict(found["asked"])
                work = Work(name, kind, asked, run_of(kind, asked), "paused", TEXT["work_begun"])
                work.ended.set()
                self._works[name] = work

    def reads(self, name: str) -> str:
        """The running work that is made of the model `name`; "" for none."""
        with self._lock:
            return next((work.name for work in self._works.values()
                         if work.state == "running" and work.kind != "download" and work.asked.get("name") == name), "")

    def go_on(self, name: str) -> bool:
        """Start paused or failed work again; False if there is none of that name."""
        with self._lock:
            work = self._works.get(name)
        if work:
            self.start(name, work.kind, work.asked, work.run)
        return work is not None

    def pause(self, name: str, seconds: float = 30) -> None:
        """Stop it and wait for its end; what has been made stays. UserError when it has not ended in time."""
        with self._lock:
            work = self._works.get(name)
        if work:
            work.stop.set()
            if not work.ended.wait(seconds):
                raise UserError(TEXT["still_stopping"].format(name=title_of(name)))

    def forget(self, name: str) -> None:
        with self._lock:
            self._works.pop(name, None)
            self._note()

    def _note(self) -> None:
        self._keep([{"name": work.name, "kind": work.kind, "asked": work.asked} for work in self._works.values()])

    def close(self) -> None:
        for work in list(self._works.values()):
            work.stop.set()

    def _run(self, work: Work) -> None:
        def tell(progress: Progress) -> None:
            work.progress, work.text = progress, progress.text or work.text
            self.on_change()

        try:
            work.run(tell, work.stop)
            with self._lock:
                self._works.pop(work.name, None)
                self._note()
                self.finished.append({"name": work.name, "title": title_of(work.name), "kind": work.kind})
        except Stopped:
            work.state = "paused"
        except (UserError, MachineError) as error:
            work.state, work.text = "failed", str(error)
        except MemoryError:
            work.state, work.text = "failed", TEXT["out_of_memory"]
        except BaseException as error:  # the page must say it, whatever it was
            work.state, work.text = "failed", f"{type(error).__name__}: {error}"
        finally:
            work.ended.set()
        self.on_change()
