"""Settings made before the first message: of the conversation that a tab will begin next, by a name the tab gives it.

A control may answer late, when the conversation has begun already; then the name of its draft means that conversation,
and nothing is stored for the next one instead. Drafts are kept among the preferences of the chat database.
"""
from __future__ import annotations

import threading
from collections.abc import Callable

from app.chat.chat_settings import usable
from app.chat.chats import Chats, Conversation
from engine import UserError

MOST = 20  # tabs that were closed leave theirs behind


class Drafts:
    """One per program. A name is that of a draft, or the number of a conversation."""

    def __init__(self, chats: Chats):
        self._chats = chats
        self._begun: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self, name: str) -> Conversation:
        """The conversation that a draft becomes."""
        with self._lock:
            drafts = self._all()
            conversation = self._chats.create(settings=drafts.pop(name, {}))
            self._begun[name] = conversation.id
            self._chats.set_preference("drafts", drafts)
        return conversation

    def conversation(self, name: str) -> int | None:
        """The conversation that is meant; None while there is only the draft of it."""
        return int(name) if name.isdecimal() and len(name) < 19 else self._begun.get(name)

    def settings(self, name: str) -> dict:
        """Nothing for a conversation that has been deleted meanwhile."""
        number = self.conversation(name)
        try:
            return usable(self._all().get(name, {}) if number is None else self._chats.conversation(number).settings)
        except UserError:
            return {}

    def change(self, name: str, change: Callable[[dict], dict]) -> dict:
        """Store what `change` makes of the settings; -> it. One after another: two controls that are left within a
        moment answer in two threads, and neither may store the other's value away."""
        with self._lock:
            settings, number = change(self.settings(name)), self.conversation(name)
            if number is not None:
                self._chats.set_settings(number, settings)
            else:
                drafts = {key: value for key, value in self._all().items() if key != name} | {name: settings}
                self._chats.set_preference("drafts", dict(list(drafts.items())[-MOST:]))
        return settings

    def _all(self) -> dict[str, dict]:
        kept = self._chats.preference("drafts", {})
        return {name: settings for name, settings in kept.items() if isinstance(settings, dict)}
