"""Which messages go to the model, and what happens when they are too many for its context.

The policy is the user's: `stop` says so and computes nothing, `oldest` drops the oldest turns, `newest` keeps only the
newest question (and the system prompt). What was dropped is counted and shown, never silent.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app.chats import Message
from app.strings import TEXT
from engine import UserError

POLICIES = ("stop", "oldest", "newest")


@dataclass(frozen=True)
class Prompt:
    """What the model is given. dropped: messages left out; tokens: of what is left."""

    messages: list[dict]
    tokens: int
    dropped: int


def to_prompt(path: list[Message], system: str, keep_thinking: bool = False) -> list[dict]:
    """The shown messages in the engine's form; earlier thinking is left out unless it is wanted."""
    system_part = [{"role": "system", "content": system}] if system.strip() else []
    return system_part + [_one(message, keep_thinking) for message in path]


def fit(messages: list[dict], context: int, reserve: int, policy: str, count: Callable[[list], int]) -> Prompt:
    """The messages that leave `reserve` tokens of the context for the answer. UserError with the numbers if none do."""
    assert policy in POLICIES, policy
    room = context - reserve
    head = [m for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    dropped = 0
    if policy == "newest" and count(head + turns) > room:
        dropped = _last_question(turns)
    while (tokens := count(head + turns[dropped:])) > room:
        following = dropped + 1
        while following < len(turns) and turns[following]["role"] != "user":
            following += 1
        if policy == "stop" or following >= len(turns):
            raise UserError(TEXT["context_full"].format(tokens=tokens, context=context, reserve=reserve))
        dropped = following
    return Prompt(head + turns[dropped:], tokens, dropped)


def _last_question(turns: list[dict]) -> int:
    return max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=0)


def _one(message: Message, keep_thinking: bool) -> dict:
    files = "".join(f"{TEXT['file_head'].format(name=a['name'])}\n```\n{a['text']}\n```\n\n"
                    for a in message.attachments)
    content = {"role": message.role, "content": files + message.text}
    if keep_thinking and message.thinking:
        content["reasoning_content"] = message.thinking
    return content
