"""The disk: our files written whole or not at all, anybody's read within limits, one worker on a folder at a time, free
room, and its troubles in words. Knows no models. Loads no torch.
"""
from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.core import MachineError, UserError
from engine.units import size

MOST_JSON = 32 << 20  # bytes; the index of the largest checkpoint has a third of that
MOST_TEXT = 16 << 20  # of any other text that a library reads whole
SPARE_BYTES = 200 * 10**6       # left free on the disk, for the rest of the machine
OF_THE_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT,
                errno.ENAMETOOLONG, errno.EINVAL)
FULL = "The disk is full: make room{where} and start again; what is finished is kept."


def read_json(path: Path, most: int = MOST_JSON):
    """What a JSON file of somebody else holds. OSError or ValueError for everything that is none: a pipe or a device
    in its place, more than `most` bytes, brackets nested by the thousand."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "it is not an ordinary file", str(path))
    if state.st_size > most:
        raise ValueError(f"{state.st_size:,} bytes are more than any such file has")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def ordinary_files(folder: Path) -> None:
    """UserError for what a library would wait for, or choke on, among the folder's files: a pipe, a device, a link that
    leads nowhere, a text of a hundred megabytes. tokenizer.json and the index of a checkpoint have limits of their own.
    """
    for path in sorted(folder.iterdir()):
        try:
            state = path.stat()
        except OSError:
            state = None
        if state is None or not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)):
            raise UserError(f"{path} is not an ordinary file (a pipe, a device, or a link that leads nowhere); remove "
                            "it, or get the model again.")
        text = path.suffix in (".json", ".jinja", ".txt") and not path.name.endswith(("tokenizer.json", "index.json"))
        if text and state.st_size > MOST_TEXT:
            raise UserError(f"{path} has {state.st_size:,} bytes, more than any such file; get the model again.")


def trouble(error: OSError, place: Path) -> UserError | MachineError:
    """What it means that `place` could not be written, in one sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(FULL.format(where=f" on the disk of {place}"))
    if error.errno == errno.EFBIG:
        return MachineError(f"The disk of {place} cannot hold a file of that size; choose a folder on another disk.")
    if error.errno in OF_THE_PLACE:
        return UserError(f"{place} cannot be written to ({error.strerror}); choose another folder.")
    return MachineError(f"{place} cannot be used ({error.strerror or error}); check the disk or choose another folder.")


@contextmanager
def writing(file: Path, keep: bool = False) -> Iterator[None]:
    """Turns trouble with the disk into its sentence; `file`, which is not whole then, goes unless it is to be kept."""
    try:
        yield
    except BaseException as error:
        if not keep:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:      # an answer of a Hub is one without
            raise trouble(error, file.parent) from error
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """The whole text under its name, or what was there before. UserError, MachineError: one sentence."""
    temporary = path.with_name(path.name + ".part")
    with writing(temporary):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def only_one(lock: Path, taken: str) -> Iterator[None]:
    """Holds the file `lock`, over all processes; it is gone afterwards. UserError with the sentence `taken` for a
    second one."""
    from filelock import FileLock, Timeout  # 40 ms, which a line of help need not wait for
    held = FileLock(lock)
    try:
        held.acquire(blocking=False)
    except Timeout as error:
        raise UserError(taken) from error
    except OSError as error:
        raise trouble(error, lock.parent) from error
    try:
        yield
    finally:
        with suppress(OSError):         # before it is let go: whoever waits sees that it has no name any more
            lock.unlink()               # Windows keeps what is open; it is empty
        held.release()


def check_room(folder: Path, n_bytes: int, hint: str = "") -> None:
    """UserError when the disk of `folder` lacks the room for n_bytes more."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if n_bytes > 0 and n_bytes + SPARE_BYTES > free:
        raise UserError(f"The disk of {place} has {size(free)} free, and {size(n_bytes + SPARE_BYTES)} are needed; "
                        f"make room{hint} or choose a folder on another disk.")


def size_of(folder: Path) -> int:
    """Bytes of all files below, but our own notes, whose names begin with a dot, and what vanishes meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):         # unlike rglob it goes on behind a folder that vanishes
        for name in names:
            with suppress(OSError):
                state = os.stat(os.path.join(place, name))
                total += state.st_size if stat.S_ISREG(state.st_mode) and name[0] != "." else 0
    return total
