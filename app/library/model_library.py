"""The models page: what is on the disk, what could be fetched and how it would run here, work on models that goes on.

Opening a model closes the old one first. Nothing here loads torch.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from glob import escape
from pathlib import Path

from app.library.background_tasks import Run, Works
from app.library.fetch_rate import FetchRate
from app.library.folders import as_written, show
from app.library.machine_status import Surroundings
from app.library.open_model import Models, shown_title
from app.library.plans import levels_of, planned
from app.strings import TEXT
from engine import (
    CALIBRATION_TEXT,
    CompressOptions,
    ModelInfo,
    UserError,
    address,
    adopt_model,
    calibrate_installed,
    check_chat_parts,
    choose_models_dir,
    compress_installed,
    compressed_name,
    delete,
    demo_model,
    download,
    drop_calibration,
    examine_repository,
    import_file,
    look_up,
    models,
    models_dirs,
    plan_for,
    recommendations,
    search_hub,
    title_of,
    typed,
    why_not,
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
        self.rate = FetchRate(self._data / "cache" / "downloads.json")
        self.works = Works(on_change, keep)
        self.works.restore(unfinished, self._run_of)
        self._offered: tuple[object, list[dict]] | None = None
        self._examined: dict[str, ModelInfo] = {}

    def shown(self) -> dict:
        """Everything the models page draws."""
        machine, found = self._around.look()
        made = {work["name"] for work in self.works.shown()}  # shown as work, not as a model of the disk as well
        found_models = [model for model in models(self._data) if model.kind != "unfinished" or model.name not in made]
        on_disk = [self._demo(), *map(self._on_disk, found_models)]
        folder = models_dirs(self._data)[0]
        return {"disk": on_disk, "offers": self._offers(machine), "notes": list(found.notes),
                "machine": {"name": machine.name, "vram_free_bytes": machine.vram_free_bytes,
                            "ram_free_bytes": machine.ram_free_bytes, "device": machine.device},
                "fetch_rate": self.rate.bytes_per_second(), "works": self.works.shown(),
                "used_bytes": sum(model["bytes"] for model in on_disk[1:] if not model["linked"]),
                "free_bytes": shutil.disk_usage(folder).free if folder.is_dir() else None,
                "folder": as_written(folder)}

    def titles(self) -> list[dict]:
        """What can be opened: {"name", "title", "open"} of each."""
        return [{"name": name, "title": shown_title(folder), "open": folder == self._opened.folder}
                for name, folder in self._folders().items()]

    # --- opening ------------------------------------------------------------------------------------------------
    def open(self, name: str, level: str | None = None, context: int | None = None,
             near_bytes: int | None = None, preset: str = "lossless") -> None:
        """Open a model of the disk by the name that `shown` gives; the old one is closed first. level, near_bytes None:
        the plan's. preset: of PRESETS. UserError before anything is closed where level, context or preset cannot be."""
        if self._opened.state == "loading":
            raise UserError(TEXT["still_opening"])
        known = self._known_on_disk(name)
        machine = self._around.look()[0]
        made = plan_for(known, machine, level, context, near_bytes)
        if why := why_not(preset, made.level, machine.device):
            raise UserError(why)
        self._opened.open(known.folder, made.level, context, near_bytes, preset)

    def names(self) -> list[str]:
        """Of the models on the disk that can be opened, the one that is open or being opened first."""
        folders, open_one = self._folders(), self._opened.folder
        opened = next((name for name, folder in folders.items() if folder == open_one), open_one.name)
        return [opened, *(name for name in folders if name != opened)]

    def plan(self, name: str, level: str | None = None, context: int | None = None,
             near_bytes: int | None = None) -> dict:
        """How a model of the disk, of the catalogue or of a repository that was looked at would run: see `planned`."""
        folder = self._folder(name)
        known = look_up(str(folder)) if folder else self._known_offer(name)
        return planned(known, self._around, level, context, near_bytes)

    def _folders(self) -> dict[str, Path]:
        """Of every model that can be opened, by its name; the disk is walked once."""
        return {DEMO: demo_model()} | {model.name: model.folder for model in models(self._data)
                                       if model.kind != "unfinished" and model.name != DEMO}

    def _folder(self, name: str) -> Path | None:
        return demo_model() if name == DEMO else self._folders().get(name)

    def _known_on_disk(self, name: str) -> ModelInfo:
        folder = self._folder(name)
        if folder is None:
            raise UserError(TEXT["no_such_model"].format(name=name))
        return look_up(str(folder))

    def _known_offer(self, name: str) -> ModelInfo:
        if name in self._examined:
            return self._examined[name]
        if name not in {offer["name"] for offer in self._offers(self._around.look()[0])}:
            raise UserError(TEXT["no_such_model"].format(name=name))
        return look_up(name, self._data)

    # --- the Hub ------------------------------------------------------------------------------------------------
    def search(self, words: str) -> dict:
        """What a person looks for: {"hits": repositories of these words} or, where it is an address or owner/name of
        one, {"repository": what it holds}. UserError, MachineError: one sentence."""
        if address(words.strip()):
            return {"repository": self.examine(words)}
        return {"hits": [asdict(hit) for hit in search_hub(words, self._data)]}

    def examine(self, text: str) -> dict:
        """What a repository of the Hub holds and how it would run here; asks the network."""
        found = examine_repository(text, self._data)
        shown = {"name": found.repository, "download_bytes": found.download_bytes, "file": found.file,
                 "files": [{"name": name, "bytes": n_bytes} for name, n_bytes in found.files]}
        if found.known is None:
            return shown | {"verdict": "unknown", "missing": found.why}
        try:
            plan = planned(found.known, self._around)
        except UserError as error:
            return shown | {"verdict": "unknown", "missing": str(error)}
        self._examined[found.repository] = found.known
        told = ("verdict", "missing", "tokens_per_second", "disk_bytes")
        return shown | {key: plan[key] for key in told if key in plan}

    # --- work ---------------------------------------------------------------------------------------------------
    def fetch(self, name: str, file: str = "", like: str = "") -> None:
        """Start a download, or go on with one that was stopped. name: of the catalogue, a Hub id or an address of one;
        file: which GGUF of several; like: the original it was made from, "" where its repository says so."""
        found = address(name)
        name, file = (found[0], file or found[1]) if found else (name, file)
        offers = self._offers(self._around.look()[0])
        known = next((offer["name"] for offer in offers if name in (offer["name"], offer["repository"])), "")
        more = {key: value for key, value in (("file", file), ("like", like)) if value}
        self._begin(known or name.rsplit("/", 1)[-1], "download", name=name, **more)

    def add(self, path: str, like: str = "") -> dict:
        """Take in what lies on this computer: a GGUF file, which is imported, or a model's folder, which stays where it
        is. -> {"name", "kind"}. like: see `bring_in`. UserError for anything else."""
        there = typed(path.strip())
        if there.suffix in ENDINGS["gguf"] or not there.is_dir():
            self.bring_in(path, like)
            return {"name": there.stem, "kind": "gguf"}
        name = adopt_model(there, self._data)
        self.works.on_change()
        return {"name": name, "kind": "folder"}

    def where(self, name: str, n_bytes: int) -> str:
        """The path of a file or folder that was dropped on the page, which says its name and size alone; "" where it is
        not in the folders in which models are usually kept. n_bytes 0: of a folder."""
        found = (path for path in _usual_paths(name, self._data) if Path(name).name == name)
        try:
            return next((str(path) for path in found if path.is_file() and path.stat().st_size == n_bytes
                         or not n_bytes and (path / "config.json").is_file()), "")
        except OSError:
            return ""

    def compress(self, name: str, text: str | None = None) -> None:
        """Compress a checkpoint of the disk, beside it. text: path of a file that the codes are to err less on, "" for
        ours, None for none. UserError for a model that nobody could talk to afterwards, or when there is no such
        file."""
        check_chat_parts(self._known_on_disk(name).folder)
        over = {} if text is None else {"text": str(_existing(text, "text") if text.strip() else CALIBRATION_TEXT)}
        self._begin(compressed_name(name), "compress", name=name, **over)

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
        work = {"download": self._download,
                "compress": lambda name, text="", **how: compress_installed(
                    name, self._data, CompressOptions(texts=(Path(text),) if text else ()), **how),
                "import": lambda file, like, **how: import_file(Path(file), like, self._data, **how),
                "measure": lambda name, text, **how: calibrate_installed(
                    name, self._data, text and Path(text), self._around.device, **how)}[kind]
        return lambda report, stop: work(**asked, report=report, stop=stop)

    def _download(self, name: str, report, stop, file: str = "", like: str = ""):
        return self.rate.timed(
            lambda heard: download(name, data=self._data, report=heard, stop=stop, file=file, like=like), report)

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
            raise UserError(TEXT["model_in_use"].format(name=title_of(name)))
        if other := self.works.reads(name):
            raise UserError(TEXT["source_in_use"].format(name=title_of(name), other=title_of(other)))
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
        return {"name": model.name, "title": title_of(model.name), "kind": model.kind, "bytes": model.bytes,
                "levels": list(model.levels), "share": model.share, "open": model.folder == self._opened.folder,
                "source": model.source, "folder": str(model.folder), "read_by": self.works.reads(model.name),
                "linked": model.linked}

    def _demo(self) -> dict:
        folder = demo_model()
        size = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
        try:
            levels = levels_of(look_up(str(folder)))
        except UserError:  # opening it says what is wrong
            levels = ()
        return {"name": DEMO, "title": shown_title(folder), "kind": "demo", "bytes": size, "levels": list(levels),
                "share": 1.0, "open": folder == self._opened.folder, "source": "", "folder": str(folder), "read_by": "",
                "linked": False}


def _usual_paths(name: str, data: Path) -> Iterator[Path]:
    """Where people and other programs keep models, these two by maker and model."""
    home = Path.home()
    for folder in (*models_dirs(data), home / "Downloads", home / "Desktop", home / "models", home):
        yield folder / name
    for folder in (home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"):
        yield from folder.glob(f"*/*/{escape(name)}")


def _existing(text: str, kind: str) -> Path:
    """The file of this computer that a person named. UserError when there is none of that kind."""
    path = typed(text.strip())
    if not path.is_absolute() or path.suffix not in ENDINGS[kind] or not path.is_file():
        raise UserError(TEXT[f"no_{kind}"].format(path=text.strip()))
    return path
