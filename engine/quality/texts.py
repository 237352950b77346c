"""Texts to measure on: a file of documents or conversations -> lists of token ids.

Plain text (documents end at a line `<|endoftext|>`) or `.jsonl` conversations, one `{"messages": [...]}` a line,
rendered by the model's own chat template; each also as `.xz`. Files are read line by line, so only what is asked for is
read. A document without an end is cut into pieces of at most 65,536 characters. Knows no model.
"""
from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from engine.chat.tokenizer import Tokens
from engine.core import UserError

DOCUMENT_END = "<|endoftext|>"
MAX_CHARACTERS = 1 << 16
OWN_TEXTS = Path(__file__).resolve().parents[2] / "assets" / "texts"
CALIBRATION_TEXT = OWN_TEXTS / "calibration.jsonl"
LONGEST = 512           # tokens of a document that is calibrated on; longer ones are divided
LONGEST_LINE = 1 << 24  # characters: more than a conversation of any context
CALIBRATION_TOKENS = 16_384  # all texts together, unless somebody wishes otherwise
EVALUATION_TEXT = OWN_TEXTS / "evaluation.jsonl"


def read_documents(path: str | Path, tokenizer) -> Iterator[list[int]]:
    """Token ids of each document, in the file's order; without the ones that are too short to measure (< 2 tokens).

    UserError in one sentence for a file that is missing, damaged, or not of the two kinds.
    """
    path = Path(path)
    is_chat = path.name.removesuffix(".xz").endswith(".jsonl")
    documents = _chats(path, tokenizer) if is_chat else _plain(path, tokenizer)
    for ids in documents:
        if len(ids) > 1:
            yield ids


def read_tokens(path: str | Path, tokenizer, n_tokens: int, longest: int | None = None) -> list[list[int]]:
    """The first documents of a file in which `n_tokens` tokens are predicted, all but the first of each document.

    The last one is cut; longer ones than `longest` are divided. UserError when the file holds no text at all; fewer
    tokens than asked for are fine.
    """
    pieces: list[list[int]] = []
    left = n_tokens
    with closing(read_documents(path, tokenizer)) as documents:
        for ids in documents:
            for piece in _divided(ids, longest or len(ids)):
                if left and len(piece) > 1:
                    pieces.append(piece[:left + 1])
                    left -= len(pieces[-1]) - 1
            if not left:
                break
    if not pieces:
        raise UserError(f"{path} holds no text to measure on; give a file with documents or conversations.")
    return pieces


def conversations(path: str | Path) -> Iterator[list[dict]]:
    """The messages of each conversation of a `.jsonl` file, or each line of a plain text as a question of its own."""
    path = Path(path)
    is_chat = path.name.removesuffix(".xz").endswith(".jsonl")
    for number, line in enumerate(_lines(path), 1):
        if text := line.strip():
            yield _messages(path, number, text) if is_chat else [{"role": "user", "content": text}]


def _divided(ids: list[int], longest: int) -> Iterator[list[int]]:
    return (ids[at:at + longest] for at in range(0, len(ids), longest))


def _lines(path: Path) -> Iterator[str]:
    try:
        opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")
        with opened as file:  # a few packed bytes may be a line of gigabytes
            yield from iter(lambda: file.readline(LONGEST_LINE), "")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); give another text file.") from error
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or not UTF-8 text; give another text file.") from error


def _plain(path: Path, tokenizer) -> Iterator[list[int]]:
    for text in _texts(path):
        yield tokenizer(text, verbose=False)["input_ids"]


def _texts(path: Path) -> Iterator[str]:
    held, n_characters = [], 0
    for line in _lines(path):
        is_end = line.strip() == DOCUMENT_END
        if not is_end:
            held.append(line)
            n_characters += len(line)
        if held and (is_end or n_characters >= MAX_CHARACTERS):
            yield from _cut("".join(held).strip())
            held, n_characters = [], 0
    yield from _cut("".join(held).strip())


def _cut(text: str) -> Iterator[str]:
    return (text[at:at + MAX_CHARACTERS] for at in range(0, len(text), MAX_CHARACTERS))


def _chats(path: Path, tokenizer) -> Iterator[list[int]]:
    with closing(Tokens(tokenizer)) as tokens:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield tokens.prompt(_messages(path, number, line), answer=False).ids


def _messages(path: Path, number: int, line: str) -> list[dict]:
    try:
        messages = json.loads(line)["messages"]
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            return messages
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f'Line {number} of {path} is no conversation; each line must be {{"messages": [...]}}.')
