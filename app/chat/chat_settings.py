"""What a person wants of one conversation: system prompt, sampling, thinking, context policy.

Stored as the conversation's settings. A missing value means the model's own recommendation.
"""
from __future__ import annotations

from dataclasses import dataclass

from app.chat.context_window import POLICIES
from engine import Sampling, UserError

SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Wishes:
    system: str = ""
    policy: str = "oldest"
    thinking: bool | None = None
    effort: str | None = None
    keep_thinking: bool = False
    values: tuple = ()
    stop: tuple = ()

    @staticmethod
    def of(settings: dict) -> Wishes:
        """The wishes in a stored settings document; unknown names are ignored (an older program reads a newer file)."""
        policy = settings.get("policy", "oldest")
        values = tuple((name, settings[name]) for name in SAMPLING_NAMES if settings.get(name) is not None)
        return Wishes(str(settings.get("system", "")), policy if policy in POLICIES else "oldest",
                      settings.get("thinking"), settings.get("effort"), bool(settings.get("keep_thinking", False)),
                      values, tuple(settings.get("stop", ())))

    def sampling(self) -> Sampling:
        return Sampling(**dict(self.values), stop=self.stop)

    def template(self) -> dict:
        """Variables for the model's chat template, only those that were set; templates ignore what they do not know."""
        wanted = {"enable_thinking": self.thinking, "thinking": self.thinking, "reasoning_effort": self.effort}
        return {name: value for name, value in wanted.items() if value is not None}


def checked(settings: dict) -> dict:
    """Settings from the page, looked at before they are stored. UserError names what is out of range."""
    known = (*SAMPLING_NAMES, "system", "policy", "thinking", "effort", "keep_thinking", "stop")
    clean = {name: value for name, value in settings.items() if name in known and value is not None}
    for name in ("top_k", "seed", "max_tokens"):
        if isinstance(clean.get(name), float) and clean[name].is_integer():
            clean[name] = int(clean[name])
    wishes = Wishes.of(clean)
    wishes.sampling()
    if clean.get("policy", "oldest") not in POLICIES:
        raise UserError(f"There is no context policy {clean['policy']!r}; choose one of {', '.join(POLICIES)}.")
    if clean.get("effort") not in (None, *EFFORTS):
        raise UserError(f"There is no effort {clean['effort']!r}; choose one of {', '.join(EFFORTS)}.")
    return clean
