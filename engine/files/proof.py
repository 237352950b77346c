"""Proof that a compressed folder is what its manifest says: every file by its sha256, under its own name.

Small files are read at every opening. A large one is read once, while the model is being opened, and noted in
`.floe.proved` with its size, the time of its last change and its inode; as long as these stay it counts as proved.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import Event

from engine.core import UserError
from engine.disk import read_json, write_text_atomically
from engine.files.manifest import CHANGEABLE, CONFIG, COPIED, FileEntry, Manifest, is_compressed

NOTES = ".floe.proved"
SMALL = 1 << 24  # bytes
THREADS = 4      # that read at a time
_around: ContextVar[Path | None] = ContextVar("the folder that is being proved", default=None)


@contextmanager
def proving(folder: Path, report: Callable[[str, float], None] = lambda text, share: None) -> Iterator[list[str]]:
    """Around everything that reads the folder: small files are proved before the block, large ones beside it, and all
    are when it has ended. -> sentences about files that a person may have changed. UserError for damage; nothing to do
    for a folder that is no compressed one, nor inside another proof of the same."""
    if not is_compressed(folder) or _around.get() == folder:
        yield []
        return
    token = _around.set(folder)
    try:
        manifest = Manifest.load(folder)
        manifest.check_sizes(folder)
        notes = _changed(folder, manifest)
        with _reading(folder, manifest, report):
            yield notes
    finally:
        _around.reset(token)


def _changed(folder: Path, manifest: Manifest) -> list[str]:
    """Small files now; -> a sentence for each that a person may have changed."""
    listed = {entry.path: entry.sha256 for entry in manifest.files}
    small = {entry.path for entry in manifest.files if entry.bytes < SMALL}
    if manifest.format_version > 1:  # also what has been added
        small |= {name for name in (CONFIG, *COPIED) if (folder / name).exists() or name in listed}
    changed = [name for name in sorted(small) if _digest(folder / name) != listed.get(name)]
    for name in changed:
        if name not in CHANGEABLE:
            raise _damaged(folder / name)
    return [f"{name} is not the one that this model was made with; if you have not changed it, get the model again."
            for name in changed]


@contextmanager
def _reading(folder: Path, manifest: Manifest, report: Callable[[str, float], None]) -> Iterator[None]:
    """Large files, beside the block."""
    notes, stop = _notes(folder), Event()
    found = {entry: _identity(folder / entry.path) + [entry.sha256] for entry in manifest.files if entry.bytes >= SMALL}
    unread = [entry for entry in found if notes.get(entry.path) != found[entry]]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="proof") as pool:
        futures = {pool.submit(_digest, folder / entry.path, stop): entry for entry in unread}
        try:
            yield
            _compare(folder, futures, report)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    if unread:
        _note(folder, {entry.path: identity for entry, identity in found.items()})


def _compare(folder: Path, futures: dict[Future, FileEntry], report: Callable[[str, float], None]) -> None:
    for n, future in enumerate(as_completed(futures)):
        report("Checking every file, this once", 0.9 + 0.05 * n / len(futures))
        if future.result() != futures[future].sha256:
            raise _damaged(folder / futures[future].path)


def _digest(path: Path, stop: Event | None = None) -> str | None:
    """None for a file that is not there, or after a stop."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(1 << 22):
                if stop is not None and stop.is_set():
                    return None
                digest.update(chunk)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the disk, or get the model again.") from error
    return digest.hexdigest()


def _identity(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]


def _notes(folder: Path) -> dict:
    try:
        return dict(read_json(folder / NOTES))
    except (OSError, ValueError, TypeError):
        return {}


def _note(folder: Path, found: dict[str, list]) -> None:
    try:
        write_text_atomically(folder / NOTES, json.dumps(found))
    except Exception:  # a folder that cannot be written to is read again at its next opening
        pass


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged (it is not the file that the model was made with); download or compress the "
                     "model again.")
