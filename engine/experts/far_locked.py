"""Far memory in page-locked host memory: the experts files read once, each expert checked, then left to the kernels.

Where the system locks only part of it, the first layers are the kernels' and the host fetches for the others.
"""
from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from engine.core import UserError
from engine.experts.store import FarBlobs
from engine.files.manifest import Manifest
from engine.machine.pinned_memory import Driver, HostMemory

Tensor = torch.Tensor


class FarLocked(FarBlobs):
    """All blobs, layer after layer, expert after expert, so that the misses of one expert share its pages."""

    def __init__(self, folder: Path, manifest: Manifest, driver: Driver,
                 progress: Callable[[float], None] = lambda share: None) -> None:
        """UserError for a damaged file. progress(share of the experts read, 0..1)."""
        super().__init__(folder, manifest)
        layer_bytes = self.experts * self.layout.blob_bytes
        self.memory = HostMemory(self.layers * layer_bytes, driver, layer_bytes)
        self._blobs = self.memory.bytes.view(self.layers, self.experts, 1, self.layout.blob_bytes)
        self._biases = [{name: bias.clone() for name, bias in file.biases.items()} for file in self._files]
        try:
            for layer, file in enumerate(self._files):
                self._read(layer, file.path, file.blobs_at, file.checksums)
                progress((layer + 1) / self.layers)
        except BaseException:
            self.close()
            raise
        self._files = None  # the maps of the files go; memory holds the only copy

    def _read(self, layer: int, path: Path, at: int, checksums: list[int]) -> None:
        """One file, past the page cache where the system can be told to forget it."""
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            for expert, checksum in enumerate(checksums):
                blob = memoryview(self._blobs[layer, expert, 0].numpy())
                n_read = 0
                while n_read < len(blob):
                    n_read += file.readinto(blob[n_read:]) or _cut_short(path)
                if zlib.crc32(blob) != checksum:
                    raise UserError(f"{path} is damaged (expert {expert} does not match its checksum); "
                                    "download or compress the model again.")
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def readable_layers(self) -> int:
        return self.memory.locked_bytes // (self.experts * self.layout.blob_bytes)

    @property
    def sentence(self) -> str:
        """What could not be locked, and what follows; "" when everything is."""
        if self.readable_layers == self.layers:
            return ""
        return (f"{self.memory.sentence} The processor fetches for {self.layers - self.readable_layers} of "
                f"{self.layers} layers meanwhile, which is slower.")

    def blobs(self, layer: int) -> Tensor:
        return self._blobs[layer]

    def biases(self, layer: int) -> dict[str, Tensor]:
        return self._biases[layer]

    def verify(self, layer: int, expert: int) -> None:
        """Nothing: every expert was checked while it was read, and nobody else can change memory."""

    def close(self) -> None:
        """Give the memory back."""
        self._blobs = None
        self.memory.close()


def _cut_short(path: Path) -> int:
    raise UserError(f"{path} is shorter than it says; download or compress the model again.")
