"""Uninstalling: the environment, Python, caches and logs, the shortcut and the remembered choice; chats only if asked.

The program's own folder is left to the user to delete: a script on Windows cannot delete the folder it runs from.
"""
from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

from installer import places
from installer.instance import Lock
from installer.screen import Screen, Trouble


def uninstall(app: Path, lock: Lock, screen: Screen) -> int:
    """Remove everything that starting has made. Keeps chats and models unless the user says "delete" in a terminal."""
    if not lock.taken:
        raise Trouble("Floe Chat is running. Close it first, then uninstall.", 2)
    data = places.data_folder(None)
    elsewhere = _models_elsewhere(data)  # before its list is deleted
    if data.exists() and _wants_deletion(data):
        shutil.rmtree(data, onerror=_writable)
        print(f"Deleted {data}.")
    elif data.exists():
        print(f"Your chats and models are kept in {data}.")
    for folder in elsewhere:
        print(f"There are models in {folder} as well; delete them yourself if you do not want them.")
    for file in [*places.shortcuts(), places.memory()]:
        file.unlink(missing_ok=True)
    if places.memory().parent.exists() and not any(places.memory().parent.iterdir()):
        places.memory().parent.rmdir()
    for compiled in app.parent.glob("*/**/__pycache__"):
        shutil.rmtree(compiled, ignore_errors=True)
    lock.release()
    shutil.rmtree(app, onerror=_writable)
    print(f"Floe Chat is uninstalled. The folder {app.parent} can be deleted now.")
    return 0


def _models_elsewhere(data: Path) -> list[str]:
    """Folders that were chosen for models (engine/paths.py) and are there; they may hold other things, too."""
    chosen = data / "models-folders"
    lines = chosen.read_text(encoding="utf-8", errors="replace").splitlines() if chosen.is_file() else []
    return [line for line in lines if Path(line) != data / "models" and Path(line).is_dir()]


def _wants_deletion(data: Path) -> bool:
    if not sys.stdin.isatty():
        return False
    print(f"Your chats and models are in {data}.")
    return input('Type "delete" to delete them too, or press Enter to keep them: ') == "delete"


def _writable(function, path: str, error) -> None:
    """Read-only files (as some package archives make them) are made writable and removed again."""
    os.chmod(path, stat.S_IRWXU)
    function(path)
