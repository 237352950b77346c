"""Text to token ids and back: the prompt of a conversation, and an answer that grows token by token.

A prompt is rendered by the model's own chat template (engine/chat/template.py) and encoded so that control tokens which
somebody wrote into a message stay plain text. An answer is decoded piece by piece; a piece never ends inside a
character. What special tokens mean, and what is shown (thinking, answer, stop texts), is
engine/chat/reasoning_parser.py. One lock guards the tokenizer: transformers' are not thread-safe.
"""
from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from engine.chat.template import LOOK_SECONDS, ChatTemplate
from engine.core import Stopped, UserError, never
from engine.progress import unless

# Private-use characters around a control token that a message contains.
_LEFT, _RIGHT = "\ue0f0", "\ue0f1"
# Tokens without a whole character in a row after which we stop waiting: no character has more than four bytes.
_MAX_HELD = 8
_BROKEN = "\N{REPLACEMENT CHARACTER}"
LONG = 50_000                         # characters; the tokenizer takes seconds for a million, and never looks up
MAX_KEPT = 100_000                    # texts whose number of tokens is kept


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation: its token ids and its text. continues: it ends inside the model's last answer. plain: it
    is no conversation, but any text."""

    ids: list[int]
    text: str
    continues: bool = False
    plain: bool = False


class Tokens:
    """A model's tokenizer (transformers') with its chat template. UserError when either is missing or unusable."""

    def __init__(self, tokenizer):
        if tokenizer is None:
            raise UserError("This model has no tokenizer; put its tokenizer.json and tokenizer_config.json "
                            "into the folder.")
        if not tokenizer.chat_template:
            raise UserError("This model has no chat template, so it is not a chat model; take its instruction-tuned "
                            "variant, or put a chat_template.jinja into the folder.")
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._kept: dict[bytes, int] = {}  # tokens of a text, by its hash
        self._beginning = [i for i in tokenizer.encode("a")[:1] if i == tokenizer.bos_token_id]  # of a plain text
        self.special = _special_tokens(tokenizer)
        self.folds_system = False
        self.added = frozenset(tokenizer.get_added_vocab())
        names = sorted(self.special.values(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._marked = re.compile(f"{_LEFT}({self._control.pattern}){_RIGHT}|[{_LEFT}{_RIGHT}]")
        self.template = ChatTemplate(tokenizer.get_chat_template(),
                                     {name: str(text) for name, text in tokenizer.special_tokens_map.items()
                                      if not isinstance(text, (list, tuple))})

    def prompt(self, messages: list[dict] | str, answer: bool = True, wishes: Mapping | None = None,
               stopped: Callable[[], bool] = never) -> Prompt:
        """The conversation as the model reads it. With `answer` it ends where the model's turn begins or, when the
        last message is the model's own, where that one ends: the model goes on with it. wishes, stopped: see
        ChatTemplate. A text is taken as it is, with the control tokens in it."""
        if isinstance(messages, str):
            return self._plain(messages, stopped)
        _check_messages(messages)
        wishes = {**(wishes or {}), "tools": self._mark((wishes or {}).get("tools"))}
        given = [self._mark(message) for message in messages]
        continues = answer and given[-1]["role"] == "assistant" and bool(str(given[-1].get("content") or "").strip())
        marked = self._rendered(given, answer and not continues, wishes, stopped)
        if continues:
            marked = _up_to_the_end_of(str(given[-1]["content"]), marked)
        pieces = self._marked.split(marked)
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if piece:  # odd pieces were marked: plain text, whatever they look like; None: a mark the template tore off
                ids += self._encode(piece, i % 2 == 1, stopped)
        return Prompt(ids, "".join(filter(None, pieces)), continues)

    def _rendered(self, given: list[dict], generation: bool, wishes: Mapping, stopped: Callable[[], bool]) -> str:
        """A template that refuses a system message gets it at the beginning of the first question, from then on."""
        if self.folds_system:
            return self.template.render(_folded(given), generation, wishes, stopped)
        try:
            return self.template.render(given, generation, wishes, stopped)
        except UserError:
            if _folded(given) == given:
                raise
            try:
                rendered = self.template.render(_folded(given), generation, wishes, stopped)
            except UserError:
                rendered = None
            if rendered is None:
                raise
        self.folds_system = True
        return rendered

    def _plain(self, text: str, stopped: Callable[[], bool]) -> Prompt:
        ids = self._beginning + self._encode(text, False, stopped)
        if not ids:
            raise UserError("The prompt is empty; write a text for the model to go on with.")
        return Prompt(ids, text, plain=True)

    def weigh(self, message: dict, stopped: Callable[[], bool] = never) -> int:
        """Tokens of the message's own text, without the template's. Counted once, then kept."""
        text = str(message.get("content") or "") + str(message.get("reasoning_content") or "")
        key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key not in self._kept:
            if stopped():
                raise Stopped
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = len(self._encode(text, True, stopped))
        return self._kept[key]

    def decode(self, ids: list[int]) -> str:
        with self._lock:
            return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def close(self) -> None:
        self.template.close()

    def _encode(self, text: str, plain: bool, stopped: Callable[[], bool] = never) -> list[int]:
        def work() -> list[int]:
            with self._lock:
                return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
        return work() if len(text) < LONG and not self._lock.locked() else unless(stopped, work, LOOK_SECONDS)

    def _mark(self, value):
        """Control tokens inside the strings of a message, wrapped so that the template's own can be told from them."""
        if isinstance(value, str):
            value = value.replace(_LEFT, "").replace(_RIGHT, "")
            return self._control.sub(f"{_LEFT}\\g<0>{_RIGHT}", value)
        if isinstance(value, dict):
            return {key: self._mark(item) for key, item in value.items()}
        return [self._mark(item) for item in value] if isinstance(value, (list, tuple)) else value


