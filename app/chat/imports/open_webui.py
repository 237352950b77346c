"""Open WebUI's export: a list of {title, chat, created_at, updated_at, pinned}, or the `chat` of one conversation.

`chat.history` is a tree: `messages` from ids to {parentId, childrenIds, role, content, timestamp, model, files}, with
`currentId` the end of what is shown; oldest exports have only the list `chat.messages`. Reasoning stands in the content
as <details type="reasoning"> with quoted lines, or beside it. Sources: github.com/open-webui/open-webui
(backend/open_webui/utils/middleware.py, serialize_content_blocks; src/lib/utils/index.ts, convertOpenAIChats).
"""
from __future__ import annotations

import html
import re

from app.chat.imports.tree import ANSWER, NOWHERE, Node, conversation_of, named_files, objects, part, seconds, words

_REASONING = re.compile(r'<details type="reasoning"[^>]*>\s*(?:<summary>.*?</summary>)?\n?(.*?)</details>\n?',
                        re.DOTALL)


def recognised(document: dict) -> bool:
    chat = part(document, "chat") or document
    return bool(part(part(chat, "history"), "messages")) or bool(part(document, "chat")) and isinstance(
        document["chat"].get("messages"), list)


def read(document: dict):
    chat = part(document, "chat") or document
    history = part(chat, "history")
    found = {key: each for key, each in part(history, "messages").items() if isinstance(each, dict)}
    if found:
        nodes = [_node(each, key, words(each.get("parentId")) or None) for key, each in found.items()]
    else:
        nodes = [_node(each, str(i), str(i - 1)) for i, each in enumerate(objects(chat, "messages"))]
    system = words(part(chat, "params").get("system")) or words(chat.get("system"))
    return conversation_of(words(document.get("title")) or words(chat.get("title")),
                           seconds(document.get("created_at")) or seconds(chat.get("timestamp")),
                           seconds(document.get("updated_at")), nodes, words(history.get("currentId")) or None,
                           system, document.get("pinned") is True)


def _node(message: dict, key: str, above: str | None) -> Node:
    role = {"user": "user", ANSWER: ANSWER}.get(words(message.get("role")), NOWHERE)
    text, thinking = _apart(words(message.get("content"))) if role == ANSWER else (words(message.get("content")), "")
    beside = words(message.get("reasoning_content")) or words(message.get("reasoning"))
    files = [part(file, "file") or file for file in objects(message, "files")]
    return Node(key, above, role, text, thinking or beside, seconds(message.get("timestamp")),
                words(message.get("model")), tuple(map(_file, files)))


def _apart(content: str) -> tuple[str, str]:
    """(text, thinking)"""
    thoughts = ["\n".join(line.removeprefix(">").removeprefix(" ") for line in html.unescape(found).strip().split("\n"))
                for found in _REASONING.findall(content)]
    return _REASONING.sub("", content), "\n\n".join(thoughts)


def _file(file: dict) -> dict:
    text = words(part(file, "data").get("content"))
    (named,) = named_files([file], "name", "filename", "type", "id") or ({"name": "", "text": None},)
    return named | {"text": text or None}
