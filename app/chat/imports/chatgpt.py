"""ChatGPT's export: conversations.json, or conversations-000.json and so on, in a zip.

A conversation is a tree: `mapping` from ids to {parent, children, message}, `current_node` the end of what is shown.
A message has author.role (user, assistant, system, tool) and content by `content_type`: text and multimodal_text with
`parts`, code and execution_output with `text`, thoughts with [{summary, content}], reasoning_recap; images and sound
are pointers to files. What an assistant writes to a tool (recipient other than all), and what the tool answers, belongs
to how it got there: thinking here. Sources: github.com/mitkury/chatgpt-export-parser
(docs/chatgpt-data-export-format.md), github.com/danny-avila/LibreChat (api/server/utils/import/importers.js), exports
of 2024 to 2026 in public repositories.
"""
from __future__ import annotations

import re

from app.chat.imports.tree import (
    ANSWER,
    NOWHERE,
    Node,
    conversation_of,
    fenced,
    named_files,
    objects,
    part,
    parts,
    seconds,
    words,
)

_CITATION = re.compile("\ue200[^\ue201]*\ue201|[\ue200-\ue206]")  # marks of the page's own, for links beside the text
_POINTERS = ("image_asset_pointer", "audio_asset_pointer", "video_container_asset_pointer")


def recognised(document: dict) -> bool:
    return isinstance(document.get("mapping"), dict)


def read(document: dict):
    nodes = [_node(key, each) for key, each in document["mapping"].items() if isinstance(each, dict)]
    return conversation_of(words(document.get("title")), seconds(document.get("create_time")),
                           seconds(document.get("update_time")), _in_order(document["mapping"], nodes),
                           words(document.get("current_node")) or None, pinned=bool(document.get("is_starred")))


def _in_order(mapping: dict, nodes: list[Node]) -> list[Node]:
    """Versions in the order in which their parent names them."""
    place: dict[str, int] = {}
    for each in mapping.values():
        for child in parts(each, "children"):
            if isinstance(child, str):
                place.setdefault(child, len(place))
    return sorted(nodes, key=lambda node: place.get(node.key, -1))


def _node(key: str, each: dict) -> Node:
    message = part(each, "message")
    content, role = part(message, "content"), words(part(message, "author").get("role"))
    above = words(each.get("parent")) or None
    hidden = part(message, "metadata").get("is_visually_hidden_from_conversation") is True
    if role not in ("user", ANSWER, "tool") or hidden:
        return Node(key, above, NOWHERE)
    text, thinking = _said(content, part(message, "metadata"))
    if role == "tool" or words(message.get("recipient")) not in ("", "all"):
        text, thinking = "", text or thinking
    return Node(key, above, "user" if role == "user" else ANSWER, text, thinking, seconds(message.get("create_time")),
                words(part(message, "metadata").get("model_slug")), _files(content, part(message, "metadata")))


def _said(content: dict, metadata: dict) -> tuple[str, str]:
    """(text, thinking)"""
    kind = words(content.get("content_type"))
    if kind == "thoughts":
        return "", "\n\n".join(filter(None, map(_thought, objects(content, "thoughts"))))
    if kind == "reasoning_recap":
        return "", ""  # how long it took
    if kind == "user_editable_context":
        return "", ""  # the person's standing instructions, the same before every conversation
    text = words(content.get("text")) or words(content.get("result"))
    if kind in ("code", "execution_output") and text:
        language = words(content.get("language")).replace("unknown", "")
        return fenced(text, language), ""
    found = [each if isinstance(each, str) else words(each.get("text")) for each in parts(content, "parts")
             if isinstance(each, str | dict)]
    return _without_marks("\n".join(filter(None, found)) or text, metadata), ""


def _thought(thought: dict) -> str:
    head, body = words(thought.get("summary")), words(thought.get("content"))
    return f"**{head}**\n\n{body}" if head and body else head or body


def _without_marks(text: str, metadata: dict) -> str:
    """Citations as the links that they stand for."""
    if "\ue200" in text:
        for reference in objects(metadata, "content_references"):
            mark = words(reference.get("matched_text"))
            if "\ue200" in mark:
                text = text.replace(mark, words(reference.get("alt")))
    return _CITATION.sub("", text)


def _files(content: dict, metadata: dict) -> tuple[dict, ...]:
    attached = named_files(objects(metadata, "attachments"), "name", "id")
    pointers = [each for each in objects(content, "parts") if each.get("content_type") in _POINTERS]
    known = {words(file.get("id")) for file in objects(metadata, "attachments")}
    others = [each for each in pointers if not any(name and name in words(each.get("asset_pointer")) for name in known)]
    return attached + named_files(others, "asset_pointer")
