"""A text as a file that a person imports."""
from __future__ import annotations

from io import BytesIO

from app.chat.chats import Chats, Conversation
from app.chat.import_export import import_file


def import_text(chats: Chats, text: str) -> list[Conversation]:
    """The conversations that were not there before."""
    return import_file(chats, BytesIO(text.encode("utf-8", "surrogatepass"))).made
