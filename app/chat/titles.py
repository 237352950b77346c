"""What a conversation is called until a person renames it: at first the first words, then what the model says.

The model is asked beside the conversation, in a small cache of its own, when nobody waits for an answer. What it says
is taken only if it is a title.
"""
from __future__ import annotations

import logging
import re
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress

from app.chat.chats import Chats
from app.library.open_model import Models
from app.strings import TEXT
from engine import Event, MachineError, Sampling, UserError

_log = logging.getLogger(__name__)
LONGEST = 48  # characters of the first words
MOST_WORDS = 10
EXCERPTS = (800, 400, 200, 100)  # characters of the question and of the answer: the first that fits the small cache
SAMPLING = Sampling(temperature=0, max_tokens=96, stop=("\n",))
MODEL_TITLES = "model_titles"  # name of the preference
WISHES = {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}  # a template takes what it knows


class Titles:
    """One per program. `stop` may be called from any thread."""

    def __init__(self, chats: Chats, models: Models):
        self._chats, self._models = chats, models
        self._lock = threading.Lock()
        self._answer = None  # of the model that is being asked
        self._asked: set[int] = set()  # conversations for which it has been

    def begin(self, conversation_id: int) -> None:
        """The first words of the first question: costs nothing."""
        with suppress(UserError):  # it was deleted just now
            if not self._chats.conversation(conversation_id).title:
                self._chats.rename(conversation_id, first_words(self._beginning(conversation_id)[0]), by_user=False)

    def improve(self, conversation_id: int, idle: Callable[[], bool]) -> bool:
        """Let the model write the title, once; whether it did. Stopped by a person who goes on, it may be tried again.

        idle: nobody waits for an answer.
        """
        try:
            question, answer = self._beginning(conversation_id)
            if not answer or conversation_id in self._asked or not self._wanted(conversation_id, question):
                return False
            title = self._ask(conversation_id, question, answer, idle)
            if not title or not self._wanted(conversation_id, question):
                return False
            self._chats.rename(conversation_id, title, by_user=False)
        except (UserError, MachineError, sqlite3.OperationalError):
            return False  # the conversation, the model or the room for it has gone: the first words are a title, too
        except Exception as error:
            _log.error("A title failed", exc_info=error)
            return False
        return True

    def stop(self) -> None:
        with self._lock:
            if self._answer:
                self._answer.close()

    def _beginning(self, conversation_id: int) -> tuple[str, str]:
        """The first question of what is shown and its answer, "" where there is none yet."""
        path = self._chats.path(conversation_id)
        return tuple(next((m.text for m in path if m.role == role), "") for role in ("user", "assistant"))

    def _wanted(self, conversation_id: int, question: str) -> bool:
        """Whether the title is still that of the beginning, and the model may be asked."""
        conversation = self._chats.conversation(conversation_id)
        return (conversation.title == first_words(question) and not conversation.title_by_user
                and self._chats.preference(MODEL_TITLES, True) and self._models.info().get("is_demo") is False)

    def _ask(self, conversation_id: int, question: str, answer: str, idle: Callable[[], bool]) -> str:
        for length in EXCERPTS:
            with self._lock:
                engine = self._models.engine
                if engine is None or not idle():  # another model is being opened, or somebody waits
                    return ""
                self._answer = engine.side_chat(request(question, answer, length), SAMPLING, WISHES)
            events = list(self._answer)
            if not events or events[-1].reason in (None, "stopped"):
                return ""
            if events[-1].reason != "error":  # too long for the small cache
                self._asked.add(conversation_id)
                return title_in(events)
        return ""


def first_words(text: str) -> str:
    words = " ".join(text.split())
    if len(words) <= LONGEST:
        return words
    return words[:LONGEST].rsplit(" ", 1)[0].rstrip(".,;:") + "…"


def request(question: str, answer: str, length: int) -> list[dict]:
    """What the model is asked: with so many characters of the first question and of its answer."""
    return [{"role": "user", "content": TEXT["title_request"].format(question=question[:length],
                                                                     answer=answer[:length])}]


def title_in(events: list[Event]) -> str:
    """The title in the model's answer; "" where there is none."""
    if not events or events[-1].reason != "stop":
        return ""
    said = "".join(event.text for event in events if event.kind == "answer").strip()
    words = re.sub(r"^title:", "", said, flags=re.IGNORECASE).strip(" \n\t\"'“”«»*#_`").split()
    return " ".join(words).rstrip(".") if len(words) <= MOST_WORDS else ""
