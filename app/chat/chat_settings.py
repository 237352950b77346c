"""What a person wants of one conversation: system prompt, sampling, thinking, context policy.

Stored as the conversation's settings; a missing value means the model's own recommendation. Before its first message
they are those of a draft, by a name that the tab gives it. Presets are settings under a name: ways of sampling that the
program knows replace the numbers of sampling, what a person has kept replaces everything.
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.chat.chats import Chats, Conversation
from app.chat.context_window import POLICIES
from app.incoming import Words, what_is_wrong
from app.strings import TEXT
from engine import Sampling, UserError

SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
EFFORTS = ("low", "medium", "high")
SAMPLINGS = {
    "model": {},
    "precise": {"temperature": 0.2, "top_p": 0.9},
    "creative": {"temperature": 1.1, "min_p": 0.05},
    "greedy": {"temperature": 0.0},
}
CUSTOM = "custom"
PRESET_CHARACTERS = 60
REMOTE_CHARACTERS = 200  # of the name of a model of another server
DRAFTS = 20  # tabs that were closed leave theirs behind


class ChatSettings(BaseModel):
    """Names that are not known are ignored: an older program reads a newer one's settings."""

    model_config = ConfigDict(strict=True, frozen=True)

    system: Words = ""
    policy: Literal[POLICIES] = "oldest"
    thinking: bool | None = None
    effort: Literal[EFFORTS] | None = None
    keep_thinking: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: Annotated[list[str], Field(max_length=100)] = []
    remote: Annotated[str, Field(max_length=REMOTE_CHARACTERS)] = ""  # a model of app/remote; "" for the engine here

    def model_post_init(self, context) -> None:
        self.sampling()  # knows what lies in range

    @staticmethod
    def of(settings: dict) -> ChatSettings:
        return ChatSettings(**usable(settings))

    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in SAMPLING_NAMES}, stop=tuple(self.stop))

    def template(self) -> dict:
        """Variables for the model's chat template, only those that were set; templates ignore what they do not know."""
        wanted = {"enable_thinking": self.thinking, "thinking": self.thinking, "reasoning_effort": self.effort}
        return {name: value for name, value in wanted.items() if value is not None}


def checked(settings: dict) -> dict:
    """Settings from the page or a file, looked at before they are stored. UserError names what cannot be."""
    clean = {name: value for name, value in settings.items() if name in ChatSettings.model_fields and value is not None}
    for name in ("top_k", "seed", "max_tokens"):
        if isinstance(clean.get(name), float) and clean[name].is_integer():
            clean[name] = int(clean[name])
    try:
        ChatSettings(**clean)
    except ValidationError as error:
        raise UserError(TEXT["setting_wrong"].format(what=what_is_wrong(error.errors()[0]))) from error
    return clean


def usable(settings: dict) -> dict:
    """What of a stored document can be: a row may hold anything."""
    return {name: value for name, value in settings.items()
            if name in ChatSettings.model_fields and _can_be(name, value)}


def remote_of(settings: dict) -> str:
    """ChatSettings.remote of a stored document, without a look at the rest: the list of all conversations asks it."""
    remote = settings.get("remote")
    return remote if isinstance(remote, str) and len(remote) <= REMOTE_CHARACTERS else ""


def anywhere(settings: dict) -> dict:
    """Without the server: which one a conversation is sent to, a person says in that conversation. A preset or a file
    does not."""
    return {name: value for name, value in settings.items() if name != "remote"}


def _can_be(name: str, value: object) -> bool:
    try:
        return bool(checked({name: value}))
    except UserError:
        return False


def _by_name(chats: Chats, preference: str) -> dict[str, dict]:
    kept = chats.preference(preference, {})
    return {name: usable(settings) for name, settings in kept.items() if isinstance(settings, dict)}


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
        return self._own().get(name, settings) | {n: v for n, v in settings.items() if n == "remote"}

    def name_of(self, settings: dict) -> str:
        """The preset that these settings are; a person's own goes before a way of sampling beside other settings."""
        settings = anywhere(settings)
        numbers = {n: v for n, v in settings.items() if n in SAMPLING_NAMES}
        known = next((name for name, values in SAMPLINGS.items() if values == numbers), CUSTOM)
        own = next((name for name, kept in self._own().items() if kept == settings), None)
        return known if known != CUSTOM and numbers == settings else own or known

    def keep(self, name: str, settings: dict) -> str:
        """Keep settings under a name, in place of what had it; -> the name. UserError for one that cannot be."""
        name, own = " ".join(name.split()), self._own()
        taken = {shown for shown, _ in self.choices()} | {*SAMPLINGS, CUSTOM}
        if not name or len(name) > PRESET_CHARACTERS or name in taken - set(own):
            raise UserError(TEXT["preset_name_bad"].format(most=PRESET_CHARACTERS))
        self._chats.set_preference("presets", own | {name: anywhere(settings)})
        return name

    def forget(self, name: str) -> None:
        """UserError for a preset of the program."""
        own = self._own()
        if name not in own:
            raise UserError(TEXT["preset_not_own"])
        self._chats.set_preference("presets", {n: v for n, v in own.items() if n != name})

    def _own(self) -> dict[str, dict]:
        return _by_name(self._chats, "presets")


class Drafts:
    """One per program. A name is that of a draft, or the number of a conversation. A control may answer late, when the
    conversation has begun already: then the name of its draft means that conversation."""

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
            return self._all().get(name, {}) if number is None else usable(self._chats.conversation(number).settings)
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
                self._chats.set_preference("drafts", dict(list(drafts.items())[-DRAFTS:]))
        return settings

    def _all(self) -> dict[str, dict]:
        return _by_name(self._chats, "drafts")
