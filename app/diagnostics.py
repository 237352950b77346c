"""What helps somebody else to see what went wrong: a log that turns over, and a zip of facts that names nobody.

The log holds what the program and its libraries say of themselves, never a message of a conversation: of an error its
kind, its first line and the places in the source. The zip is redacted once more when it is made: whoever reads it
learns this computer's hardware and no name, no place of a file, no key.
"""
from __future__ import annotations

import getpass
import io
import json
import logging
import platform
import re
import socket
import traceback
import zipfile
from contextlib import suppress
from copy import copy
from dataclasses import asdict
from logging.handlers import RotatingFileHandler
from pathlib import Path

from app.about import libraries, version_of_program
from app.chat.import_export import export_json
from engine import FIRST_LIGHT, UserError, look_up, plan_for, plan_text

LOG, LOG_BYTES, LOGS = "floechat.log", 1 << 20, 3  # how it is called, how large one gets, how many older ones stay
TAIL_BYTES = 200_000
ROWS_BYTES = 200_000
LINE_CHARACTERS = 300  # of an error's own words
_SECRETS = re.compile(r"\b(?:hf|sk|ghp|xox[a-z])[-_][\w-]{8,}|(?i:bearer)\s+[^\s,;]+|(?<=[?&]t=)[\w-]+|[\w-]{40,}")
_log = logging.getLogger(__name__)


class _Lines(logging.Formatter):
    """Of an error no more than its kind, its first line and where it happened: values may be somebody's words."""

    def format(self, record: logging.LogRecord) -> str:
        own = copy(record)
        own.exc_text = None  # another handler's, in full
        return super().format(own)

    def formatException(self, given) -> str:
        kind, error, trace = given
        first = str(error).partition("\n")[0][:LINE_CHARACTERS]
        places = [f"  {Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
        return "\n".join([*places, f"  {kind.__name__}: {first}"])


class _File(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk: the program goes on without its log."""


def start_log(data: Path) -> logging.Handler:
    """From now on what the program and its libraries say goes to logs/floechat.log in the data folder."""
    handler = _File(data / "logs" / LOG, maxBytes=LOG_BYTES, backupCount=LOGS, encoding="utf-8", delay=True)
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("app").setLevel(logging.INFO)
    _log.info("Floe Chat %s on Python %s, %s", version_of_program(), platform.python_version(), platform.platform())
    return handler


def bundle(parts, conversation_id: int | None) -> bytes:
    """The zip. parts: the program's. conversation_id: one whose text a person wants to hand over as well."""
    redact = Redaction(parts.around.data)
    files = {"about.json": json.dumps(_about(parts), indent=1, default=str), "plan.txt": _plan(parts),
             "log.txt": _tail(parts.around.data / "logs"), "first-light.jsonl": _rows(parts.around.data)}
    if conversation_id is not None:
        files["conversation.json"] = export_json(parts.chats, [conversation_id])
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, redact(text) if name != "conversation.json" else text)
    return written.getvalue()


class Redaction:
    """Puts words in place of the person's name, the computer's name, their folders, and whatever looks like a key."""

    def __init__(self, data: Path):
        names = [(str(data), "DATA"), (str(data.resolve()), "DATA"), (str(Path.home()), "HOME"),
                 (str(Path.home().resolve()), "HOME")]
        folders = {written: word for name, word in names for written in (name, json.dumps(name)[1:-1],
                                                                         name.replace("\\", "/"))}
        self._folders = sorted(folders.items(), key=lambda pair: -len(pair[0]))
        people = (_user(), "USER"), (socket.gethostname(), "HOST")
        self._people = [(_whole(name), word) for name, word in people if name]

    def __call__(self, text: str) -> str:
        for name, word in self._folders:
            text = re.sub(re.escape(name), word, text, flags=re.IGNORECASE)
        for pattern, word in self._people:
            text = pattern.sub(word, text)
        return _SECRETS.sub("SECRET", text)


def _whole(name: str) -> re.Pattern:
    return re.compile(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", re.IGNORECASE)


def _user() -> str:
    with suppress(OSError, KeyError, ImportError):  # an account without a name
        return getpass.getuser()
    return ""


def _about(parts) -> dict:
    machine, models = parts.around.machine, parts.models
    return {"version": version_of_program(), "python": platform.python_version(), "system": platform.platform(),
            "libraries": {each["name"]: each["version"] for each in libraries()},
            "machine": asdict(machine) if machine else None, "card": parts.around.card(),
            "model": {"name": models.folder.name, "state": models.state, "step": models.step, "level": models.level,
                      "options": asdict(models.options), "refused": models.refused},
            "engine": {name: value for name, value in models.snapshot().items() if name != "activity"},
            "trouble": parts.jobs.disk_trouble or parts.chats.mended,
            "conversations": len(parts.chats.conversations())}


def _plan(parts) -> str:
    """As the models page shows it."""
    machine, models = parts.around.machine, parts.models
    if machine is None or models.state == "loading":  # two threads must not import transformers at the same time
        return f"{models.step}\n"
    try:
        return plan_text(plan_for(look_up(str(models.folder)), machine, models.level or None, models.options.context))
    except UserError as error:
        return f"{error}\n"


def _tail(folder: Path) -> str:
    """The end of the log, the older file before the newer."""
    parts = [folder / f"{LOG}.1", folder / LOG]
    text = "".join(part.read_text(encoding="utf-8", errors="replace") for part in parts if part.is_file())
    return text[-TAIL_BYTES:]


def _rows(data: Path) -> str:
    """The newest rows of what a card said when it was last measured; "" where none ever was."""
    with suppress(OSError, ValueError):
        folder = Path((data / "cache" / FIRST_LIGHT).read_text(encoding="utf-8"))
        return (folder / "rows.jsonl").read_text(encoding="utf-8", errors="replace")[-ROWS_BYTES:]
    return ""
