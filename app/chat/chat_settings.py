"""What a person wants of one conversation: system prompt, sampling, thinking, context policy.

Stored as the conversation's settings. A missing value means the model's own recommendation.
"""
from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.chat.context_window import POLICIES
from app.incoming import Words, what_is_wrong
from app.strings import TEXT
from engine import Sampling, UserError

SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
EFFORTS = ("low", "medium", "high")


class Wishes(BaseModel):
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

    def model_post_init(self, context) -> None:
        self.sampling()  # knows what lies in range

    @staticmethod
    def of(settings: dict) -> Wishes:
        return Wishes(**usable(settings))

    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in SAMPLING_NAMES}, stop=tuple(self.stop))

    def template(self) -> dict:
        """Variables for the model's chat template, only those that were set; templates ignore what they do not know."""
        wanted = {"enable_thinking": self.thinking, "thinking": self.thinking, "reasoning_effort": self.effort}
        return {name: value for name, value in wanted.items() if value is not None}


def checked(settings: dict) -> dict:
    """Settings from the page or a file, looked at before they are stored. UserError names what cannot be."""
    clean = {name: value for name, value in settings.items() if name in Wishes.model_fields and value is not None}
    for name in ("top_k", "seed", "max_tokens"):
        if isinstance(clean.get(name), float) and clean[name].is_integer():
            clean[name] = int(clean[name])
    try:
        Wishes(**clean)
    except ValidationError as error:
        raise UserError(TEXT["setting_wrong"].format(what=what_is_wrong(error.errors()[0]))) from error
    return clean


def usable(settings: dict) -> dict:
    """What of a stored document can be: a row may hold anything."""
    return {name: value for name, value in settings.items() if name in Wishes.model_fields and _can_be(name, value)}


def _can_be(name: str, value: object) -> bool:
    try:
        return bool(checked({name: value}))
    except UserError:
        return False
