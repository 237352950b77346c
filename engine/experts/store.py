"""Far memory: where experts lie that are not near. One class per kind of folder, the same few methods.

`FarBlobs` maps the experts files of a compressed folder; `FarLocked` reads them once into page-locked memory, where a
card's kernels find them; `FarCheckpoint` reads whole experts from an uncompressed checkpoint (level `full`, the naive
baseline). All notice bytes that changed: blobs by the checksum written beside them, checked at first use or while they
are locked; a checkpoint has none, so every later read is held against the first one.
"""
from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from engine.core import SPARSE_LEVELS, UserError
from engine.files.checkpoint import Checkpoint
from engine.files.compressed import ExpertsFile
from engine.files.lookup.table import open_table
from engine.files.manifest import MANIFEST, Manifest, experts_name
from engine.machine.pinned_memory import Driver, HostMemory
from kernels.layout import Layout
from kernels.planes import decode_down, decode_gate, decode_up

Tensor = torch.Tensor
BIASES = ("gate_bias", "up_bias", "down_bias")
NO_EXPERTS = ("A Mixture of Lookup Experts has a table in place of experts: it answers, but there is nothing in it to "
              "calibrate, trace, guess or leave out.")


class Far(Protocol):
    """What every kind offers. Shapes: L layers, E experts, I neurons, H hidden."""

    layers: int
    experts: int
    neurons: int
    hidden: int
    expert_bytes: int  # bytes read for one whole expert

    readable_layers: int  # how many, from the first, the side that computes can read by itself

    @property
    def total_bytes(self) -> int:
        """Of all experts."""
        return self.layers * self.experts * self.expert_bytes

    def decode(self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Write the expert's weights into float32 [I, H] each (any strides)."""

    def biases(self, layer: int) -> dict[str, Tensor]:
        """float32 gate_bias, up_bias [E, I] and down_bias [E, H], or nothing."""

    def close(self) -> None:
        """Give locked memory back; maps of files go with the last tensor that looks into them."""


class FarBlobs(Far):
    """The experts files of a compressed folder, mapped into memory. UserError for files that are not what it says."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        if manifest.has_table:
            raise UserError(NO_EXPERTS)
        manifest.check_sizes(folder)
        self.layout: Layout = manifest.layout
        self.layers, self.experts = manifest.layers, manifest.experts
        self.neurons, self.hidden = manifest.neurons, manifest.hidden
        self.expert_bytes = self.layout.blob_bytes
        self._files = [ExpertsFile(folder / experts_name(i)) for i in range(manifest.layers)]
        matrix = ["F32", [self.experts, self.neurons]]
        shapes = {"blobs": ["U8", [self.experts, self.expert_bytes]], "checksums": ["I64", [self.experts]],
                  "gate_bias": matrix, "up_bias": matrix, "down_bias": ["F32", [self.experts, self.hidden]]}
        for file in self._files:
            if any([entry["dtype"], entry["shape"]] != shapes.get(name)
                   for name, entry in file.header.items() if name != "__metadata__"):
                raise UserError(f"{file.path} holds other experts than {MANIFEST} says; download or compress the model "
                                "again.")

    @property
    def readable_layers(self) -> int:
        return self.layers

    def verify(self, layer: int, expert: int) -> None:
        self._files[layer].verify(expert)

    def will_need(self, layer: int, experts: list[int]) -> None:
        """Have the system read whole experts from the disk, without waiting for it."""
        for expert in experts:
            self._files[layer].will_need(expert)

    def read_ahead(self) -> None:
        """Have the system read everything from the disk into its memory; returns when it has been asked to."""
        for file in self._files:
            file.read_ahead()

    def blobs(self, layer: int) -> Tensor:
        """uint8 [E, 1, blob_bytes]"""
        return self._files[layer].blobs[:, None]

    def sketches(self, layer: int) -> Tensor:
        """uint8 [E, 1, sketch_bytes]"""
        return self.blobs(layer)[:, :, :self.layout.sketch_bytes]

    def records(self, layer: int) -> Tensor:
        """uint8 [E, I, record]"""
        records = self.blobs(layer)[:, 0, self.layout.sketch_bytes:]
        return records.unflatten(1, (self.neurons, self.layout.record))

    def biases(self, layer: int) -> dict[str, Tensor]:
        return self._files[layer].biases

    def decode(self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self.verify(layer, expert)
        rows = self.sketches(layer)[expert, 0, :self.neurons * self.layout.sketch_row]
        sketch, records = rows.view(self.neurons, self.layout.sketch_row), self.records(layer)[expert]
        gate.copy_(decode_gate(sketch, records, self.layout)[:, :self.hidden])
        up.copy_(decode_up(sketch, records, self.layout)[:, :self.hidden])
        down.copy_(decode_down(records, self.layout)[:, :self.hidden])


class FarMemory(FarBlobs):
    """Blobs that lie in memory: `_blobs` uint8 [L, E, 1, blob_bytes], `_biases` one dictionary a layer."""

    def blobs(self, layer: int) -> Tensor:
        return self._blobs[layer]

    def biases(self, layer: int) -> dict[str, Tensor]:
        return self._biases[layer]

    def verify(self, layer: int, expert: int) -> None:
        """Nothing: what comes here is checked on its way or made up, and nobody else can change memory."""

    def will_need(self, layer: int, experts: list[int]) -> None:
        """Nothing: they are there."""

    def read_ahead(self) -> None:
        """Nothing either."""


class FarLocked(FarMemory):
    """All blobs in page-locked memory, layer after layer, expert after expert, so that the misses of one expert share
    its pages. Where the system locks only part of it, the first layers are the kernels' and the host fetches for the
    others."""

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

    def reason(self, kept: bool) -> str:
        """What could not be locked, and what follows; "" when everything is. kept: the rest is near for good."""
        if self.readable_layers == self.layers:
            return ""
        rest = f"{self.layers - self.readable_layers} of {self.layers} layers"
        return (f"{self.memory.reason} {rest} stay on the card for good, which leaves less room for the others."
                if kept else
                f"{self.memory.reason} The processor fetches for {rest} meanwhile, which is slower.")

    def close(self) -> None:
        self._blobs = None
        self.memory.close()


def _cut_short(path: Path) -> int:
    raise UserError(f"{path} is shorter than it says; download or compress the model again.")


class FarCheckpoint(Far):
    """The experts of an uncompressed checkpoint, read whole from its own files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        spec = checkpoint.spec
        self.layers, self.experts, self.neurons, self.hidden = spec.layers, spec.experts, spec.neurons, spec.hidden
        self.expert_bytes = checkpoint.expert_bytes
        self._checkpoint = checkpoint
        self._first_read: dict[tuple[int, int], int] = {}
        self.biases = cache(self._biases)

    readable_layers = 0

    def decode(self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        weights = self._checkpoint.read_expert(layer, expert)
        checksum = 0
        for target, source in ((gate, weights.gate), (up, weights.up), (down, weights.down)):
            checksum = zlib.crc32(source[0].contiguous().view(torch.uint8).numpy(), checksum)
            target.copy_(source[0])
        if self._first_read.setdefault((layer, expert), checksum) != checksum:
            raise UserError(f"Layer {layer}, expert {expert} of {self._checkpoint.name} changed on disk while in use; "
                            "check the files and open the model again.")

    def _biases(self, layer: int) -> dict[str, Tensor]:
        weights = self._checkpoint.read_layer(layer)
        return {name: getattr(weights, name).float() for name in BIASES if getattr(weights, name) is not None}


class FarTable(Far):
    """The table of a Mixture of Lookup Experts, mapped. expert_bytes: of one in a token's row."""

    readable_layers = 0

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        manifest.check_sizes(folder)
        self.layers, self.experts = manifest.layers, manifest.experts
        self.neurons, self.hidden = manifest.neurons, manifest.hidden
        self.table = open_table(folder, manifest)
        self.expert_bytes = self.hidden * self.table.dtype.itemsize

    @property
    def layout(self) -> Layout:
        raise UserError(NO_EXPERTS)

    @property
    def total_bytes(self) -> int:
        """Of the rows of all tokens."""
        return self.table.nbytes

    def rows(self, tokens: Tensor) -> Tensor:
        """tokens int [T] -> [T, layers * experts * hidden], read from the file"""
        return self.table[tokens.long().cpu()].to(tokens.device)

    def biases(self, layer: int) -> dict[str, Tensor]:
        return {}


def offered(far: Far, plans: Container[str]) -> tuple[str, ...]:
    """Levels that a folder can run at, best first. plans: those that have been calibrated."""
    if isinstance(far, FarTable):
        return ("exact",)
    if not isinstance(far, FarBlobs):
        return ("full",)
    return ("exact", *(level for level in SPARSE_LEVELS if level in plans))
