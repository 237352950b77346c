"""Models in the data folder: what is there, whole or unfinished, and how one is removed.

A download is made in `NAME.partial` and renamed when it is whole, so a folder with a model's name is never half of one.
`floe.source.json` in both says where it came from; it is what an interrupted download goes on with. Loads no torch.
"""
from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.core import MachineError, UserError
from engine.disk import only_one, read_json, size_of, write_text_atomically
from engine.files.manifest import Manifest, is_compressed
from engine.library.hub import RemoteFile
from engine.paths import PARTIAL, inside, models_dir, models_dirs, typed, unseen

TRASH = ".floechat-trash-"      # a model that is removed is first renamed to this: one step, never half done
SOURCE = "floe.source.json"


@dataclass(frozen=True)
class Source:
    """Where a model comes from. kind: ready, original or gguf; files: what has to be fetched, at one commit."""

    endpoint: str
    repository: str
    commit: str
    kind: str
    files: tuple[RemoteFile, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.endpoint, self.repository, self.commit, self.kind)):
            raise ValueError("no model comes from there")

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def save(self, folder: Path) -> None:
        write_text_atomically(folder / SOURCE, json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(folder: Path) -> Source | None:
        """None where there is none that can be read."""
        try:
            raw = read_json(folder / SOURCE)
            return Source(files=tuple(RemoteFile(**file) for file in raw.pop("files")), **raw)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
            return None


@dataclass(frozen=True)
class Installed:
    """One model of the data folder. kind: compressed, checkpoint or unfinished; bytes: on disk; levels: measured.

    share: how much of an unfinished download is there, 0 to 1. source: repository, "" where it is not known.
    linked: it lies elsewhere, and removing it takes it from the list alone.
    """

    name: str
    folder: Path
    kind: str
    bytes: int
    levels: tuple[str, ...] = ()
    share: float = 1.0
    source: str = ""

    @property
    def linked(self) -> bool:
        return self.folder.is_symlink()


def adopt_model(folder: str | Path, data: str | Path | None = None) -> str:
    """Take a model that lies elsewhere on this computer into the list, under its folder's name; -> that name. Nothing
    is copied. UserError where it is no model, or the system lets nobody make a link."""
    there = typed(folder).absolute()
    if not (there / "config.json").is_file():
        inside_it = sorted(path.parent.name for path in there.glob("*/config.json"))
        better = f"; add one of its folders: {', '.join(inside_it[:10])}" if inside_it else (
            "; give a folder that has a config.json beside its weights, or a .gguf file")
        raise UserError(f"There is no model in {there}{better}.")
    dest = place_of(there.name, data)
    if dest.is_symlink() and not dest.exists():  # of a model that has moved since; the list cannot show it
        dest.unlink()
    if there.parent == dest.parent or os.path.exists(dest) or os.path.exists(unfinished(dest)):
        raise UserError(f"A model named {there.name} is in the list already.")
    try:
        dest.symlink_to(there, target_is_directory=True)
    except OSError as error:
        raise UserError(f"This system lets nobody link to {there} ({error.strerror}); move the folder into "
                        f"{dest.parent}, or choose {there.parent} as the folder for models.") from error
    return there.name


def models(data: str | Path | None = None) -> list[Installed]:
    """What the folders for models hold, by name; of two with one name that in the first. What has a name that nobody
    can write is passed over."""
    there = [path for folder in reversed(models_dirs(data)) for path in _within(folder)]
    folders = {path.name: path for path in there if not (path.name.startswith(".") or unseen(path.name))}
    return [found for _, path in sorted(folders.items()) if (found := _installed(path))]


def delete(name: str, data: str | Path | None = None, unfinished: bool = False) -> int:
    """Remove a model and what an unfinished download of it has left, or that alone; -> bytes freed. UserError if there
    is none. What can be removed is what `models` finds: the name is compared, never made a path."""
    there = models(data)
    chosen = [model for model in there if model.name == name and (model.kind == "unfinished" or not unfinished)]
    if not chosen:
        known = ", ".join(model.name for model in there) or "none yet"
        raise UserError(f"There is no model {name!r} in the data folder; there are: {known}.")
    with claimed(chosen[0].folder.parent / name):
        return sum(map(_throw_away, chosen))


def empty_trash(data: str | Path | None = None) -> None:
    """Remove for good what a program that was killed meanwhile has thrown away."""
    for folder in models_dirs(data):
        for thrown in folder.glob(TRASH + "*"):
            shutil.rmtree(thrown, ignore_errors=True)


def place_of(name: str, data: str | Path | None = None) -> Path:
    """Where the model `name` is, whole or begun, or else is to be made. UserError for a name that none can have."""
    places = [inside(folder, name) for folder in models_dirs(data)]
    begun = [place for place in places if os.path.exists(place) or os.path.exists(unfinished(place))]
    there = [path.name.removesuffix(PARTIAL) for folder in models_dirs(data) for path in folder.glob("*")]
    for twin in there:
        if twin.casefold() == name.casefold() and name not in there:
            raise UserError(f"There is a model {twin} already, which not every disk can tell from {name}; delete it "
                            "first or choose another folder.")
    return begun[0] if begun else models_dir(data) / name


def unfinished(dest: Path) -> Path:
    """Where an unfinished `dest` is made."""
    return dest.parent / (dest.name + PARTIAL)


def is_begun(work: Path) -> bool:
    """Whether a folder is what a download or a compression has begun: it holds a note of ours, or nothing yet."""
    names = [path.name for path in work.glob("*")]
    return not names or any(name.startswith("floe.") for name in names)


def partial_share(work: Path) -> Path:
    """Where a download that deletes as it goes notes how far it is, 0 to 1."""
    return work / "floe.share"


def claimed(dest: Path) -> AbstractContextManager:
    """One download, removal or calibration of a model at a time, over all processes. UserError for the second."""
    return only_one(dest.parent / f".{dest.name}.lock",
                    f"{dest.name} is being downloaded or removed already; wait for that or stop it.")


def _within(folder: Path) -> list[Path]:
    """Nothing of a folder on a disk that is not connected, or that this user may not look into."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _installed(folder: Path) -> Installed | None:
    """None for what is no model, and for what this user may not look into."""
    try:
        return _described(folder) if folder.is_dir() else None
    except OSError:
        return None


def _described(folder: Path) -> Installed | None:
    source = Source.load(folder)
    repository = source.repository if source else ""
    if folder.name.endswith(PARTIAL):
        if not is_begun(folder):
            return None
        here = size_of(folder)
        share = min(max(here / max(1, source.bytes), _noted_share(folder)), 0.999) if source else 0.0
        return Installed(folder.name.removesuffix(PARTIAL), folder, "unfinished", here, (), share, repository)
    if is_compressed(folder):
        return Installed(folder.name, folder, "compressed", size_of(folder), _levels(folder), 1.0, repository)
    if (folder / "config.json").is_file():
        return Installed(folder.name, folder, "checkpoint", size_of(folder), ("full",), 1.0, repository)
    return None


def _noted_share(work: Path) -> float:
    try:
        return float(read_json(partial_share(work)))
    except (OSError, ValueError, TypeError, OverflowError):
        return 0.0


def _levels(folder: Path) -> tuple[str, ...]:
    try:
        return Manifest.load(folder).levels
    except UserError:  # opening it says what is wrong
        return ("exact",)


def _throw_away(model: Installed) -> int:
    """-> bytes freed; what cannot be removed now is removed at the next start."""
    thrown = model.folder.with_name(TRASH + uuid.uuid4().hex)
    try:
        os.replace(model.folder, thrown)
    except FileNotFoundError as error:  # by another window, behind the list that it was chosen from
        raise UserError(f"{model.folder} has been removed already.") from error
    except OSError as error:
        raise MachineError(f"{model.folder} cannot be removed ({error.strerror}); close what uses it and try "
                           "again.") from error
    if thrown.is_symlink():             # what it leads to is not ours
        thrown.unlink()
        return 0
    shutil.rmtree(thrown, ignore_errors=True)
    return 0 if thrown.exists() else model.bytes
