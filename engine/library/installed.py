"""Models in the data folder: what is there, whole or unfinished, and how one is removed.

A download is made in `NAME.partial` and renamed when it is whole, so a folder with a model's name is never half of one.
`floe.source.json` in both says where it came from; it is what an interrupted download goes on with. Loads no torch.
"""
from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.core import MachineError, UserError
from engine.disk import read_json
from engine.files.manifest import Manifest, is_compressed
from engine.library.hub import RemoteFile
from engine.paths import models_dir, models_dirs

PARTIAL = ".partial"
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
        path = folder / SOURCE
        temporary = path.with_name(SOURCE + ".part")
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(temporary, path)

    @staticmethod
    def load(folder: Path) -> Source | None:
        """None where there is none that can be read."""
        try:
            raw = read_json(folder / SOURCE)
            return Source(files=tuple(RemoteFile(**file) for file in raw.pop("files")), **raw)
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None


@dataclass(frozen=True)
class Installed:
    """One model of the data folder. kind: compressed, checkpoint or unfinished; bytes: on disk; levels: measured.

    share: how much of an unfinished download is there, 0 to 1. source: repository, "" where it is not known.
    """

    name: str
    folder: Path
    kind: str
    bytes: int
    levels: tuple[str, ...] = ()
    share: float = 1.0
    source: str = ""


def models(data: str | Path | None = None) -> list[Installed]:
    """What the folders for models hold, by name; of two with one name that in the first."""
    there = [path for folder in reversed(models_dirs(data)) if folder.is_dir() for path in folder.iterdir()]
    folders = {path.name: path for path in there}
    return [found for _, path in sorted(folders.items()) if (found := _installed(path))]


def delete(name: str, data: str | Path | None = None) -> int:
    """Remove a model and what an unfinished download of it has left; -> bytes freed. UserError if there is none."""
    dest = place_of(_plain(name), data)
    folders = [folder for folder in (dest, partial(dest)) if folder.is_dir()]
    if not folders:
        known = ", ".join(model.name for model in models(data)) or "none yet"
        raise UserError(f"There is no model {name!r} in the data folder; there are: {known}.")
    with only_one(dest):
        freed = sum(map(size_of, folders))
        for folder in folders:
            _remove(folder)
    return freed


def place_of(name: str, data: str | Path | None = None) -> Path:
    """Where the model `name` is, whole or begun, or else is to be made."""
    places = [folder / name for folder in models_dirs(data)]
    begun = [place for place in places if place.exists() or partial(place).exists()]
    return begun[0] if begun else models_dir(data) / name


def partial(dest: Path) -> Path:
    """Where an unfinished `dest` is made."""
    return dest.with_name(dest.name + PARTIAL)


def partial_share(work: Path) -> Path:
    """Where a download that deletes as it goes notes how far it is, 0 to 1."""
    return work / "floe.share"


def size_of(folder: Path) -> int:
    """Bytes of all files below, but our own notes, whose names begin with a dot, and what vanishes meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and path.name[0] != "." else 0
        except OSError:
            continue
    return total


@contextmanager
def only_one(dest: Path) -> Iterator[None]:
    """One download or removal of a model at a time, over all processes. UserError for the second."""
    path = dest.with_name(f".{dest.name}.lock")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise UserError(f"{dest.parent} cannot be written to ({error.strerror}); choose another folder.") from error
    with lock:
        try:
            _lock(lock)
            if os.fstat(lock.fileno()).st_ino != path.stat().st_ino:     # removed by the one who has just finished
                raise OSError
        except OSError as error:
            raise UserError(f"{dest.name} is being downloaded or removed already; wait for that or stop it.") from error
        try:
            yield
        finally:
            if sys.platform != "win32":         # an open file cannot be removed there; it is empty
                path.unlink(missing_ok=True)


def _lock(file) -> None:
    if sys.platform == "win32":
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _plain(name: str) -> str:
    """A name that stays inside the folder of models."""
    if not name or Path(name).name != name or name in (".", "..") or set(name) & set('\\/:*?"<>|\0'):
        raise UserError(f"{name!r} is not the name of a model in the data folder.")
    return name.removesuffix(PARTIAL)


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
    except (OSError, ValueError, TypeError):
        return 0.0


def _levels(folder: Path) -> tuple[str, ...]:
    try:
        return Manifest.load(folder).levels
    except UserError:  # opening it says what is wrong
        return ("exact",)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise MachineError(f"{folder} cannot be removed ({error.strerror}); close what uses it and try "
                           "again.") from error
