"""Named tensors of a checkpoint, read on demand: the one thing every source of weights has in common.

A `TensorSource` knows names, shapes and dtypes without reading, hands out one tensor or some leading rows of it, and
nothing more; it does not know what a layer is. `SafetensorsFolder` is the source for a Hub-style folder. Its tensors
are views of memory-mapped files: no anonymous memory, and they stay valid as long as the tensor lives.
Pickles are refused by name and by content: nothing downloaded is ever executed.
"""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from engine.core import UserError
from engine.disk import read_json
from engine.files.chat_parts import is_pointer, only_a_note
from engine.files.manifest import INDEX, SINGLE

Tensor = torch.Tensor
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Pickle protocols 2 to 5; the zip archives that torch.save writes.
PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
          "F8_E8M0": torch.float8_e8m0fnu}


class TensorSource(Protocol):
    """What a reader of checkpoints needs. Keys are source names; `UserError` when the file behind a key is damaged."""

    def keys(self) -> Iterable[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def stored_bytes(self, key: str) -> int:
        """Bytes that `get` reads: those in the file, before any decoding."""

    def get(self, key: str) -> Tensor: ...

    def get_slice(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start..stop along the first axis, reading only those."""


class SafetensorsFolder:
    """The `*.safetensors` of one folder: single, sharded with an index, or several without one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, safe_open] = {}
        self._file_of = self._files_by_key()

    def keys(self) -> Iterable[str]:
        return self._file_of.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        name = self._slice(key).get_dtype()
        if name not in DTYPES:
            raise UserError(f"{self._file_of[key]}: the tensor {key} has the unknown type {name}.")
        return DTYPES[name]

    def stored_bytes(self, key: str) -> int:
        return torch.Size(self.shape(key)).numel() * self.dtype(key).itemsize

    def get(self, key: str) -> Tensor:
        return self._handle(key).get_tensor(key)

    def get_slice(self, key: str, start: int, stop: int) -> Tensor:
        return self._slice(key)[start:stop]

    def _slice(self, key: str):
        return self._handle(key).get_slice(key)

    def _handle(self, key: str) -> safe_open:
        return self._open[self._file_of[key]]

    def _files_by_key(self) -> dict[str, str]:
        promised = _index(self.folder) if (self.folder / INDEX).is_file() else None
        files = sorted(set(promised.values())) if promised else _weight_files(self.folder)
        self._open = {name: open_safetensors(self.folder / name) for name in files}
        present = {key: name for name, handle in self._open.items() for key in handle.keys()}
        for key, name in (promised or {}).items():
            if present.get(key) != name and key not in self._open[name].keys():
                raise UserError(f"{name} lacks the tensor {key}, which {INDEX} promises; download it again.")
        return promised or present


def open_safetensors(path: Path) -> safe_open:
    """A handle on one file, memory-mapped. UserError for a pickle in disguise, a truncated or a foreign file."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
        is_note = is_pointer(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if is_note:
        raise UserError(only_a_note(path.name))
    # A safetensors header of 640 bytes also starts with 80 02; its JSON follows the eight bytes of the length.
    if head.startswith(PICKLE_MAGIC) and head[8:9] != b"{":
        raise UserError(f"{path.name} is a pickle in disguise, which could run code; get the safetensors files.")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path.name} is damaged or incomplete ({error}); download it again.") from error


def read_index(folder: Path) -> dict[str, str]:
    """Key -> name of its file, as the folder's index says. UserError where it is damaged."""
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{folder / INDEX} is damaged; download it again, or choose another source.") from error


def _index(folder: Path) -> dict[str, str]:
    names = read_index(folder)
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{INDEX} names {name!r}, which is not a safetensors file of this folder.")
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which {INDEX} names; download the checkpoint again.")
    return names


def _weight_files(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise UserError(_no_weights(folder))
    return files


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return f"{folder} holds {pickles[0]}, a pickle, which could run code; get the safetensors files instead."
    return f"{folder} holds no *.safetensors files; give the folder of a downloaded checkpoint."
