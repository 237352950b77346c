"""Which experts the answers of a conversation picked: kept with it, drawn, and brought near when it is opened again."""
from __future__ import annotations

import sqlite3
from contextlib import suppress

from app.chat.chats import Chats
from app.library.open_model import Models
from engine import Picks, UserError


class KeptPicks:
    """One per program; any thread may ask. What a conversation has of another model counts as nothing."""

    def __init__(self, chats: Chats, models: Models):
        self._chats, self._models = chats, models
        self._near: tuple[int, int] | None = None  # the engine, and the conversation that it was last busy with

    def keep(self, conversation_id: int, picks: Picks) -> None:
        """More of it, after an answer. What cannot be kept is only missing the next time."""
        with suppress(sqlite3.Error, UserError):
            if before := self.of(conversation_id):
                with suppress(ValueError):  # the folder holds another model now
                    picks = before + picks
            self._chats.keep_picks(conversation_id, self._model, picks.packed())
        self._near = id(self._models.engine), conversation_id

    def of(self, conversation_id: int) -> Picks | None:
        """None where the open model has answered nothing."""
        model, packed = self._chats.picks(conversation_id)
        with suppress(ValueError):
            if model == self._model:
                return Picks.unpacked(packed)
        return None

    def opened(self, conversation_id: int) -> None:
        """A person looks at it, and may go on with it."""
        now = id(self._models.engine), conversation_id
        if now != self._near and (picks := self.of(conversation_id)):
            self._near = now
            self._models.warm(picks)

    @property
    def _model(self) -> str:
        return str(self._models.folder)
