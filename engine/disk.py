"""Files on a disk: ours written whole or not at all, anybody's read within limits. No torch."""
from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

from engine.core import MachineError, UserError

MOST_JSON = 32 << 20  # bytes; the index of the largest checkpoint has a third of that
MOST_TEXT = 16 << 20  # of any other text that a library reads whole


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


def write_text_atomically(path: Path, text: str) -> None:
    """The whole text under its name, or what was there before. MachineError for a full disk."""
    temporary = path.with_name(path.name + ".part")
    with writing(temporary), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class writing:
    """Turns a full or unwritable disk into one sentence, and removes the temporary file after any failure."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            return
        self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"The disk is full: make room on the disk of {self.temporary.parent} and start again; "
                               "finished files are kept.") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{self.temporary.parent} cannot be written to; choose another folder.") from error
        if isinstance(error, OSError):
            raise MachineError(f"{self.temporary} cannot be written ({error.strerror}); check the disk or choose "
                               "another folder.") from error
