"""The compressed folder: floe.json (the manifest), trunk.safetensors, one experts file per MoE layer.

Files are ordinary safetensors, written atomically (temporary name, fsync, rename), so a file that has its name is
whole. Sizes are checked when a folder is opened, the checksum of an expert when it is first used. Knows bytes, not
models: what a blob means is kernels/layout.py.
"""
from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import warnings
import zlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from engine.core import MachineError, UserError
from kernels.layout import Layout

FORMAT_VERSION = 1
MANIFEST = "floe.json"
TRUNK = "trunk.safetensors"
MTP = "mtp.safetensors"
COPIED = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
          "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE")
_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
           torch.float32: "F32", torch.int32: "I32", torch.bool: "BOOL", torch.float64: "F64"}


def experts_name(layer: int) -> str:
    return f"experts-{layer:05d}.safetensors"


@dataclass(frozen=True)
class FileEntry:
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """floe.json. `calibration` is empty until `calibrate` has run. ValueError for numbers that no model has."""

    group_size: int
    trunk_bits: int
    layers: int
    experts: int
    top_k: int
    neurons: int
    hidden: int
    files: tuple[FileEntry, ...]
    calibration: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        numbers = (self.layers, self.experts, self.top_k, self.neurons, self.hidden)
        good = all(type(n) is int and n > 0 for n in numbers) and self.top_k <= self.experts
        if not (good and self.trunk_bits in (16, 8, 4) and self.layout and self._levels_fit()):
            raise ValueError("these are not the numbers of a model")

    def _levels_fit(self) -> bool:
        """Whether every level's budgets, or thresholds, are as many and as large as this model can have."""
        most = self.top_k * self.neurons
        for level in self.calibration.get("levels", {}).values():
            budgets, thresholds = level.get("budgets"), level.get("thresholds")
            if budgets is not None and not (len(budgets) == self.layers and all(
                    refined >= 0 <= down_only and refined + down_only <= most for refined, down_only in budgets)):
                return False
            if thresholds is not None and [len(row) for row in thresholds] != [self.experts] * self.layers:
                return False
        return True

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.hidden, self.neurons, self.group_size)

    def save(self, folder: Path) -> None:
        write_text_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(folder: Path) -> Manifest:
        """UserError when the folder holds no compressed model, a newer one, or a damaged manifest."""
        try:
            raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version = raw["format_version"]
            if version > FORMAT_VERSION:
                raise UserError(f"{folder} was made by a newer Floe Chat (format {version}, this one reads up to "
                                f"{FORMAT_VERSION}); update Floe Chat.")
            files = tuple(FileEntry(**entry) for entry in raw.pop("files"))
            return Manifest(files=files, **raw)
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no compressed model: {MANIFEST} is missing.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged; download or compress the model again.") from error

    def check_sizes(self, folder: Path) -> None:
        """UserError for a file that is missing or has another size than the manifest says."""
        for entry in self.files:
            path = folder / entry.path
            size = path.stat().st_size if path.is_file() else None
            if size != entry.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
                raise UserError(f"{path} {found}; download or compress the model again.")


