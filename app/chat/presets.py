"""Settings under a name: the ways of sampling that the program knows, and what a person has kept.

A way of sampling replaces the numbers of sampling only. What a person has kept is everything that was set, system
prompt included, and replaces everything. Kept among the preferences of the chat database.
"""
from __future__ import annotations

from app.chat.chat_settings import SAMPLING_NAMES, usable
from app.chat.chats import Chats
from app.strings import TEXT
from engine import UserError

SAMPLINGS = {
    "model": {},
    "precise": {"temperature": 0.2, "top_p": 0.9},
    "creative": {"temperature": 1.1, "min_p": 0.05},
    "greedy": {"temperature": 0.0},
}
CUSTOM = "custom"
MOST_CHARACTERS = 60


class Presets:
    """One per program."""

    def __init__(self, chats: Chats):
        self._chats = chats

    def choices(self) -> list[tuple[str, str]]:
        """(what is shown, name) of all, the person's own in between."""
        return [*((TEXT[f"preset_{name}"], name) for name in SAMPLINGS), *((name, name) for name in self._own()),
                (TEXT["preset_custom"], CUSTOM)]

    def chosen(self, name: str, settings: dict) -> dict:
        """What a conversation's settings become when a preset is chosen; unchanged for a name that is none."""
        if name in SAMPLINGS:
            return {n: v for n, v in settings.items() if n not in SAMPLING_NAMES} | SAMPLINGS[name]
        return self._own().get(name, settings)

    def name_of(self, settings: dict) -> str:
        """The preset that these settings are; a person's own goes before a way of sampling beside other settings."""
        numbers = {n: v for n, v in settings.items() if n in SAMPLING_NAMES}
        known = next((name for name, values in SAMPLINGS.items() if values == numbers), CUSTOM)
        own = next((name for name, kept in self._own().items() if kept == settings), None)
        return known if known != CUSTOM and numbers == settings else own or known

    def keep(self, name: str, settings: dict) -> str:
        """Keep settings under a name, in place of what had it; -> the name. UserError for one that cannot be."""
        name, own = " ".join(name.split()), self._own()
        taken = {shown for shown, _ in self.choices()} | {*SAMPLINGS, CUSTOM}
        if not name or len(name) > MOST_CHARACTERS or name in taken - set(own):
            raise UserError(TEXT["preset_name_bad"].format(most=MOST_CHARACTERS))
        self._chats.set_preference("presets", own | {name: settings})
        return name

    def forget(self, name: str) -> None:
        """UserError for a preset of the program."""
        own = self._own()
        if name not in own:
            raise UserError(TEXT["preset_not_own"])
        self._chats.set_preference("presets", {n: v for n, v in own.items() if n != name})

    def _own(self) -> dict[str, dict]:
        kept = self._chats.preference("presets", {})
        return {name: usable(settings) for name, settings in kept.items() if isinstance(settings, dict)}
