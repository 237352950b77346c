"""Conversations as files: JSON keeps everything (all versions), Markdown keeps what is shown and can be read by anyone.

Both can be read back. In Markdown a comment line marks who speaks, so headings inside a message are harmless.
"""
from __future__ import annotations

import json
import re

from app.chat.chats import ROLES, STATUSES, Chats, Conversation, Message
from engine import UserError

FORMAT = "floechat-conversations"
VERSION = 1
_MARK = re.compile(r"^<!-- floe:(user|assistant) -->\n(?:\*\*.*\*\*\n\n?)?", re.MULTILINE)


def export_json(chats: Chats, conversation_ids: list[int]) -> str:
    """The whole conversations, every version, as one JSON document."""
    return json.dumps({"format": FORMAT, "version": VERSION,
                       "conversations": [_to_dict(chats, chats.conversation(i)) for i in conversation_ids]},
                      ensure_ascii=False, indent=1)


def export_markdown(chats: Chats, conversation_id: int) -> str:
    """The shown version as Markdown."""
    conversation = chats.conversation(conversation_id)
    parts = [f"# {conversation.title or 'Conversation'}\n"]
    for message in chats.path(conversation_id):
        name = "You" if message.role == "user" else "Assistant"
        parts.append(f"<!-- floe:{message.role} -->\n**{name}**\n\n{message.text}\n")
    return "\n".join(parts)


def import_text(chats: Chats, text: str) -> list[Conversation]:
    """New conversations from an exported JSON or Markdown text; UserError if it is neither."""
    if text.lstrip().startswith("{"):
        return _import_json(chats, text)
    if _MARK.search(text):
        return [_import_markdown(chats, text)]
    raise UserError("This file is no exported conversation; choose a .json or .md file that Floe Chat has written.")


def _to_dict(chats: Chats, conversation: Conversation) -> dict:
    messages = [chats.message(i) for i in sorted(chats.versions(conversation.id))]
    return {"title": conversation.title, "created_at": conversation.created_at, "pinned": conversation.pinned,
            "settings": conversation.settings, "leaf": conversation.leaf_id,
            "messages": [_message_dict(message) for message in messages]}


def _message_dict(message: Message) -> dict:
    names = ("id", "parent_id", "role", "text", "thinking", "status", "created_at", "stats", "attachments")
    return {name: getattr(message, name) for name in names}


def _import_json(chats: Chats, text: str) -> list[Conversation]:
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise KeyError("format")
        if document["version"] > VERSION:
            raise UserError("This file was exported by a newer Floe Chat: update Floe Chat to import it.")
        checked = [_check(conversation) for conversation in document["conversations"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("This file is no exported conversation, or it is damaged; export it again.") from error
    return [_insert(chats, conversation) for conversation in checked]


def _check(conversation: dict) -> dict:
    """Everything `_insert` relies on, looked at before anything is written."""
    seen: set[int] = set()
    for message in conversation["messages"]:
        good = message["role"] in ROLES and isinstance(message["text"], str) and message["id"] not in seen
        good = good and (message["parent_id"] is None or message["parent_id"] in seen)
        good = good and message.get("status", "done") in STATUSES and isinstance(message.get("thinking", ""), str)
        good = good and isinstance(message.get("stats", {}), dict) and isinstance(message.get("attachments", []), list)
        if not good:
            raise ValueError(message)
        seen.add(message["id"])
    if not isinstance(conversation["title"], str) or not isinstance(conversation.get("settings", {}), dict):
        raise ValueError(conversation["title"])
    return conversation


def _insert(chats: Chats, source: dict) -> Conversation:
    new = chats.create(source["title"], source.get("settings"))
    ids: dict[int | None, int | None] = {None: None}
    for message in source["messages"]:
        status = message.get("status", "done")
        ids[message["id"]] = chats.add(
            new.id, ids[message["parent_id"]], message["role"], message["text"], thinking=message.get("thinking", ""),
            status="interrupted" if status == "running" else status, stats=message.get("stats"),
            attachments=message.get("attachments")).id
    if ids.get(source.get("leaf")):
        chats.show(ids[source["leaf"]])
    if source.get("pinned"):
        chats.pin(new.id, True)
    return chats.conversation(new.id)


def _import_markdown(chats: Chats, text: str) -> Conversation:
    head, *rest = _MARK.split(text)
    title = re.search(r"^# (.+)$", head, re.MULTILINE)
    new = chats.create(title.group(1).strip() if title else "")
    parent = None
    for role, body in zip(rest[::2], rest[1::2], strict=True):
        parent = chats.add(new.id, parent, role, body.strip("\n")).id
    return chats.conversation(new.id)
