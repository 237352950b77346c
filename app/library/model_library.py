"""The models page: what is on the disk, what could be fetched and how it would run here, work on models that goes on.

Opening a model closes the old one first. Nothing here loads torch.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from app.library.background_tasks import Run, Works
from app.library.folders import as_written, show
from app.library.machine_status import Surroundings
from app.library.open_model import Models
from app.strings import TEXT
from engine import (
    LEVELS,
    ModelInfo,
    UserError,
    calibrate_installed,
    choose_models_dir,
    compress_installed,
    compressed_name,
    delete,
    demo_model,
    download,
    drop_calibration,
    import_file,
    look_up,
    models,
    models_dirs,
    plan_for,
    plan_text,
    recommendations,
    typed,
)

DEMO = "demo"
ENDINGS = {"gguf": (".gguf",), "text": (".txt", ".jsonl", ".xz"), "folder": ()}  # of what a person can name by its path
SUGGESTIONS = 40


class Shelf:
    """Models on disk and on their way. `on_change` may be called from any thread."""

    def __init__(self, opened: Models, around: Surroundings, on_change: Callable[[], None] = lambda: None,
                 keep: Callable[[list[dict]], None] = lambda unfinished: None, unfinished: list = ()):
        """keep, unfinished: see Works."""
        self._opened, self._around, self._data = opened, around, around.data
        self.works = Works(on_change, keep)
        self.works.restore(unfinished, self._run_of)
        self._offered: tuple[object, list[dict]] | None = None

    def shown(self) -> dict:
        """Everything the models page draws."""
        machine, found = self._around.look()
        made = {work["name"] for work in self.works.shown()}  # shown as work, not as a model of the disk as well
        found_models = [model for model in models(self._data) if model.kind != "unfinished" or model.name not in made]
        on_disk = [self._demo(), *map(self._on_disk, found_models)]
        folder = models_dirs(self._data)[0]
        return {"disk": on_disk, "offers": self._offers(machine), "notes": list(found.notes),
                "works": self.works.shown(), "used_bytes": sum(model["bytes"] for model in on_disk[1:]),
                "free_bytes": shutil.disk_usage(folder).free if folder.is_dir() else None,
                "folder": as_written(folder)}

    # --- opening ------------------------------------------------------------------------------------------------
    def open(self, name: str, level: str | None = None, context: int | None = None) -> None:
        """Open a model of the disk by the name that `shown` gives; the old one is closed first. level None: the
        plan's. UserError before anything is closed where level or context cannot be."""
        if self._opened.state == "loading":
            raise UserError(TEXT["still_opening"])
        known = self._known_on_disk(name)
        made = plan_for(known, self._around.look()[0], level, context)
        self._opened.open(known.folder, made.level, context)

    def plan(self, name: str, level: str | None = None, context: int | None = None) -> dict:
        """How a model of the disk or of the catalogue would run at this level and context, in words and numbers;
        verdict "no" and the reason in words where it would not."""
        known = self._known_on_disk(name) if self._folder(name) else self._known_offer(name)
        levels = [row for row in (self._levels(known) or LEVELS) if row in LEVELS]
        shown = {"levels": levels, "longest": known.spec.context, "level": level, "context": context}
        try:
            made = plan_for(known, self._around.look()[0], level, context)
        except UserError as error:
            return shown | {"text": str(error), "verdict": "no"}
        return shown | {"text": plan_text(made), "verdict": made.verdict, "level": made.level, "context": made.context,
                        "tokens_per_second": made.decode_tokens_per_second}

    def _folder(self, name: str) -> Path | None:
        folders = {model.name: model.folder for model in models(self._data) if model.kind != "unfinished"}
        return demo_model() if name == DEMO else folders.get(name)

    def _known_on_disk(self, name: str) -> ModelInfo:
        folder = self._folder(name)
        if folder is None:
            raise UserError(TEXT["no_such_model"].format(name=name))
        return look_up(str(folder))

    def _known_offer(self, name: str) -> ModelInfo:
        if name not in {offer["name"] for offer in self._offers(self._around.look()[0])}:
            raise UserError(TEXT["no_such_model"].format(name=name))
        return look_up(name, self._data)

    def _levels(self, known: ModelInfo) -> tuple[str, ...]:
        """The levels that a folder offers; none for a model that is not here."""
        if known.folder is None:
            return ()
        measured = (level for level in known.calibration.get("levels", {}) if level != "exact")
        return ("exact", *measured) if known.compressed else ("full",)

    # --- work ---------------------------------------------------------------------------------------------------
    def fetch(self, name: str) -> None:
        """Start a download, or go on with one that was stopped. name: of the catalogue, or a Hub id."""
        offers = self._offers(self._around.look()[0])
        known = next((offer["name"] for offer in offers if name in (offer["name"], offer["repository"])), "")
        self._begin(known or name.rsplit("/", 1)[-1], "download", name=name)

    def compress(self, name: str) -> None:
        """Compress a checkpoint of the disk, beside it."""
        self._begin(compressed_name(name), "compress", name=name)

    def bring_in(self, file: str, like: str = "") -> None:
        """Import a GGUF file of this computer. like: where the original's configuration and tokenizer are, "" beside
        the file. UserError when there is no such file."""
        path = _existing(file, "gguf")
        self._begin(path.stem, "import", file=str(path), like=like.strip())

    def measure(self, name: str, text: str = "") -> None:
        """Measure what each level of a compressed model may leave out. text: path of the file to measure on, "" for
        ours. UserError when there is no such file, or no memory for the model beside the one that is open."""
        path = _existing(text, "text") if text.strip() else None
        plan_for(self._known_on_disk(name), self._around.look()[0], "exact")
        self._begin(name, "measure", name=name, text=path and str(path))

    def _begin(self, name: str, kind: str, /, **asked) -> None:
        self.works.start(name, kind, asked, self._run_of(kind, asked))

    def _run_of(self, kind: str, asked: dict) -> Run:
        """What does a work of this kind. KeyError, TypeError for what is none."""
        work = {"download": lambda name, **how: download(name, data=self._data, **how),
                "compress": lambda name, **how: compress_installed(name, self._data, **how),
                "import": lambda file, like, **how: import_file(Path(file), like, self._data, **how),
                "measure": lambda name, text, **how: calibrate_installed(
                    name, self._data, text and Path(text), self._around.device, **how)}[kind]
        return lambda report, stop: work(**asked, report=report, stop=stop)

    def pause(self, name: str) -> None:
        self.works.pause(name)

    def cancel(self, name: str) -> int:
        """Stop work for good: what it has made is deleted; bytes freed."""
        self.works.pause(name)
        unfinished = {model.name for model in models(self._data) if model.kind == "unfinished"}
        freed = delete(name, self._data, unfinished=True) if name in unfinished else 0
        if any(work["name"] == name and work["kind"] == "measure" for work in self.works.shown()):
            drop_calibration(name, self._data)
        self.works.forget(name)
        self.works.on_change()
        return freed

    def remove(self, name: str) -> int:
        """Delete a model, whole or unfinished; bytes freed. Refused for the one that is open."""
        if any(model.name == name and model.folder == self._opened.folder for model in models(self._data)):
            raise UserError(TEXT["model_in_use"].format(name=name))
        if other := self.works.reads(name):
            raise UserError(TEXT["source_in_use"].format(name=name, other=other))
        self.works.pause(name)
        freed = delete(name, self._data)
        self.works.forget(name)
        self.works.on_change()
        return freed

    def show_folder(self, name: str) -> str:
        """Open the model's folder in this computer's file manager; -> its path. UserError with the path without one."""
        return show(self._folder(name) or models_dirs(self._data)[0])

    def keep_in(self, folder: str) -> str:
        """Keep new models in this folder of the computer, "" for our own; -> it. UserError when that cannot be."""
        chosen = choose_models_dir(folder, self._data)
        self._around.look_anew()  # another disk has other room
        self.works.on_change()
        return as_written(chosen)

    def suggest(self, text: str, kind: str = "gguf") -> list[str]:
        """Folders and files of a kind that begin with what was typed of a path; the home folder's for nothing."""
        try:
            start = typed(text) if text.strip() else Path.home()
            folder, stem = (start, "") if text.endswith(("/", "\\")) or not text.strip() else (start.parent, start.name)
            found = [path for path in sorted(folder.iterdir()) if path.name.startswith(stem)
                     and (stem.startswith(".") or not path.name.startswith("."))
                     and (path.suffix in ENDINGS[kind] or path.is_dir())]
        except (OSError, UserError):
            return []
        return [str(path) + (os.sep if path.is_dir() else "") for path in found[:SUGGESTIONS]]

    def close(self) -> None:
        self.works.close()

    # --- what is shown ------------------------------------------------------------------------------------------
    def _offers(self, machine) -> list[dict]:
        """The catalogue on this machine; planned anew when the machine has been looked at anew."""
        if self._offered is None or self._offered[0] is not machine:
            self._offered = machine, [asdict(row) for row in recommendations(machine)]
        return self._offered[1]

    def _on_disk(self, model) -> dict:
        return {"name": model.name, "kind": model.kind, "bytes": model.bytes, "levels": list(model.levels),
                "share": model.share, "open": model.folder == self._opened.folder, "source": model.source,
                "folder": str(model.folder), "read_by": self.works.reads(model.name)}

    def _demo(self) -> dict:
        folder = demo_model()
        size = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
        try:
            levels = self._levels(look_up(str(folder)))
        except UserError:  # opening it says what is wrong
            levels = ()
        return {"name": DEMO, "kind": "demo", "bytes": size, "levels": list(levels),
                "share": 1.0, "open": folder == self._opened.folder, "source": "", "folder": str(folder), "read_by": ""}


def _existing(text: str, kind: str) -> Path:
    """The file of this computer that a person named. UserError when there is none of that kind."""
    path = typed(text.strip())
    if not path.is_absolute() or path.suffix not in ENDINGS[kind] or not path.is_file():
        raise UserError(TEXT[f"no_{kind}"].format(path=text.strip()))
    return path
