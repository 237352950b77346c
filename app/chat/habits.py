"""What the answers of this computer's chats took of each model, learned where a person wants it, and used while the
next question is being written. One file a model, `habits/` in the data folder; no text is in it."""
from __future__ import annotations

import sqlite3
import zlib
from contextlib import suppress
from pathlib import Path

from app.chat.chats import Chats, Message
from app.library.open_model import Models
from engine import Habits, Picks

WANTED = "habits"  # name of the preference


class KeptHabits:
    """One per program; any thread may ask."""

    def __init__(self, chats: Chats, models: Models):
        self._chats, self._models, self._folder = chats, models, chats.file.parent / "habits"
        self._open: Habits | None = None

    @property
    def wanted(self) -> bool:
        return bool(self._chats.preference(WANTED, False))

    def want(self, is_so: bool) -> None:
        self._chats.set_preference(WANTED, is_so)

    def written(self, draft: str) -> None:
        """A person is at it."""
        if self.wanted and draft.strip():
            self._models.expect(draft, self._of_model())

    def answered(self, above: list[Message], picks: Picks) -> None:
        """above: what was said before it. What cannot be learned is only missing the next time."""
        with suppress(sqlite3.Error):
            if self.wanted:
                asked = next((message.text for message in reversed(above) if message.role == "user"), "")
                self._models.learn(asked, picks, self._of_model())

    def size(self) -> int:
        """Bytes, of all models."""
        return sum(file.stat().st_size for file in self._folder.glob("*.npz"))

    def forget(self) -> None:
        """Of all models."""
        if self._open:
            self._open.forget()
        for file in self._folder.glob("*"):
            file.unlink(missing_ok=True)

    def _of_model(self) -> Habits:
        folder = str(self._models.folder)
        path = self._folder / f"{Path(folder).name}-{zlib.crc32(folder.encode()):08x}.npz"
        if self._open is None or self._open.path != path:
            self._open = Habits(path)
        return self._open
