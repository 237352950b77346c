"""Jan's conversations: a folder each, thread.json and messages.jsonl, in a zip of `threads`; or messages.jsonl alone.

A message is {object: thread.message, id, thread_id, role, created_at, content: [{type: text or reasoning,
text: {value}}, {type: image_url}, {type: tool_call}]}; older versions write reasoning as <think> at the beginning.
It has no versions. Sources: github.com/janhq/jan (core/src/types/message/messageEntity.ts, core/src/types/thread/
threadEntity.ts, docs/docs/specs/messages.md).
"""
from __future__ import annotations

import json
import re

from app.chat.imports.tree import ANSWER, NOWHERE, Node, conversation_of, fenced, objects, part, seconds, words

_THINK = re.compile(r"\s*<think>(.*?)(?:</think>|\Z)\s*", re.DOTALL)


def recognised(document: dict) -> bool:
    """A thread or one of its messages."""
    return document.get("object") in ("thread", "thread.message")


def key_of(document: dict) -> str:
    """What holds a thread and its messages together."""
    return words(document.get("thread_id")) or words(document.get("id"))


def read(documents: list[dict]):
    """All documents of one thread."""
    thread = next((each for each in documents if each["object"] == "thread"), {})
    said = {words(each.get("id")) or f"#{i}": each for i, each in enumerate(documents)
            if each["object"] == "thread.message"}  # one that stands there twice is one
    nodes = [_node(each, str(i), str(i - 1)) for i, each in enumerate(said.values())]
    assistant = next(iter(objects(thread, "assistants")), {})
    return conversation_of(words(thread.get("title")) or words(thread.get("summary")), seconds(thread.get("created")),
                           seconds(thread.get("updated")), nodes, system=words(assistant.get("instructions")),
                           pinned=thread.get("isFavorite") is True)


def _node(message: dict, key: str, above: str) -> Node:
    role = {"user": "user", ANSWER: ANSWER, "tool": ANSWER}.get(words(message.get("role")), NOWHERE)
    said = [_part(each) for each in objects(message, "content")]
    text = "\n\n".join(text for text, _ in said if text)
    thinking = "\n\n".join(thinking for _, thinking in said if thinking)
    if role == ANSWER:
        text, thinking = apart(text, thinking)
    if message.get("role") == "tool":
        text, thinking = "", "\n\n".join(filter(None, (thinking, text)))
    images = [each for each in objects(message, "content") if each.get("type") == "image_url"]
    files = [words(file.get("name")) or words(file.get("file_id")) for file in objects(message, "attachments")]
    names = [name for name in files if name] + [f"image {i}" for i, _ in enumerate(images, 1)]
    return Node(key, above, role, text, thinking, seconds(message.get("created_at")),
                words(part(message, "metadata").get("modelId")), tuple({"name": n, "text": None} for n in names))


def _part(content: dict) -> tuple[str, str]:
    """(text, thinking)"""
    kind, text = content.get("type"), words(part(content, "text").get("value")) or words(content.get("text"))
    if kind == "tool_call":
        asked = {name: content.get(name) for name in ("tool_name", "input", "output") if content.get(name) is not None}
        return "", fenced(json.dumps(asked, ensure_ascii=False, indent=1), "json")
    return ("", text) if kind == "reasoning" else (text, "")


def apart(text: str, thinking: str = "") -> tuple[str, str]:
    """(text, thinking) of an answer that begins with its thinking in <think>."""
    found = _THINK.match(text)
    if not found:
        return text, thinking
    return text[found.end():], "\n\n".join(filter(None, (thinking, found[1].strip())))
