"""A file that may have hundreds of megabytes, one conversation's JSON after the other; never more than that in memory.

Exports come as a list of conversations, as one conversation a file, as a line each, or as a list below the name
`conversations`, bare or in a zip (ChatGPT's newer ones in several files, `conversations-000.json` and so on). What is
read is bounded however it is packed: of a conversation, and of all together.
"""
from __future__ import annotations

import codecs
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from app.incoming import FILE_BYTES
from app.strings import TEXT
from engine import UserError

CONVERSATION_CHARACTERS = 60 << 20
PARTS = 4_000_000  # commas, brackets and the like of a conversation: parsed, they take some hundred times their bytes
ZIP_FILES = 200_000
CHUNK_BYTES = 1 << 20
MOST_CHARACTERS = CONVERSATION_CHARACTERS + CHUNK_BYTES  # that wait for the end of a conversation
LIST = "conversations"
# A bracket, what stands between two of them, or a quotation mark without its other half.
_TOKEN = re.compile(r'[\[\]{}]|(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")++|"', re.DOTALL)
_NAMED, _BETWEEN = re.compile(rf'"{LIST}"\s*:\s*\Z'), ", \t\r\n"
# Half of a pair of UTF-16, as some programs cut emojis; what follows two backslashes is no escape.
_ESCAPES = re.compile(r"\\\\|\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|\\u[dD][89a-fA-F]\w\w")
Heard = Callable[[float], None]


@dataclass(frozen=True)
class Piece:
    """text: the JSON of one conversation, or of what else stands there; "" where a list of them begins. head: what
    stood before that list, as JSON of its own. file: its path in a zip, "" for a bare file."""

    text: str
    head: str = ""
    file: str = ""


def is_zip(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(4) in (b"PK\3\4", b"PK\5\6")


def pieces(file: BinaryIO, heard: Heard) -> Iterator[Piece]:
    """Every piece of a bare file or a zip. heard: is told the share that lies behind. UserError for what is damaged or
    larger than anybody's conversations."""
    if is_zip(file):
        yield from _of_zip(file, heard)
        return
    size = file.seek(0, 2)
    file.seek(0)
    yield from _of_chunks(iter(partial(file.read, CHUNK_BYTES), b""), partial(_told, heard, 0, max(size, 1)))


def _of_zip(file: BinaryIO, heard: Heard) -> Iterator[Piece]:
    try:
        with zipfile.ZipFile(file) as box:
            found = [each for each in box.infolist() if each.filename.lower().endswith((".json", ".jsonl"))]
            total = sum(each.file_size for each in found)
            if len(box.filelist) > ZIP_FILES or total > FILE_BYTES:
                raise UserError(TEXT["import_long"])
            done = 0
            for each in sorted(found, key=lambda entry: entry.filename):
                with box.open(each) as opened:
                    chunks = iter(partial(opened.read, CHUNK_BYTES), b"")
                    for piece in _of_chunks(chunks, partial(_told, heard, done, max(total, 1))):
                        yield Piece(piece.text, piece.head, each.filename)
                done += each.file_size
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not the file's
            raise
        raise UserError(TEXT["import_damaged"]) from error


def _told(heard: Heard, done: int, total: int, n_bytes: int) -> None:
    heard((done + n_bytes) / total)


def _of_chunks(chunks: Iterator[bytes], heard: Callable[[int], None]) -> Iterator[Piece]:
    scanner, decoder, n_bytes = _Scanner(), codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        for chunk in chunks:
            n_bytes += len(chunk)
            if n_bytes > FILE_BYTES:
                raise UserError(TEXT["import_long"])
            yield from scanner.take(decoder.decode(chunk))
            heard(n_bytes)
        decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        raise UserError(TEXT["import_foreign"]) from error
    scanner.end()


class _Scanner:
    """Finds where each piece begins and ends, without parsing it."""

    def __init__(self) -> None:
        self._text, self._at, self._start = "", 0, None  # what is not done with; the next to look at; a piece's start
        self._depth, self._level, self._head = 0, 0, ""  # how deep we are, and how deep pieces lie
        self._begun, self._parts = False, 0  # whether a piece began in what came last; what has come of an open one

    def take(self, text: str) -> Iterator[Piece]:
        self._text, self._begun = self._text + text, False
        for token in _TOKEN.finditer(self._text, self._at):
            word = token[0]
            if word == '"':
                break  # a text whose end is still to come
            self._at = token.end()
            if word in ("[", "{"):
                if self._open(word, token.start()):
                    yield Piece("", self._head)
            elif word in ("]", "}"):
                piece = self._close()
                if piece:
                    yield piece
            elif self._start is None and self._depth == self._level and word.strip(_BETWEEN):
                raise UserError(TEXT["import_foreign"])  # nothing but commas stands between pieces
        done = self._at if self._start is None else self._start
        self._text, self._at = self._text[done:], self._at - done
        self._start = None if self._start is None else 0
        self._parts = _n_parts(self._text) if self._begun else self._parts + _n_parts(text)
        if len(self._text) > MOST_CHARACTERS or self._start is not None and self._parts > PARTS:
            raise UserError(TEXT["import_long"])

    def end(self) -> None:
        """UserError where the file ended too early."""
        if self._depth or self._text[self._at:]:
            raise UserError(TEXT["import_damaged"])

    def _open(self, word: str, position: int) -> bool:
        """Whether a list below the name begins."""
        named = word == "[" and self._depth == 1 and self._start is not None and bool(
            _NAMED.search(self._text[max(self._start, position - 100):position]))
        if named:
            self._head, self._level, self._start = self._text[self._start:position] + "[]}", 2, None
        elif word == "[" and self._depth == 0:
            self._level = 1
        elif self._depth == self._level:
            self._start, self._begun = position, True
        self._depth += 1
        return named

    def _close(self) -> Piece | None:
        self._depth -= 1
        piece = None
        if self._start is not None and self._depth == self._level:
            text, self._start = self._text[self._start:self._at], None
            if _n_parts(text) > PARTS:
                raise UserError(TEXT["import_long"])
            piece = Piece(_whole_escapes(text), self._head)
        if self._depth < self._level:
            self._level, self._head = 0, ""
        return piece


def _n_parts(text: str) -> int:
    return sum(map(text.count, '",[{'))


def _whole_escapes(text: str) -> str:
    """The same JSON, with a replacement character for every half of an emoji."""
    if "\\u" not in text:
        return text
    return _ESCAPES.sub(lambda found: "\ufffd" if len(found[0]) == 6 else found[0], text)
