"""Long work on models: downloads, compressions, imports, measuring levels. Each in a thread of its own that survives
closed tabs.

Pausing keeps what is there and starting again goes on; cancelling is pausing and then deleting, which is the shelf's.
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from app.strings import TEXT
from engine import MachineError, Progress, Stopped, UserError

KINDS = ("download", "compress", "import", "measure")
Report = Callable[[Progress], None]
Run = Callable[[Report, threading.Event], object]


@dataclass
class Work:
    """state: running, paused or failed. Finished work is no longer here: its result is a model on the disk.

    run: does it; called again it goes on.
    """

    name: str
    kind: str
    run: Run
    state: str = "running"
    text: str = ""
    progress: Progress | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def shown(self) -> dict:
        numbers = {"done": 0, "total": 0, "speed": 0.0, "left": None}
        if self.progress:
            numbers = {"done": self.progress.done_bytes, "total": self.progress.total_bytes,
                       "speed": self.progress.bytes_per_second, "left": self.progress.seconds_left}
        return {"name": self.name, "kind": self.kind, "state": self.state, "text": self.text} | numbers


class Works:
    """All work under way, by the name of its model. `on_change` may be called from any thread."""

    def __init__(self, on_change: Callable[[], None]):
        self.on_change = on_change
        self._works: dict[str, Work] = {}
        self._lock = threading.Lock()
        self.finished: list[dict] = []  # {"name", "kind"} of all since the program was started, in order

    def shown(self) -> list[dict]:
        with self._lock:
            return [work.shown() for work in self._works.values()]

    def start(self, name: str, kind: str, run: Run) -> None:
        """Begin, or begin again. UserError while it is running."""
        with self._lock:
            if name in self._works and self._works[name].state == "running":
                raise UserError(TEXT["already_working"].format(name=name))
            work = self._works[name] = Work(name, kind, run)
        threading.Thread(target=self._run, args=(work,), name=f"{kind} {name}", daemon=True).start()
        self.on_change()

    def go_on(self, name: str) -> bool:
        """Start paused or failed work again; False if there is none of that name."""
        with self._lock:
            work = self._works.get(name)
        if work:
            self.start(name, work.kind, work.run)
        return work is not None

    def pause(self, name: str, seconds: float = 30) -> None:
        """Stop it and wait for its end; what has been made stays. UserError when it has not ended in time."""
        with self._lock:
            work = self._works.get(name)
        if work:
            work.stop.set()
            if not work.ended.wait(seconds):
                raise UserError(TEXT["still_stopping"].format(name=name))

    def forget(self, name: str) -> None:
        with self._lock:
            self._works.pop(name, None)

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
                self.finished.append({"name": work.name, "kind": work.kind})
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
