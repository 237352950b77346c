"""A compressed folder on its way: what compressing, streaming, importing and making up have in common.

Experts files come layer by layer, the trunk tensor by tensor, over several runs if need be, the manifest last.
`floe.partial.json` lists the files that are whole, with the settings they were made with. Memory: one expert and its
codes, one trunk tensor, whatever the number of layers.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.core import ModelSpec, UserError
from engine.disk import read_json, trouble, write_text_atomically, writing
from engine.files.checkpoint import ExpertLayer
from engine.files.compressed import BIASES, MappedFile, SafetensorsWriter
from engine.files.manifest import (
    COPIED,
    EXPERTS,
    FORMAT_VERSION,
    MTP,
    TABLE,
    TRUNK,
    FileEntry,
    Manifest,
    experts_name,
    file_entry,
    is_compressed,
    texts_of,
)
from engine.files.quantize import nested
from engine.files.tensor_source import DTYPES
from engine.files.trunk import CODES, SCALES, bits_of, encode
from kernels.layout import Layout, default_group_size
from kernels.planes import Nested, record_rows, sketch_rows

PARTIAL = "floe.partial.json"
BYTES_PER_WEIGHT = {16: 2.0, 8: 1.1, 4: 0.8}        # of the trunk, scales and the parts that stay finer included
PLACES = ("_name_or_path", "name_or_path")          # where a model lay on its maker's disk, or its Hub id
Tensor = torch.Tensor


@dataclass
class FolderWriter:
    """Use as a context manager. done: files that are whole. trunk, mtp, table: the files that grow."""

    dest: Path
    spec: ModelSpec
    layout: Layout
    trunk_bits: int
    settings: dict
    done: dict[str, FileEntry]
    trunk: GrowingFile
    mtp: GrowingFile
    table: GrowingFile

    @property
    def growing(self) -> tuple[GrowingFile, ...]:
        return self.trunk, self.mtp, self.table

    @staticmethod
    def begin(dest: Path, spec: ModelSpec, n_trunk: int, origin: str, group_size: int | None = None,
              trunk_bits: int = 16, n_mtp: int = 0, n_rows: int = 0) -> FolderWriter:
        """Start, or go on with what an interrupted run of the same settings has finished.

        n_trunk, n_mtp, n_rows: tensors at most. origin: what is made into a folder, in words. UserError: a group size
        that does not divide hidden, a dest that holds something else.
        """
        try:
            layout = Layout(spec.hidden, spec.neurons, group_size or default_group_size(spec.hidden))
        except ValueError as error:
            raise UserError(str(error)) from error
        settings = {"group_size": layout.group, "trunk_bits": trunk_bits, "source": origin}
        done = _resume(dest, settings)
        return FolderWriter(dest, spec, layout, trunk_bits, settings, done, GrowingFile(dest / TRUNK, 2 * n_trunk),
                            GrowingFile(dest / MTP, n_mtp), GrowingFile(dest / TABLE, n_rows))

    def __enter__(self) -> FolderWriter:
        for file in self.growing:                   # killed just behind its renaming
            if file.path.is_file() and file.path.name not in self.done:
                self._finished(file.path.name)
        return self

    def __exit__(self, *error) -> None:
        for file in self.growing:
            file.close()

    def layer(self, i: int, blobs: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """The experts file of layer i: of each expert in order its blob and its biases [1, n] by name."""
        checksums, biases = [], {}
        with SafetensorsWriter(self.dest / experts_name(i), n_tensors=5) as writer:
            writer.begin("blobs", torch.uint8, (self.spec.experts, self.layout.blob_bytes))
            for blob, own in blobs:
                writer.write(blob)
                checksums.append(zlib.crc32(blob.numpy()))
                for name, row in own.items():
                    biases.setdefault(name, []).append(row)
            writer.add("checksums", torch.tensor(checksums, dtype=torch.int64))
            for name, rows in biases.items():
                writer.add(name, torch.cat(rows))
        self._finished(experts_name(i))

    def add_to_trunk(self, name: str, tensor: Tensor) -> None:
        bits = bits_of(name, tensor, self.trunk_bits, self.spec.decoder_layers)
        self.trunk.add(encode(name, tensor, bits))

    def without_copies(self, copies: Mapping[str, str]) -> list[str]:
        """Which of these names hold other values than what each may be a copy of. If none does, they leave the trunk,
        to which they were added behind everything else."""
        if not self.trunk.is_open:                  # killed while it was sealed
            stored = MappedFile(self.dest / TRUNK)
            return [name for name in copies if name in stored or name + CODES in stored]
        own = [name for name, first in copies.items() if not self.trunk.same(name, first)]
        for name in [] if own else reversed(copies):
            self.trunk.drop(name)
        return own

    def save(self) -> None:
        """What has been added so far survives a kill."""
        for file in self.growing:
            file.save()

    def seal(self, config, skeleton: torch.nn.Module, tokenizer: Path, copied: Iterable[str] = COPIED,
             calibration: dict | None = None) -> Manifest:
        """All is there: the growing files get their names, then configuration, `copied` from the folder `tokenizer`
        and, last, the manifest. transformers loads what config.json says after `import engine.hf`, and
        refuses it without."""
        for file in self.growing:
            if file.is_open:
                file.finish()
                self._finished(file.path.name)
        for name in copied:
            copy_file(tokenizer / name, self.dest / name)
        own = {"architectures": [type(skeleton).__name__], "transformers_weights": TRUNK,
               "experts_implementation": EXPERTS, "quantization_config": {
                   "quant_method": "floe", "group_size": self.layout.group, "trunk_bits": self.trunk_bits}}
        write_text_atomically(self.dest / "config.json", json.dumps(_nowhere(config.to_dict() | own), indent=2,
                                                                    default=str))
        spec = self.spec
        manifest = Manifest(self.layout.group, self.trunk_bits, spec.layers, spec.experts, spec.top_k, spec.neurons,
                            spec.hidden, (*(self.done[name] for name in sorted(self.done)), *texts_of(self.dest)),
                            calibration or {}, FORMAT_VERSION if TABLE in self.done else 2)
        manifest.save(self.dest)
        (self.dest / PARTIAL).unlink(missing_ok=True)
        return manifest

    def _finished(self, name: str) -> None:
        self.done[name] = file_entry(self.dest / name)
        _save_state(self.dest, self.settings, self.done)


class GrowingFile:
    """A safetensors file that is written over several runs: `NAME.part`, and beside it how much of that counts.

    `save` after every shard, `finish` when all tensors are in. Nothing is created before the first tensor.
    """

    def __init__(self, path: Path, n_tensors: int) -> None:
        self.path, self.notes = path, path.with_name(path.name + ".part.json")
        self.writer = SafetensorsWriter(path, n_tensors)
        if self.notes.is_file() and self.writer.temporary.is_file():
            try:
                state = read_json(self.notes)
                self.writer.header, self.writer.position = dict(state["header"]), int(state["position"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.notes} is damaged; delete {path.parent} and start again.") from error
            self._open("r+b")

    def __contains__(self, name: str) -> bool:
        return name in self.writer.header or name + CODES in self.writer.header

    def add(self, tensors: dict[str, Tensor]) -> None:
        if not self.is_open:
            self._open("w+b")
        with writing(self.path, keep=True):
            for name, tensor in tensors.items():
                self.writer.add(name, tensor)

    def read(self, name: str) -> Tensor:
        """A tensor that has been added, as it is stored."""
        entry, file = self.writer.header[name], self.writer.file
        low, high = entry["data_offsets"]
        file.seek(self.writer.start + low)
        content = bytearray(file.read(high - low))
        file.seek(self.writer.start + self.writer.position)
        return torch.frombuffer(content, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors that have been added are stored as the same values."""
        parts = [name.removeprefix(one) for name in self.writer.header if name in (one, one + CODES, one + SCALES)]
        return all(other + part in self.writer.header and torch.equal(self.read(one + part), self.read(other + part))
                   for part in parts)

    def drop(self, name: str) -> None:
        """Forget the tensor that was added last."""
        for part in [part for part in self.writer.header if part in (name, name + CODES, name + SCALES)][::-1]:
            low, high = self.writer.header.pop(part)["data_offsets"]
            assert high == self.writer.position, f"{part} does not stand at the end"
            self.writer.position = low
        self.writer.file.seek(self.writer.start + self.writer.position)
        self.writer.file.truncate()

    def save(self) -> None:
        """What has been added so far survives a kill."""
        if self.is_open:
            with writing(self.path, keep=True):
                self.writer.file.flush()
                os.fsync(self.writer.file.fileno())
            state = {"header": self.writer.header, "position": self.writer.position}
            write_text_atomically(self.notes, json.dumps(state))

    def finish(self) -> None:
        """Under its name, whole."""
        with writing(self.path, keep=True):
            self.writer.finish()
        self.close()
        self.notes.unlink(missing_ok=True)

    def close(self) -> None:
        """What was never saved goes."""
        if self.is_open:
            self.writer.file.close()
        if not self.notes.is_file():
            self.writer.temporary.unlink(missing_ok=True)

    @property
    def is_open(self) -> bool:
        return hasattr(self.writer, "file") and not self.writer.file.closed

    def _open(self, mode: str) -> None:
        with writing(self.path, keep=True):
            self.writer.file = self.writer.temporary.open(mode)
            self.writer.file.truncate(self.writer.start + self.writer.position)
            self.writer.file.seek(self.writer.start + self.writer.position)


