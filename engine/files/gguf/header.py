"""The header of a GGUF file, read within limits: what it says of itself, and where its tensors lie.

The gguf package makes an object of every word of a vocabulary, and of as many words as a file claims to have; here
arrays are stepped over, and whatever a file claims must fit into it. Only the kinds of quantisation are the package's.
"""
from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.core import UserError
from engine.files.chat_parts import is_pointer, only_a_note

MAGIC = b"GGUF"
N_TENSORS_AT = 8        # behind the version
VERSIONS = (2, 3)
SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # by the number of a field's type
STRING, ARRAY = 8, 9
MOST_WORDS = 1 << 22    # texts in all arrays together; the largest vocabulary and its merges have a fifth of that
MOST_FIELDS = 1 << 16
LONGEST_NAME = 200
TEXTS = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")
MOST_TENSORS = 1 << 20
MOST_NUMBERS = 16       # of an array that is kept: sections of a rotary embedding
DATA = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class GgufTensor:
    """kind: the package's name of its quantisation. shape: its own, last axis first as the file has it. data: a view of
    the file; of what is quantised, rows of bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class GgufHeader:
    """fields: its single numbers and texts, and its short arrays of numbers. tensors: without data where only the
    beginning of the file is here."""

    fields: dict[str, int | float | bool | str | tuple]
    tensors: tuple[GgufTensor, ...]

    @property
    def texts(self) -> dict[str, str]:
        """Some of its fields, see TEXTS."""
        return {key: str(self.fields.get(key, "")) for key in TEXTS}


def require_package() -> None:
    """UserError, in one sentence, where GGUF files cannot be read."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("Reading GGUF files needs the package gguf: pip install gguf.") from error


def joined(headers: Sequence[GgufHeader]) -> GgufHeader:
    """That of a model in several parts: the first one's fields, the tensors of all."""
    return GgufHeader(headers[0].fields, tuple(tensor for header in headers for tensor in header.tensors))


def read_beginning(path: Path) -> GgufHeader | None:
    """Of a file whose beginning may be all that is here; None where that is too little, or no GGUF file."""
    try:
        data = np.memmap(path, mode="r")
        return _Reader(data).header(with_data=False) if bytes(data[:4]) == MAGIC else None
    except (OSError, ValueError, KeyError, IndexError, struct.error):
        return None


def write_metadata(path: Path, to: Path) -> None:
    """A GGUF file without tensors that says of itself what the file at `path` says, whose beginning is enough."""
    reader = _Reader(np.memmap(path, mode="r"))
    reader.fields()
    metadata = bytearray(reader.bytes[:reader.at])
    struct.pack_into("<Q", metadata, N_TENSORS_AT, 0)
    to.write_bytes(metadata)


def read_header(path: Path) -> GgufHeader:
    """UserError if it is no whole GGUF file."""
    require_package()
    try:
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
        data = np.memmap(path, mode="r")
        if bytes(data[:4]) != MAGIC:
            if is_pointer(path):
                raise UserError(only_a_note(path))
            raise UserError(f"{path} is not a GGUF file.")
        return _Reader(data).header()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise UserError(f"{path} is damaged or incomplete ({error}); get it again.") from error


class _Reader:
    """One pass over the header. ValueError, KeyError, IndexError, struct.error: it is none."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.bytes, self.at, self.words = data, memoryview(data), len(MAGIC), MOST_WORDS

    def header(self, with_data: bool = True) -> GgufHeader:
        n_tensors, fields = self.fields()
        infos = [self.info() for _ in range(n_tensors)]
        start = _aligned(self.at, fields.get("general.alignment", 32)) if with_data else None
        tensors = tuple(self.tensor(start, *info) for info in infos)
        if len({tensor.name for tensor in tensors}) < n_tensors:
            raise ValueError("one name for two things")
        return GgufHeader(fields, tensors)

    def fields(self) -> tuple[int, dict]:
        """Number of tensors, and what stands before them."""
        if self.number("I") not in VERSIONS:
            raise ValueError("another version of the format, or another order of bytes")
        n_tensors, n_fields = self.number("Q"), self.number("Q")
        if n_tensors > MOST_TENSORS or n_fields > MOST_FIELDS:
            raise ValueError(f"{n_tensors:,} tensors, {n_fields:,} fields")
        found = [(self.text(), self.value()) for _ in range(n_fields)]
        if len({name for name, _ in found}) < n_fields:
            raise ValueError("one name for two things")
        return n_tensors, {name: value for name, value in found if value is not None}

    def number(self, kind: str):
        (value,) = struct.unpack_from("<" + kind, self.bytes, self.at)
        self.at += struct.calcsize(kind)
        return value

    def text(self) -> str:
        n = self.skip_text()
        return str(self.bytes[self.at - n:self.at], "utf-8")

    def skip_text(self) -> int:
        n = self.number("Q")
        self.at += n
        if self.at > len(self.bytes):
            raise ValueError("a text that is longer than the file")
        return n

    def value(self) -> int | float | bool | str | tuple | None:
        """None for an array of texts, or of many numbers."""
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        return self.number(SCALARS[kind])

    def array(self) -> tuple | None:
        kind, n = self.number("I"), self.number("Q")
        if n <= MOST_NUMBERS and kind != STRING and SCALARS[kind]:
            return tuple(self.number(SCALARS[kind]) for _ in range(n))
        return self.skip_array(kind, n)

    def skip_array(self, kind: int, n: int) -> None:
        if kind == STRING:
            self.words -= n
            if self.words < 0:
                raise ValueError(f"a list of {n:,} texts")
            for _ in range(n):
                self.skip_text()
        elif SCALARS[kind]:
            self.at += n * struct.calcsize(SCALARS[kind])
            if self.at > len(self.bytes):
                raise ValueError("a list that is longer than the file")
        else:
            raise ValueError("a list of lists")

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n = self.text(), self.number("I")
        if not 1 <= n <= 4 or len(name) > LONGEST_NAME or not name.isprintable():
            raise ValueError(f"a tensor of {n} axes, or without a name")
        return name, tuple(self.number("Q") for _ in range(n)), self.number("I"), self.number("Q")

    def tensor(self, start: int | None, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        """start: of all data in the file; None: it is not here."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        kind = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[0] % block:
            raise ValueError(f"{name} has the shape {shape}")
        if start is None:
            return GgufTensor(name, kind.name, shape, np.empty(0, np.uint8))
        n_bytes = math.prod(shape) // block * block_bytes
        if start + offset + n_bytes > len(self.data):
            raise ValueError(f"{name} ends behind the end of the file")
        data = self.data[start + offset:start + offset + n_bytes].view(DATA.get(kind.name, np.uint8))
        return GgufTensor(name, kind.name, shape, data.reshape(*reversed(shape[1:]), -1))


def _aligned(at: int, alignment) -> int:
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError("an alignment that is none")
    return -(-at // alignment) * alignment
