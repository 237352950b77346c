"""Where the user's chats and models lie, and where the user's choice of that is remembered between releases.

The default is the same as in engine/paths.py, which may not be imported here; a test compares the two.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

from installer.screen import Trouble


def data_folder(wish: str | None) -> Path:
    """--data beats FLOECHAT_HOME beats what --data said last time beats the platform's own place."""
    if wish:
        folder = Path(wish).expanduser().absolute()
        _remember(folder)
        return folder
    if os.environ.get("FLOECHAT_HOME"):
        return Path(os.environ["FLOECHAT_HOME"]).expanduser().absolute()
    remembered = memory()
    if remembered.exists():
        return Path(remembered.read_text(encoding="utf-8").rstrip("\n"))
    return default_data_folder()


def default_data_folder() -> Path:
    """The platform's place for a program's data."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "Floe Chat"
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/Floe Chat"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "floechat"


def memory() -> Path:
    """The file that holds the chosen data folder; outside the program's folder, so that an update finds it."""
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA", Path.home() / "AppData/Roaming")) / "Floe Chat" / "data-folder"
    if sys.platform == "darwin":
        return Path.home() / "Library/Preferences/Floe Chat/data-folder"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "floechat" / "data-folder"


def shortcuts() -> list[Path]:
    """What install_shortcut.sh or make_shortcut.ps1 may have put into the user's menus."""
    if sys.platform == "win32":
        return [memory().parents[1] / "Microsoft/Windows/Start Menu/Programs/Floe Chat.lnk"]
    share = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    return [share / "applications/floechat.desktop"]


def _remember(folder: Path) -> None:
    try:
        memory().parent.mkdir(parents=True, exist_ok=True)
        memory().write_text(f"{folder}\n", encoding="utf-8")
    except OSError as error:
        raise Trouble(f"The choice of the data folder cannot be written to {memory()} ({error.strerror}).") from error
