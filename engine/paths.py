"""Where a user's files live: one data folder with models, chats, logs and cache.

`--data DIR` beats FLOECHAT_HOME beats the platform's own place for user data.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

from engine.spec import UserError


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


def _platform_dir() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "Floe Chat"
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/Floe Chat"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "floechat"


def demo_model() -> Path:
    """The embedded demonstration model, beside the packages."""
    return Path(__file__).resolve().parents[1] / "assets" / "demo"
