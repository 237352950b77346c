"""Which models a program may name, and the engine of the one that it names, opened first where another is open."""
from __future__ import annotations

import threading
from contextlib import suppress

from app.chat.line import Late
from app.library.model_library import Shelf
from app.library.open_model import Models
from app.openai_api.errors import ApiError
from engine import Stopped, UserError


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
