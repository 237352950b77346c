"""Where a user's files live: one data folder with models, chats, logs and cache; models may be on another disk.

`--data DIR` beats FLOECHAT_HOME beats the platform's own place for user data. Nobody else on this computer may read the
data folder. What a person or a Hub calls a model, or types as a path, becomes a path here and nowhere else: `inside`
for a name, `typed` for a path.
"""
from __future__ import annotations

import os
import sys
import tempfile
import unicodedata
from contextlib import suppress
from pathlib import Path

from engine.core import UserError
from engine.disk import write_text_atomically

CHOSEN = "models-folders"  # in the data folder: where models are kept, a path a line, the one for new models first
CALIBRATION_LOG = ".calibrating.jsonl"  # in a model's folder: what a calibration has measured, until it has ended
PARTIAL = ".partial"
FIRST_LIGHT = "first-light.txt"  # in the cache: where `gpu first-light` last left its rows
OURS = ("models", "logs", "cache", "chats.db", "floechat.", "open.html")  # how all begins that a data folder holds
NAME_BYTES = 200        # a disk takes 255, and `.partial`, `-original` or `.lock` come to a name
PART_BYTES, PATH_BYTES = 255, 4000
UNSEEN = ("Cc", "Cs", "Zl", "Zp")       # control characters, halves of characters, breaks of lines
# Windows keeps these names for devices, whatever ending they have.
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$",
           *(port + n for port in ("com", "lpt") for n in "123456789¹²³")}


def inside(folder: Path, name: str) -> Path:
    """Where the model `name` is, or would be, in `folder`: directly there, by the rules of every system, since a folder
    may move to another one. UserError for what cannot be a model's name."""
    path = folder / name if is_name(name) else folder
    if path.parent != folder or path.name != name:
        raise UserError(f"{_short(name)} cannot be the name of a model: choose one of at most {NAME_BYTES} letters, "
                        "digits and the like, that neither begins nor ends with a dot or a space.")
    return path


def typed(text: str | os.PathLike) -> Path:
    """The path that a person typed, `~` for the home folder. UserError where no disk can have it."""
    text = os.fspath(text)
    try:
        path = Path(text).expanduser()
        longest = max(len(os.fsencode(part)) for part in (*path.parts, ""))
    except (RuntimeError, ValueError) as error:         # no such person; half a character
        raise UserError(f"{_short(text)} is no path on this computer; give a whole one like {Path.home()}.") from error
    if longest > PART_BYTES or len(os.fsencode(path)) > PATH_BYTES or unseen(text):
        raise UserError(f"{_short(text)} is too long for a path or has characters that cannot be seen; choose another.")
    return path


def is_name(name: str) -> bool:
    return not (unseen(name) or name != name.strip(" ") or name.startswith(".") or name.endswith(".")
                or set(name) & set('\\/:*?"<>|') or name.casefold().endswith(PARTIAL)
                or len(name.encode()) > NAME_BYTES or name.partition(".")[0].rstrip().lower() in DEVICES)


def unseen(text: str) -> bool:
    return any(unicodedata.category(letter) in UNSEEN for letter in text)


def _short(text: str) -> str:
    return repr(text if len(text) < 80 else text[:77] + "...")


def data_path(override: str | os.PathLike | None = None) -> Path:
    """Where the data folder is, or would be."""
    return typed(override or os.environ.get("FLOECHAT_HOME") or _platform_dir()).absolute()


def data_dir(override: str | os.PathLike | None = None) -> Path:
    """The data folder, made if missing, with models/, logs/ and cache/ in it. UserError if it cannot be made."""
    folder = data_path(override)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in (folder, *(folder / name for name in ("models", "logs", "cache"))):
            path.mkdir(mode=0o700, exist_ok=True)       # on Windows as well it is then its owner's alone
    except OSError as error:
        raise UserError(f"The data folder {folder} cannot be used ({error.strerror}); make room or choose another "
                        "with --data DIR.") from error
    return folder


def make_private(data: Path) -> None:
    """Take from everybody else the right to read what an earlier version has made in the data folder."""
    there = list(data.iterdir())
    ours = [path for path in there if path.name.startswith(OURS) and not path.is_symlink()]
    below = (path for folder in ours for path in folder.rglob("*") if not path.is_symlink())
    whole = [data] if len(ours) == len(there) else []   # a home folder, say, is not ours to close
    for path in (*whole, *ours, *below):
        with suppress(OSError):         # another's, or gone meanwhile
            if (mode := path.stat().st_mode) & 0o077:
                path.chmod(mode & 0o700)


def models_dirs(data: str | os.PathLike | None = None) -> list[Path]:
    """Where models may be: the folder for new ones, those chosen before it, our own. One may be missing: a disk that is
    not connected."""
    own = data_dir(data) / "models"
    try:
        chosen = [Path(line) for line in (own.parent / CHOSEN).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        chosen = []
    return chosen if own in chosen else [*chosen, own]


def models_dir(data: str | os.PathLike | None = None) -> Path:
    """Where new models are kept. UserError when it is not there."""
    folder = models_dirs(data)[0]
    if not folder.is_dir():
        raise UserError(f"The folder for models {folder} is not there; connect its disk or choose another folder.")
    return folder


def choose_models_dir(folder: str, data: str | os.PathLike | None = None) -> Path:
    """Keep new models in `folder` from now on, "" for the data folder's own; -> it. What is there already stays where
    it is and is found as before. UserError when it cannot be written to."""
    own = data_dir(data) / "models"
    chosen = typed(folder.strip() or own)
    if not chosen.is_absolute():
        raise UserError(f"{folder.strip()} is no whole path; give one like {own}.")
    try:
        chosen.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            pass
    except OSError as error:
        raise UserError(f"Models cannot be kept in {chosen} ({error.strerror}); choose another folder.") from error
    folders = [chosen, *(other for other in models_dirs(data) if other != chosen)]
    write_text_atomically(own.parent / CHOSEN, "\n".join(map(str, folders)))
    return chosen


def _platform_dir() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "Floe Chat"
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/Floe Chat"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "floechat"


def demo_model() -> Path:
    """The embedded demonstration model, beside the packages."""
    return Path(__file__).resolve().parents[1] / "assets" / "demo"
