"""Messages of another program, as its file has them, to a conversation of ours: question, answer, versions.

Elsewhere one answer may be a chain of nodes (thinking, a call of a tool, its result, text) with nodes among them that
nobody sees. Here it is one message below its question, and where the chain has branches, one version each.
"""
from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from app.chat.chat_settings import usable
from app.chat.rows import Conversation, Message
from app.incoming import ATTACHED_CHARACTERS, ATTACHMENT_BYTES, ATTACHMENTS, TEXT_CHARACTERS
from app.strings import TEXT
from engine import UserError

MESSAGES = 100_000  # of one conversation
CHARACTERS = 120 << 20  # of one conversation: a beginning that versions share is in each of them
NOWHERE = ""  # role of a node that only holds others together
ANSWER = "assistant"


@dataclass(frozen=True)
class Node:
    """key, above: how nodes hang together (above None or unknown: a beginning). role: user, assistant or NOWHERE.
    at: seconds since 1970. attachments: {name, text} each; text None where the export has only the name."""

    key: str
    above: str | None
    role: str
    text: str = ""
    thinking: str = ""
    at: float | None = None
    model: str = ""
    attachments: tuple[dict, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.text.strip() or self.thinking.strip() or self.attachments)


@dataclass(frozen=True)
class Chain:
    """Nodes that become one answer, the last first."""

    node: Node
    before: Chain | None

    def nodes(self) -> list[Node]:
        found, chain = [], self
        while chain:
            found.append(chain.node)
            chain = chain.before
        return found[::-1]


def conversation_of(title: str, created_at: float | None, updated_at: float | None, nodes: list[Node],
                    shown: str | None = None, system: str = "", pinned: bool = False
                    ) -> tuple[Conversation, list[Message]]:
    """shown: the node that was looked at last; None: the newest. UserError where the nodes make no tree, or too large
    a one."""
    dates = [node.at for node in nodes if node.at]
    created_at = created_at or min(dates, default=0.0)
    growing = _Growing(nodes, created_at)
    messages = growing.messages
    return Conversation(0, title, bool(title.strip()), created_at, updated_at or max(dates, default=created_at), pinned,
                        growing.message_of(shown), usable({"system": system} if system.strip() else {})), messages


class _Growing:
    """The messages of one conversation, from the beginnings down."""

    def __init__(self, nodes: list[Node], created_at: float):
        self.messages: list[Message] = []
        self._by_key, self._created_at, self._characters = {node.key: node for node in nodes}, created_at, 0
        self._below: dict[str | None, list[Node]] = {}
        self._became: dict[str, int] = {}
        if len(nodes) > MESSAGES:
            raise UserError(TEXT["import_long"])
        for node in self._by_key.values():
            above = node.above if node.above in self._by_key else None
            self._below.setdefault(above, []).append(node)
        self._grow()

    def message_of(self, key: str | None) -> int | None:
        while key in self._by_key and key not in self._became:
            key = self._by_key[key].above
        return self._became.get(key)

    def _grow(self) -> None:
        waiting: list[tuple[Node, int | None, Chain | None]] = [
            (node, None, None) for node in reversed(self._below.get(None, []))]
        seen = 0
        while waiting:
            node, parent, chain = waiting.pop()
            seen += 1
            if node.role == ANSWER and not node.is_empty:
                chain = Chain(node, chain)
            elif node.role == "user" and not node.is_empty:
                parent, chain = self._answer(chain, parent), None
                parent = self._add("user", [node], parent)
            below = self._below.get(node.key, [])
            if not below or len(below) > 1 and chain and any(part.text for part in chain.nodes()):
                parent, chain = self._answer(chain, parent), None
            waiting += [(each, parent, chain) for each in reversed(below)]
        if seen < len(self._by_key):
            raise UserError(TEXT["import_wrong"].format(what=TEXT["wrong_circle"]))

    def _answer(self, chain: Chain | None, parent: int | None) -> int | None:
        return self._add(ANSWER, chain.nodes(), parent) if chain else parent

    def _add(self, role: str, nodes: list[Node], parent: int | None) -> int:
        text, thinking = ("\n\n".join(filter(None, (getattr(node, name).strip() for node in nodes)))
                          for name in ("text", "thinking"))
        self._characters += len(text) + len(thinking)
        if self._characters > CHARACTERS:
            raise UserError(TEXT["import_long"])
        last, number = nodes[-1], len(self.messages) + 1
        attachments = _fitting([*(each for node in nodes for each in node.attachments), *_rest(text, thinking)])
        self.messages.append(Message(
            number, 0, parent, role, text[:TEXT_CHARACTERS], thinking[:TEXT_CHARACTERS], "done",
            last.at or self._created_at or time.time(), {"model": last.model} if last.model else {}, attachments))
        self._became |= {node.key: number for node in nodes}
        return number


def _rest(text: str, thinking: str) -> list[dict]:
    """What is longer than a message can be goes with it as a file."""
    return [{"name": f"{name}.txt", "text": whole[TEXT_CHARACTERS:]}
            for name, whole in (("message", text), ("thinking", thinking)) if len(whole) > TEXT_CHARACTERS]


def _fitting(files: list[dict]) -> list[dict]:
    """Attachments as large as ours may be. UserError where there is more than a message can have."""
    fitting = []
    for file in files:
        text = TEXT["file_not_exported"] if file["text"] is None else file["text"].replace("\0", "")
        size = len(text) if len(text.encode()) <= ATTACHMENT_BYTES else ATTACHMENT_BYTES // 4
        name = " ".join(file["name"].replace("\\", "/").rsplit("/", 1)[-1].split())[:200] or TEXT["file_unnamed"]
        fitting += [{"name": name, "text": text[i:i + size]} for i in range(0, max(len(text), 1), max(size, 1))]
    if len(fitting) > ATTACHMENTS or sum(len(file["text"]) for file in fitting) > ATTACHED_CHARACTERS:
        raise UserError(TEXT["import_long"])
    return fitting


def fenced(text: str, language: str = "") -> str:
    """A block of code that its own text cannot end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


# What stands in a foreign file may be of any kind.

def words(value: object) -> str:
    return value if isinstance(value, str) else ""


def part(value: object, name: str) -> dict:
    """What stands there under a name, where that is an object."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def parts(value: object, name: str) -> list:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []


def objects(value: object, name: str) -> list[dict]:
    return [each for each in parts(value, name) if isinstance(each, dict)]


def seconds(value: object) -> float | None:
    """A time as seconds since 1970, from seconds, milliseconds, or ISO 8601; None for what is none."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value).timestamp()
        except (ValueError, OverflowError, OSError):
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e16:
        return None
    while value > 1e11:  # the year 5138 in seconds: these are milliseconds, or microseconds
        value /= 1000
    return float(value)


def named_files(files: Iterable[dict], *names: str) -> tuple[dict, ...]:
    """Attachments whose content is not in the export."""
    found = ([words(file.get(name)) for name in names if words(file.get(name))] for file in files)
    return tuple({"name": choice[0], "text": None} for choice in found if choice)