def expert_blob(gate: Tensor, up: Tensor, down: Tensor, layout: Layout, check: Callable[[], None]) -> Tensor:
    """gate, up, down [I, hidden] of one expert -> blob uint8 [blob_bytes] on the CPU."""
    return blob_of(*(nested(matrix, layout, check) for matrix in (gate, up, down)), layout)


def blob_of(gate: Nested, up: Nested, down: Nested, layout: Layout) -> Tensor:
    """uint8 [blob_bytes] on the CPU."""
    blob = torch.zeros(layout.blob_bytes, dtype=torch.uint8)
    rows = layout.neurons * layout.sketch_row
    blob[:rows] = sketch_rows(gate, up, layout).flatten().cpu()
    blob[layout.sketch_bytes:] = record_rows(gate, up, down, layout).flatten().cpu()
    return blob


def encoded(experts: Iterable[ExpertLayer], layout: Layout, device: str, layer: int,
            check: Callable[[], None]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Blob and biases of each expert, an ExpertLayer of a single one. UserError for weights that are not finite.
    check: is called many times within an expert, and may raise."""
    for e, expert in enumerate(experts):
        try:
            blob = expert_blob(*(m[0].to(device) for m in (expert.gate, expert.up, expert.down)), layout, check)
        except ValueError as error:
            raise UserError(f"Expert {e} of MoE layer {layer:05d} cannot be compressed: {error}; get an intact "
                            "checkpoint.") from error
        yield blob, biases_of(expert)


def biases_of(expert: ExpertLayer) -> dict[str, Tensor]:
    return {name: bias.float() for name in BIASES if (bias := getattr(expert, name)) is not None}


def result_bytes(spec: ModelSpec, trunk_bits: int) -> int:
    """About how large the compressed folder will be."""
    if spec.table_bytes:
        return spec.table_bytes + int(spec.trunk_params * BYTES_PER_WEIGHT[trunk_bits])
    layout = Layout(spec.hidden, spec.neurons, default_group_size(spec.hidden))
    return spec.layers * spec.experts * layout.blob_bytes + int(spec.trunk_params * BYTES_PER_WEIGHT[trunk_bits])


def copy_file(source: Path, dest: Path) -> None:
    """One of a model's small files, if it is there, without the place where it lay."""
    if source.is_file():
        with writing(dest):
            changed = portable(source)
            dest.write_bytes(changed) if changed else shutil.copyfile(source, dest)


def portable(path: Path) -> bytes | None:
    """What a configuration has to hold instead, so that it does not tell where it lay; None if it does not."""
    if not path.name.endswith("config.json"):
        return None
    try:
        document = read_json(path)
        clean = _nowhere(document)
    except (OSError, ValueError, RecursionError):       # whoever reads it says so
        return None
    return None if clean == document else json.dumps(clean, indent=2).encode()


def _nowhere(document):
    if not isinstance(document, dict):
        return document
    return {key: _nowhere(value) for key, value in document.items()
            if key not in PLACES or re.fullmatch(r"[\w.-]+/[\w.-]+", str(value))}


def is_sealed(dest: Path) -> bool:
    """Whether a folder is finished: one that was killed while it was sealed has its manifest and our notes."""
    return is_compressed(dest) and not (dest / PARTIAL).is_file()


def _resume(dest: Path, settings: dict) -> dict[str, FileEntry]:
    """What an interrupted run with the same settings has finished; the folder is made when it is missing."""
    if is_sealed(dest):
        raise UserError(f"{dest} already holds a compressed model; choose another folder or delete it first.")
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise trouble(error, dest) from error
    if not (dest / PARTIAL).is_file():
        if any(path.name != PARTIAL + ".part" for path in dest.iterdir()):
            raise UserError(f"{dest} is not empty; choose another folder.")
        _save_state(dest, settings, {})
        return {}
    try:
        state = read_json(dest / PARTIAL)
        begun, entries = state["settings"], [FileEntry(**entry) for entry in state["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{dest / PARTIAL} is damaged; delete {dest} and start again.") from error
    if begun != settings:
        raise UserError(f"{dest} was begun with other settings ({begun}); choose another folder or delete it first.")
    return {e.path: e for e in entries if (dest / e.path).is_file() and (dest / e.path).stat().st_size == e.bytes}


def _save_state(dest: Path, settings: dict, done: dict[str, FileEntry]) -> None:
    state = {"settings": settings, "files": [asdict(entry) for entry in done.values()]}
    write_text_atomically(dest / PARTIAL, json.dumps(state))