def _folded(messages: list[dict]) -> list[dict]:
    """Without system messages; what they say stands before the first question, where there is one."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [message for message in messages if message["role"] != "system"]
    if not system or not rest or rest[0]["role"] != "user":
        return messages
    return [rest[0] | {"content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]


class TextStream:
    """Token ids in, whole characters out. Constant work a token: only the last few tokens are decoded again.

    A piece is emitted when the decoded text ends in a whole character. Its tokens stay as context for the next one,
    because some tokenizers decode a token differently at the start of a text.
    """

    def __init__(self, tokens: Tokens, after: Sequence[int] = ()):
        self._tokens = tokens
        self._context: list[int] = list(after)  # tokens that came before, of a text that goes on
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._held.append(token)
        text = self._text(self._held)
        if not text.endswith(_BROKEN):
            return self._emit(len(self._held), text)
        if len(self._held) > _MAX_HELD:  # not text at all; the last three may still be the start of a character
            return self._emit(len(self._held) - 3, self._text(self._held[:-3]))
        return ""

    def flush(self) -> str:
        """What is left, without a character that was cut off at the end."""
        text = self._text(self._held) if self._held else ""
        self._context, self._held = [], []
        return text.rstrip(_BROKEN)

    def _emit(self, n_tokens: int, text: str) -> str:
        self._context, self._held = self._held[:n_tokens], self._held[n_tokens:]
        return text

    def _text(self, ids: list[int]) -> str:
        before = self._tokens.decode(self._context) if self._context else ""
        return self._tokens.decode(self._context + ids)[len(before):]


def _special_tokens(tokenizer) -> dict[int, str]:
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))


def _up_to_the_end_of(answer: str, rendered: str) -> str:
    """The rendered conversation without what the template writes after its last answer (it may strip blanks)."""
    found = rendered.rfind(answer.strip())
    if found < 0:
        raise UserError("This model's chat template rewrites its answers, so this one cannot be continued; "
                        "regenerate it instead.")
    end = found + len(answer.strip())
    return rendered[:end] + answer[len(answer.rstrip()):]


def _check_messages(messages: list[dict]) -> None:
    if not messages:
        raise UserError("The conversation is empty; write a message first.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError("Every message needs a role (system, user or assistant) and a content.")
        if not isinstance(message.get("content"), str):
            raise UserError(f"The content of a {message['role']} message must be text.")
