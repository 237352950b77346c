"""Folders of this computer as a person meets them: written, and opened in the file manager."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from app.strings import TEXT
from engine import UserError

OPENERS = {"darwin": "open"}  # how a folder is shown to a person; elsewhere xdg-open


def as_written(path: Path) -> str:
    """A path as a person writes it, without the name of their home folder."""
    home = Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else str(path)


def show(folder: Path) -> str:
    """Open it in this computer's file manager; -> its path. UserError with the path where there is none."""
    try:
        if sys.platform == "win32":
            os.startfile(folder)
        else:
            opener = OPENERS.get(sys.platform, "xdg-open")
            subprocess.Popen([opener, str(folder)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        raise UserError(TEXT["no_file_manager"].format(folder=folder)) from error
    return str(folder)
