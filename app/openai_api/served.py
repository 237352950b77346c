"""Which models a program may name, and the engine of the one that it names, opened first where another is open."""
from __future__ import annotations

import threading
from contextlib import suppress

from app.chat.line import Late
from app.library.model_library import Shelf
from app.library.open_model import Models
from app.openai_api.errors import ApiError
from engine import Stopped, UserError

OPENING_SECONDS = 30.0  # that another model may take to be opened
TOKEN_CHARACTERS = 4
USUAL_TOKENS = 256  # of an answer, whatever a request allows


class Served:
    def __init__(self, models: Models, shelf: Shelf):
        self.models, self._shelf = models, shelf

    def names(self) -> list[str]:
        """Of the disk, the open one first."""
        return self._shelf.names()

    def check(self, name: str) -> None:
        if name not in self.names():
            raise ApiError(404, f"There is no model {name[:100]!r} on this computer; ask for the list of models.",
                           "model_not_found", "model")

    def expected(self, name: str, characters: int, most_tokens: int | None) -> float:
        """Seconds that an answer will take, by the speeds of the last one; 0 where there was none: opening, reading,
        writing."""
        now = self.models.snapshot()
        speed, read = now.get("tokens_per_second", 0.0), now.get("prompt", {})
        if not speed:
            return 0.0
        reading = characters / TOKEN_CHARACTERS * read.get("seconds", 0.0) / max(1, read.get("tokens", 0))
        opening = 0.0 if self.names()[0] == name else OPENING_SECONDS
        return opening + reading + min(most_tokens or USUAL_TOKENS, USUAL_TOKENS) / speed

    def engine(self, name: str, stop: threading.Event, deadline: float):
        """For the one whose turn it is. Late, Stopped; ApiError where it cannot be opened."""
        with suppress(UserError):  # what is being opened now cannot be broken off, and may be another
            self.models.wait(stop, deadline)
        if self.names()[0] != name or self.models.state == "failed":
            self.check(name)
            self._shelf.open(name)
        try:
            engine = self.models.wait(stop, deadline)
        except UserError as error:
            raise ApiError(503, str(error), "model_not_loaded") from error
        if engine is None:
            raise Stopped if stop.is_set() else Late
        return engine
