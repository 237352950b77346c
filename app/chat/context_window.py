"""Which messages go to the model, and what happens when they are too many for its context.

The policy is the user's: `stop` says so and computes nothing, `oldest` drops the oldest turns, `newest` keeps only the
newest question (and the system prompt). What was dropped is counted and shown, never silent.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from app.chat.chats import Message
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
    """All that is shown, as a model is given it."""
    return joined(spoken(path, system, keep_thinking))


def spoken(path: list[Message], system: str, keep_thinking: bool = False) -> list[dict]:
    """The shown messages in the engine's form, one for one; earlier thinking is left out unless it is wanted, and so
    are empty answers, which many templates refuse."""
    prompt = [{"role": "system", "content": system}] if system.strip() else []
    each = (_one(message, keep_thinking) for message in path)
    return prompt + [one for one in each if one["role"] != "assistant" or one["content"].strip()]


def joined(messages: list[dict]) -> list[dict]:
    """Questions that follow each other become one: many templates want roles by turns."""
    prompt: list[dict] = []
    for one in messages:
        if prompt and prompt[-1]["role"] == one["role"] == "user":
            one = one | {"content": f"{prompt.pop()['content']}\n\n{one['content']}"}
        prompt.append(one)
    return prompt


def fit(messages: list[dict], context: int, reserve: int, policy: str, count: Callable[[list], int],
        weigh: Callable[[dict], int]) -> Prompt:
    """Of `spoken` messages those that leave `reserve` tokens of the context for the answer, joined. UserError with the
    numbers if none do.

    count: tokens of a whole prompt; weigh: of one message's own text, kept from the last time. The turns are weighed
    once, from the newest back, and a prompt is counted a few times however long the conversation is: only then it is
    known what the template adds, and where that was too much at least twice as many questions go as the last time.
    """
    assert policy in POLICIES, policy
    room = context - reserve
    head = [m for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    starts = [0] + [i for i, turn in enumerate(turns) if i and turn["role"] == "user"]
    last, at, goes = len(starts) - 1, 0, 1
    if policy != "stop":
        at = _first_that_stays(turns, starts, room, weigh)
    if policy == "newest" and at:
        at = last
    while (tokens := count(joined(head + turns[starts[at]:]))) > room:
        if policy == "stop" or at == last:
            raise UserError(TEXT["context_full"].format(tokens=tokens, context=context, reserve=reserve))
        weights = [sum(map(weigh, turns[start:end])) for start, end in pairwise([*starts[at:], len(turns)])]
        too_much = (tokens - room) * (sum(weights) + sum(map(weigh, head))) / tokens
        at = last if policy == "newest" else min(last, at + max(goes, _how_many(weights, too_much)))
        goes *= 2
    return Prompt(joined(head + turns[starts[at]:]), tokens, starts[at])


def _first_that_stays(turns: list[dict], starts: list[int], room: int, weigh: Callable[[dict], int]) -> int:
    """Index in `starts` of the earliest question from which on the turns' own texts fit; the last if none does."""
    end = len(turns)
    for at in reversed(range(len(starts))):
        room -= sum(map(weigh, turns[starts[at]:end]))
        if room < 0:
            return min(at + 1, len(starts) - 1)
        end = starts[at]
    return 0


def _how_many(weights: list[int], too_much: float) -> int:
    """How many of the first questions weigh that much."""
    return next((n for n, weight in enumerate(accumulate(weights), 1) if weight >= too_much), len(weights))


def _one(message: Message, keep_thinking: bool) -> dict:
    files = "".join(f"{TEXT['file_head'].format(name=a['name'])}\n```\n{a['text']}\n```\n\n"
                    for a in message.attachments)
    content = {"role": message.role, "content": files + message.text}
    if keep_thinking and message.thinking:
        content["reasoning_content"] = message.thinking
    return content
