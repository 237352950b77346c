"""Where a user's files live: one data folder with models, chats, logs and cache; models may be on another disk.

`--data DIR` beats FLOECHAT_HOME beats the platform's own place for user data.
"""
from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from engine.core import UserError

CHOSEN = "models-folders"  # in the data folder: where models are kept, a path a line, the one for new models first
CALIBRATION_LOG = ".calibrating.jsonl"  # in a model's folder: what a calibration has measured, until it has ended


def data_dir(override: str | os.PathLike | None = None) -> Path:
    """The data folder, made if missing, with models/, logs/ and cache/ in it. UserError if it cannot be made."""
    folder = Path(override or os.environ.get("FLOECHAT_HOME") or _platform_dir()).expanduser().absolute()
    try:
        for name in ("models", "logs", "cache"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The data folder {folder} cannot be used ({error.strerror}); "
                        "choose another with --data DIR.") from error
    return folder


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
    chosen = Path(folder.strip() or own).expanduser()
    if not chosen.is_absolute():
        raise UserError(f"{folder.strip()} is no whole path; give one like {own}.")
    try:
        chosen.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            pass
    except OSError as error:
        raise UserError(f"Models cannot be kept in {chosen} ({error.strerror}); choose another folder.") from error
    folders = [chosen, *(other for other in models_dirs(data) if other != chosen)]
    partial = own.parent / (CHOSEN + ".part")
    partial.write_text("\n".join(map(str, folders)), encoding="utf-8")
    os.replace(partial, own.parent / CHOSEN)
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
