"""Claude's export: conversations.json in a zip, a list of conversations with `chat_messages`.

A message has sender (human, assistant), content blocks (text, thinking, tool_use, tool_result) or only `text`,
parent_message_uuid in newer exports, attachments with their text (`extracted_content`) and files without.
Sources: github.com/Sinity/polylogue (docs/providers/claude-ai.md), github.com/withLinda/claude-conversation-exporter,
and the types of importers in public repositories. The archive names no shown leaf: the newest message is.
"""
from __future__ import annotations

import json

from app.chat.imports.tree import (
    ANSWER,
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

ARTIFACTS = ("artifacts", "create_file")  # tools whose input is what the person asked for


def recognised(document: dict) -> bool:
    return isinstance(document.get("chat_messages"), list)


def read(document: dict):
    messages = objects(document, "chat_messages")
    keys = [words(message.get("uuid")) for message in messages]
    keys = keys if len(set(keys)) == len(keys) else [f"#{i}" for i, _ in enumerate(messages)]
    linked = any(words(message.get("parent_message_uuid")) in keys for message in messages)
    above = [words(message.get("parent_message_uuid")) for message in messages] if linked else [None, *keys]
    nodes = [_node(*each) for each in zip(messages, keys, above, strict=False)]
    newest = max(nodes, key=lambda node: node.at or 0.0, default=None)
    shown = words(document.get("current_leaf_message_uuid")) or (newest.key if newest else None)
    return conversation_of(words(document.get("name")), seconds(document.get("created_at")),
                           seconds(document.get("updated_at")), nodes, shown,
                           pinned=document.get("is_starred") is True)


def _node(message: dict, key: str, above: str | None) -> Node:
    blocks = objects(message, "content")
    said = [_block(block) for block in blocks]
    text = "\n\n".join(text for text, _ in said if text) or words(message.get("text"))
    thinking = "\n\n".join(thinking for _, thinking in said if thinking)
    files = tuple({"name": words(file.get("file_name")), "text": words(file.get("extracted_content"))}
                  for file in objects(message, "attachments"))
    names = {file["name"] for file in files}
    others = [file for file in objects(message, "files") if words(file.get("file_name")) not in names]
    return Node(key, above, "user" if message.get("sender") == "human" else ANSWER, text, thinking,
                seconds(message.get("created_at")), attachments=files + named_files(others, "file_name", "file_uuid"))


def _block(block: dict) -> tuple[str, str]:
    """(text, thinking)"""
    kind = block.get("type")
    if kind == "text":
        return words(block.get("text")), ""
    if kind == "thinking":
        return "", words(block.get("thinking"))
    if kind == "tool_use":
        made, name = part(block, "input"), words(block.get("name"))
        content = words(made.get("content")) or words(made.get("file_text"))
        if name in ARTIFACTS and content:
            title = words(made.get("title")) or words(made.get("path"))
            return f"**{title}**\n\n{fenced(content)}" if title else fenced(content), ""
        return "", f"{name}\n\n{fenced(json.dumps(made, ensure_ascii=False, indent=1))}"
    if kind == "tool_result":
        found = block.get("content")
        return "", found if isinstance(found, str) else "\n\n".join(
            words(each.get("text")) for each in parts(block, "content") if isinstance(each, dict))
    return "", ""
