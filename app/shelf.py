"""The models page: what is on the disk, what could be fetched and how it would run here, downloads that go on.

A download runs in a thread of its own and survives closed tabs; pausing keeps what has arrived, starting again goes on.
Opening a model closes the old one first. Nothing here loads torch.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from app.models import Models
from app.strings import TEXT
from engine import MachineError, Progress, Stopped, UserError, delete, demo_model, download, here, models, outlooks

SURVEY_SECONDS = 60.0  # how long a look at the machine is believed


@dataclass
class Download:
    """state: running, paused or failed. A finished download is a model on the disk and no longer here."""

    name: str
    state: str = "running"
    text: str = ""
    progress: Progress | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def shown(self) -> dict:
        numbers = {"done": 0, "total": 0, "speed": 0.0, "left": None}
        if self.progress:
            numbers = {"done": self.progress.done_bytes, "total": self.progress.total_bytes,
                       "speed": self.progress.bytes_per_second, "left": self.progress.seconds_left}
        return {"name": self.name, "state": self.state, "text": self.text} | numbers


class Shelf:
    """Models on disk and on their way. `on_change` may be called from any thread."""

    def __init__(self, data: Path, opened: Models, on_change: Callable[[], None] = lambda: None):
        self.on_change = on_change
        self._data, self._opened = data, opened
        self._downloads: dict[str, Download] = {}
        self._lock = threading.Lock()
        self._survey: tuple[float, list[dict], tuple[str, ...]] | None = None

    def shown(self) -> dict:
        """Everything the models page draws."""
        offers, notes = self._offers()
        on_disk = [self._on_disk(model) for model in models(self._data)]
        return {"disk": [self._demo(), *on_disk], "offers": offers, "notes": list(notes),
                "downloads": self.downloads()}

    def downloads(self) -> list[dict]:
        with self._lock:
            return [download.shown() for download in self._downloads.values()]

    def open(self, name: str) -> None:
        """Open a model of the disk by the name that `shown` gives; the old one is closed first."""
        if self._opened.state == "loading":
            raise UserError(TEXT["still_opening"])
        folders = {model.name: model.folder for model in models(self._data) if model.kind != "unfinished"}
        folder = demo_model() if name == "demo" else folders.get(name)
        if folder is None:
            raise UserError(TEXT["no_such_model"].format(name=name))
        self._opened.open(folder)

    def remove(self, name: str) -> int:
        """Delete a model, whole or unfinished; bytes freed. Refused for the one that is open."""
        if any(model.name == name and model.folder == self._opened.folder for model in models(self._data)):
            raise UserError(TEXT["model_in_use"].format(name=name))
        self.pause(name)
        freed = delete(name, self._data)
        with self._lock:
            self._downloads.pop(name, None)
        self.on_change()
        return freed

    def fetch(self, name: str) -> None:
        """Start a download, or go on with a paused one. name: of the catalogue, or a Hub id."""
        short = name.rsplit("/", 1)[-1]
        with self._lock:
            if short in self._downloads and self._downloads[short].state == "running":
                raise UserError(TEXT["already_downloading"].format(name=short))
            job = self._downloads[short] = Download(short)
        threading.Thread(target=self._run, args=(name, job), name=f"download {short}", daemon=True).start()
        self.on_change()

    def pause(self, name: str) -> None:
        """Stop a download and wait for its end; what has arrived stays."""
        with self._lock:
            job = self._downloads.get(name)
        if job:
            job.stop.set()
            end = time.monotonic() + 30
            while job.state == "running" and time.monotonic() < end:
                time.sleep(0.05)

    def close(self) -> None:
        for job in list(self._downloads.values()):
            job.stop.set()

    def _run(self, name: str, job: Download) -> None:
        def tell(progress: Progress) -> None:
            job.progress, job.text = progress, progress.text or job.text
            self.on_change()

        try:
            download(name, data=self._data, report=tell, stop=job.stop)
            with self._lock:
                self._downloads.pop(job.name, None)
        except Stopped:
            job.state = "paused"
        except (UserError, MachineError) as error:
            job.state, job.text = "failed", str(error)
        except Exception as error:  # the page must say it, whatever it was
            job.state, job.text = "failed", f"{type(error).__name__}: {error}"
        self.on_change()

    def _offers(self) -> tuple[list[dict], tuple[str, ...]]:
        if self._survey is None or time.monotonic() - self._survey[0] > SURVEY_SECONDS:
            machine, notes = here(self._data, self._opened.options.device)
            self._survey = time.monotonic(), [asdict(row) for row in outlooks(machine)], notes
        return self._survey[1:]

    def _on_disk(self, model) -> dict:
        return {"name": model.name, "kind": model.kind, "bytes": model.bytes, "levels": list(model.levels),
                "share": model.share, "open": model.folder == self._opened.folder}

    def _demo(self) -> dict:
        folder = demo_model()
        size = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
        return {"name": "demo", "kind": "demo", "bytes": size, "levels": [], "share": 1.0,
                "open": folder == self._opened.folder}
