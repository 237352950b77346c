"""LM Studio's conversations: a file each, *.conversation.json, as it keeps them in .lmstudio/conversations.

{name, createdAt, pinned, systemPrompt, lastUsedModel, messages: [{versions, currentlySelected}]}; a version is
{type: singleStep, role, content} or {type: multiStep, role, steps}, a step of type contentBlock is thinking where its
style says so. What follows hangs below the selected version. Sources: github.com/YorkieDev/lm-studio-conversation-
converter and parsers with recorded files in public repositories.
"""
from __future__ import annotations

from app.chat.imports.jan import apart
from app.chat.imports.tree import ANSWER, NOWHERE, Node, conversation_of, named_files, objects, part, seconds, words


def recognised(document: dict) -> bool:
    return any(isinstance(each.get("versions"), list) for each in objects(document, "messages")) or (
        document.get("messages") == [] and "createdAt" in document)


def read(document: dict):
    nodes: list[Node] = []
    above, at = None, seconds(document.get("createdAt"))
    model = words(part(document, "lastUsedModel").get("identifier"))
    for i, message in enumerate(objects(document, "messages")):
        versions = objects(message, "versions")
        nodes += [_node(version, f"{i}.{n}", above, at, model) for n, version in enumerate(versions)]
        chosen = message.get("currentlySelected")
        chosen = chosen if type(chosen) is int and 0 <= chosen < len(versions) else len(versions) - 1
        above = f"{i}.{chosen}" if versions else above
    return conversation_of(words(document.get("name")), at, seconds(document.get("assistantLastMessagedAt"))
                           or seconds(document.get("userLastMessagedAt")), nodes, above,
                           words(document.get("systemPrompt")), document.get("pinned") is True)


def _node(version: dict, key: str, above: str | None, at: float | None, model: str) -> Node:
    role = {"user": "user", ANSWER: ANSWER}.get(words(version.get("role")), NOWHERE)
    blocks = objects(version, "steps") if version.get("type") == "multiStep" else [version]
    said: dict[bool, list[str]] = {False: [], True: []}
    for block in blocks:
        texts = [words(each.get("text")) for each in objects(block, "content") if each.get("type") == "text"]
        said[part(block, "style").get("type") == "thinking"].append("".join(texts))
    text, thinking = ("\n\n".join(filter(None, said[which])) for which in (False, True))
    if role == ANSWER:
        text, thinking = apart(text, thinking)
    files = [each for block in blocks for each in objects(block, "content") if each.get("type") == "file"]
    return Node(key, above, role, text, thinking, at, words(part(version, "senderInfo").get("senderName")) or (
        model if role == ANSWER else ""), named_files(files, "name", "fileIdentifier"))
