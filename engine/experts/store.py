"""Far memory: where experts lie that are not near. One class per kind of folder, the same few methods.

`FarBlobs` maps the experts files of a compressed folder; `FarCheckpoint` reads whole experts from an uncompressed
checkpoint (level `full`, the naive baseline). Both notice bytes that changed: blobs by the checksum written beside
them, checked at first use; a checkpoint has none, so every later read is held against the first one.
"""
from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from engine.core import UserError
from engine.files.checkpoint import Checkpoint
from engine.files.compressed import ExpertsFile
from engine.files.manifest import MANIFEST, Manifest, experts_name
from kernels.layout import Layout
from kernels.planes import decode_down, decode_gate, decode_up

Tensor = torch.Tensor
BIASES = ("gate_bias", "up_bias", "down_bias")


class Far(Protocol):
    """What both kinds offer. Shapes: L layers, E experts, I neurons, H hidden."""

    layers: int
    experts: int
    neurons: int
    hidden: int
    expert_bytes: int  # bytes read for one whole expert

    def decode(self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Write the expert's weights into float32 [I, H] each (any strides)."""

    def biases(self, layer: int) -> dict[str, Tensor]:
        """float32 gate_bias, up_bias [E, I] and down_bias [E, H], or nothing."""


class FarBlobs:
    """The experts files of a compressed folder, mapped into memory. UserError for files that are not what it says."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
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
        """How many layers, from the first, a device that computes them can read by itself."""
        return self.layers

    def close(self) -> None:
        """The maps go with the last tensor that looks into them."""

    def verify(self, layer: int, expert: int) -> None:
        self._files[layer].verify(expert)

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


class FarCheckpoint:
    """The experts of an uncompressed checkpoint, read whole from its own files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        spec = checkpoint.spec
        self.layers, self.experts, self.neurons, self.hidden = spec.layers, spec.experts, spec.neurons, spec.hidden
        self.expert_bytes = checkpoint.expert_bytes
        self._checkpoint = checkpoint
        self._first_read: dict[tuple[int, int], int] = {}
        self.biases = cache(self._biases)

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
