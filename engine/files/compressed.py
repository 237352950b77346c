"""The weights of a compressed folder: trunk.safetensors, and one experts file per MoE layer.

Files are ordinary safetensors, written atomically (temporary name, fsync, rename), so a file that has its name is
whole. The checksum of an expert is checked when it is first used, whole files as engine/files/proof.py says. Knows
bytes, not models: what a blob means is kernels/layout.py.
"""
from __future__ import annotations

import json
import mmap
import os
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import torch

from engine.core import UserError
from engine.disk import writing
from engine.files.tensor_source import DTYPES, open_safetensors

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BIASES = ("gate_bias", "up_bias", "down_bias")


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
        with writing(self.temporary):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.temporary.open("wb")
            self.file.seek(self.start)
        return self

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Announce a tensor whose bytes follow by `write`, in one or many pieces."""
        n_bytes = dtype.itemsize
        for size in shape:
            n_bytes *= size
        self.header[name] = {"dtype": _NAMES[dtype], "shape": list(shape),
                             "data_offsets": [self.position, self.position + n_bytes]}
        self.position += n_bytes

    def write(self, tensor: torch.Tensor) -> None:
        self.file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.begin(name, tensor.dtype, tuple(tensor.shape))
        self.write(tensor)

    def __exit__(self, kind, error, trace) -> None:
        with writing(self.temporary), self.file:
            if error is not None:
                raise error
            self.finish()

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


class MappedFile:
    """A safetensors file mapped into memory, read-only; tensors are views, pages load when touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        open_safetensors(path)  # the library's own look at the header: its size, types and places
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.start = 8 + int.from_bytes(self.map[:8], "little")
        self.header = json.loads(self.map[8:self.start])

    def __contains__(self, name: str) -> bool:
        return name in self.header

    def tensor(self, name: str) -> torch.Tensor:
        """A read-only view of the file; never write to it."""
        entry = self.header[name]
        return self.flat(DTYPES[entry["dtype"]], *reversed(entry["data_offsets"])).view(entry["shape"])

    def flat(self, dtype: torch.dtype, high: int, low: int = 0) -> torch.Tensor:
        """What lies between two places of the data, in bytes, whatever its tensors; as of `tensor`."""
        if high == low:
            return torch.empty(0, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the buffer is read-only; that is what we want
            return torch.frombuffer(self.map, dtype=dtype, count=(high - low) // dtype.itemsize,
                                    offset=self.start + low)


class ExpertsFile(MappedFile):
    """One MoE layer: blobs uint8 [E, blob_bytes], float32 biases where the model has them, crc32 per expert."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.blobs = self.tensor("blobs")
            self.blobs_at = self.start + self.header["blobs"]["data_offsets"][0]  # bytes from the start of the file
            self.checksums = self.tensor("checksums").tolist()
            self.biases = {name: self.tensor(name) for name in BIASES if name in self}
        except KeyError as error:
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

    def will_need(self, expert: int) -> None:
        """Have the system read the blob from the disk, without waiting for it; nothing where it cannot be told."""
        if hasattr(mmap, "MADV_WILLNEED"):
            low = self.blobs_at + expert * self.blobs.shape[1]
            first = low - low % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_WILLNEED, first, low + self.blobs.shape[1] - first)

    def read_ahead(self) -> None:
        """Have the system read the whole file. Unlike `will_need` it stops no other thread of this process."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), self.path.open("rb") as file:  # a folder may be gone by now
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