def is_compressed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def write_text_atomically(path: Path, text: str) -> None:
    """The whole text under its name, or what was there before. MachineError for a full disk."""
    temporary = path.with_name(path.name + ".part")
    with writing(temporary), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class writing:
    """Turns a full or unwritable disk into one sentence, and removes the temporary file after any failure."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            return
        self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"The disk is full: make room on the disk of {self.temporary.parent} and start again; "
                               "finished files are kept.") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{self.temporary.parent} cannot be written to; choose another folder.") from error
        if isinstance(error, OSError):
            raise MachineError(f"{self.temporary} cannot be written ({error.strerror}); check the disk or choose "
                               "another folder.") from error


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, the header last, into a place kept free for it.

    The header is padded with spaces, so that the first tensor starts at a multiple of 128 bytes. Use as a context
    manager; the file appears under its name only when the block ends well.
    """

    def __init__(self, path: Path, n_tensors: int, metadata: dict[str, str] | None = None) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".part")
        self.header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
        room = 8 + 512 + len(json.dumps(metadata or {})) + 320 * n_tensors
        self.start = -(-room // 128) * 128
        self.position = 0

    def __enter__(self) -> SafetensorsWriter:
        self.guard = writing(self.temporary)
        with self.guard:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.temporary.open("wb")
            self.file.seek(self.start)
        return self

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Announce a tensor whose bytes follow by `write`, in one or many pieces."""
        n_bytes = dtype.itemsize
        for size in shape:
            n_bytes *= size
        self.header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape),
                             "data_offsets": [self.position, self.position + n_bytes]}
        self.position += n_bytes

    def write(self, tensor: torch.Tensor) -> None:
        self.file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.begin(name, tensor.dtype, tuple(tensor.shape))
        self.write(tensor)

    def __exit__(self, kind, error, trace) -> None:
        try:
            with self.guard, self.file:
                if error is not None:
                    raise error
                self.finish()
        finally:
            if error is not None:
                self.temporary.unlink(missing_ok=True)

    def finish(self) -> None:
        """The header, and the file under its name; `with` does this at the end of its block."""
        text = json.dumps(self.header, separators=(",", ":")).encode()
        room = self.start - 8
        assert len(text) <= room, f"header of {len(text)} bytes does not fit {room}"
        assert self.file.tell() == self.start + self.position, "a tensor has fewer or more bytes than announced"
        self.file.seek(0)
        self.file.write(room.to_bytes(8, "little") + text.ljust(room))
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.path)


def file_entry(path: Path) -> FileEntry:
    """Name, size and sha256 of a finished file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return FileEntry(path.name, path.stat().st_size, digest.hexdigest())


class MappedFile:
    """A safetensors file mapped into memory, read-only; tensors are views, pages load when touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            n = int.from_bytes(self.map[:8], "little")
            self.header = json.loads(self.map[8:8 + n])
            self.start = 8 + n
            ends = [entry["data_offsets"][1] for name, entry in self.header.items() if name != "__metadata__"]
            if self.start + max(ends, default=0) != len(self.map):
                raise ValueError("the header does not describe all of the file")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} cannot be read as safetensors; download or compress the model again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self.header

    def tensor(self, name: str) -> torch.Tensor:
        """A read-only view of the file; never write to it."""
        entry = self.header[name]
        dtype = next(d for d, text in _DTYPES.items() if text == entry["dtype"])
        low, high = entry["data_offsets"]
        if high == low:
            return torch.empty(entry["shape"], dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the buffer is read-only; that is what we want
            flat = torch.frombuffer(self.map, dtype=dtype, count=(high - low) // dtype.itemsize,
                                    offset=self.start + low)
        return flat.view(entry["shape"])


class ExpertsFile(MappedFile):
    """One MoE layer: blobs uint8 [E, blob_bytes], float32 biases where the model has them, crc32 per expert."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.blobs = self.tensor("blobs")
            self.blobs_at = self.start + self.header["blobs"]["data_offsets"][0]  # bytes from the start of the file
            self.checksums = self.tensor("checksums").tolist()
            self.biases = {name: self.tensor(name) for name in ("gate_bias", "up_bias", "down_bias") if name in self}
        except (KeyError, ValueError, TypeError, RuntimeError, StopIteration) as error:
            raise UserError(f"{path} is damaged; download or compress the model again.") from error
        self._verified = [False] * len(self.checksums)

    def verify(self, expert: int) -> None:
        """UserError when the blob differs from what was written; each expert is checked once, at its first use."""
        if self._verified[expert]:
            return
        if zlib.crc32(self.blobs[expert].numpy()) != self.checksums[expert]:
            raise UserError(f"{self.path} is damaged (expert {expert} does not match its checksum); "
                            "download or compress the model again.")
        self._verified[expert] = True
