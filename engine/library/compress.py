"""A checkpoint to a compressed folder, layer by layer; interrupted and started again it goes on where it was.

The core is `write_layer`: one layer's experts, one at a time, into one experts file. `compress` is its first caller; a
download that compresses as shards arrive is another. Memory: one expert and its codes, one trunk tensor, whatever the
number of layers. `floe.partial.json` lists the files that are already whole, with the settings they were made with.
"""
from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.core import ModelSpec, UserError
from engine.disk import read_json, trouble, write_text_atomically, writing
from engine.files.checkpoint import Checkpoint, ExpertLayer
from engine.files.compressed import SafetensorsWriter
from engine.files.manifest import (
    COPIED,
    MTP,
    TRUNK,
    FileEntry,
    Manifest,
    experts_name,
    file_entry,
    is_compressed,
    texts_of,
)
from engine.files.quantize import nested
from engine.files.trunk import bits_of, encode
from engine.machine import errors
from kernels.layout import Layout, default_group_size
from kernels.planes import record_rows, sketch_rows

PARTIAL = "floe.partial.json"
BYTES_PER_WEIGHT = {16: 2.0, 8: 1.1, 4: 0.8}        # of the trunk, scales and the parts that stay finer included
Tensor = torch.Tensor


@dataclass(frozen=True)
class Progress:
    """Where a compression is: layer of layers (the trunk counts as one more), weights per second, seconds left."""

    layer: int
    layers: int
    weights_per_second: float
    seconds_left: float


def expert_blob(gate: Tensor, up: Tensor, down: Tensor, layout: Layout) -> Tensor:
    """gate, up, down [I, hidden] of one expert -> blob uint8 [blob_bytes] on the CPU."""
    codes = [nested(matrix, layout) for matrix in (gate, up, down)]
    blob = torch.zeros(layout.blob_bytes, dtype=torch.uint8)
    rows = layout.neurons * layout.sketch_row
    blob[:rows] = sketch_rows(codes[0], codes[1], layout).flatten().cpu()
    blob[layout.sketch_bytes:] = record_rows(*codes, layout).flatten().cpu()
    return blob


def write_layer(path: Path, experts: Iterable[ExpertLayer], n_experts: int, layout: Layout, device: str) -> None:
    """One experts file from one layer's experts, in order, each an ExpertLayer of a single expert.

    UserError for weights that are not finite.
    """
    biases: dict[str, list[Tensor]] = {"gate_bias": [], "up_bias": [], "down_bias": []}
    checksums = []
    with SafetensorsWriter(path, n_tensors=5) as writer:
        writer.begin("blobs", torch.uint8, (n_experts, layout.blob_bytes))
        for e, expert in enumerate(experts):
            try:
                blob = expert_blob(*(m[0].to(device) for m in (expert.gate, expert.up, expert.down)), layout)
            except ValueError as error:
                raise UserError(f"Expert {e} of {path.stem.replace('experts-', 'MoE layer ')} cannot be compressed: "
                                f"{error}; get an intact checkpoint.") from error
            writer.write(blob)
            checksums.append(zlib.crc32(blob.numpy()))
            for name, rows in biases.items():
                if getattr(expert, name) is not None:
                    rows.append(getattr(expert, name).float())
        writer.add("checksums", torch.tensor(checksums, dtype=torch.int64))
        for name, rows in biases.items():
            if rows:
                writer.add(name, torch.cat(rows))


def experts_of(checkpoint: Checkpoint, layer: int, check: Callable[[], None]) -> Iterator[ExpertLayer]:
    """One layer's experts, one at a time; `check` is called before each and may raise to stop there."""
    for e in range(checkpoint.spec.experts):
        check()
        yield checkpoint.read_expert(layer, e)


def result_bytes(spec: ModelSpec, trunk_bits: int) -> int:
    """About how large the compressed folder will be."""
    layout = Layout(spec.hidden, spec.neurons, default_group_size(spec.hidden))
    return spec.layers * spec.experts * layout.blob_bytes + int(spec.trunk_params * BYTES_PER_WEIGHT[trunk_bits])


def write_trunk(path: Path, checkpoint: Checkpoint, trunk_bits: int) -> None:
    """All other weights under the model's own names, one tensor in memory at a time."""
    with SafetensorsWriter(path, n_tensors=2 * len(checkpoint.skeleton.state_dict())) as writer:
        for name, tensor in checkpoint.trunk():
            bits = bits_of(name, tensor, trunk_bits, checkpoint.spec.decoder_layers)
            for stored, part in encode(name, tensor, bits).items():
                writer.add(stored, part)


def write_mtp(path: Path, checkpoint: Checkpoint) -> None:
    """Multi-token-prediction weights under their source names: unused for now, kept against a second download."""
    with SafetensorsWriter(path, n_tensors=len(checkpoint.map.mtp)) as writer:
        for name, tensor in checkpoint.mtp():
            writer.add(name, tensor)


@dataclass
class Making:
    """A compressed folder on its way: what `compress` and a download that compresses as it arrives have in common.

    done: files that are whole, noted in floe.partial.json with the settings they were made with.
    """

    checkpoint: Checkpoint
    dest: Path
    layout: Layout
    trunk_bits: int
    device: str
    settings: dict
    done: dict[str, FileEntry]

    @staticmethod
    def begin(checkpoint: Checkpoint, dest: Path, origin: str, group_size: int | None = None, trunk_bits: int = 16,
              device: str | None = None) -> Making:
        """Start, or go on with what an interrupted run of the same settings has finished. origin: what is compressed,
        in words. UserError: a group size that does not divide hidden, a dest that holds something else. MachineError: a
        card that cannot be used."""
        spec = checkpoint.spec
        try:
            layout = Layout(spec.hidden, spec.neurons, group_size or default_group_size(spec.hidden))
        except ValueError as error:
            raise UserError(str(error)) from error
        device, _ = errors.device_for(device)
        settings = {"group_size": layout.group, "trunk_bits": trunk_bits, "source": origin}
        return Making(checkpoint, dest, layout, trunk_bits, device, settings, _resume(dest, settings))

    def layer(self, i: int, experts: Iterable[ExpertLayer]) -> None:
        write_layer(self.dest / experts_name(i), experts, self.checkpoint.spec.experts, self.layout, self.device)
        self.finished(experts_name(i))

    def finished(self, name: str) -> None:
        self.done[name] = file_entry(self.dest / name)
        _save_state(self.dest, self.settings, self.done)

    def seal(self, source: Path) -> Manifest:
        """All files are there: configuration, tokenizer (from the folder `source`) and, last, the manifest."""
        spec = self.checkpoint.spec
        _write_config(self.checkpoint, source, self.dest, self.layout, self.trunk_bits)
        manifest = Manifest(self.layout.group, self.trunk_bits, spec.layers, spec.experts, spec.top_k, spec.neurons,
                            spec.hidden, (*(self.done[name] for name in sorted(self.done)), *texts_of(self.dest)))
        manifest.save(self.dest)
        (self.dest / PARTIAL).unlink(missing_ok=True)
        return manifest


def compress(source: Path, dest: Path, group_size: int | None = None, trunk_bits: int = 16,
             device: str | None = None, report: Callable[[Progress], None] = lambda progress: None,
             say: Callable[[str], None] = lambda sentence: None,
             check: Callable[[], None] = lambda: None) -> Manifest:
    """Make the compressed folder `dest` from the checkpoint folder `source`.

    say: receives what a user should know besides the progress (parts of the checkpoint that are left out). check: is
    called before every expert and may raise.
    UserError: not a MoE checkpoint, a group size that does not divide hidden, weights that are not finite, a dest that
    holds something else or was begun with other settings.
    MachineError: full disk, no card. Finished files survive any failure, and the next call goes on behind them.
    """
    source = Path(source)
    return compress_checkpoint(Checkpoint.open(source), source, Path(dest), str(source.resolve()), group_size,
                               trunk_bits, device, report, say, check)


def compress_checkpoint(checkpoint: Checkpoint, source: Path, dest: Path, origin: str, group_size: int | None = None,
                        trunk_bits: int = 16, device: str | None = None,
                        report: Callable[[Progress], None] = lambda progress: None,
                        say: Callable[[str], None] = lambda sentence: None,
                        check: Callable[[], None] = lambda: None) -> Manifest:
    """`compress` for a checkpoint that is open already. source: the folder of its tokenizer; origin: see `Making`;
    check: see `experts_of`."""
    if checkpoint.left_out:
        say(f"Left out, the text model has no place for them: {', '.join(checkpoint.left_out)}.")
    spec = checkpoint.spec
    making = Making.begin(checkpoint, dest, origin, group_size, trunk_bits, device)
    clock = _Clock(spec.layers + 1, spec.experts * 3 * spec.neurons * spec.hidden, report)
    for layer in range(spec.layers):
        if experts_name(layer) not in making.done:
            making.layer(layer, experts_of(checkpoint, layer, check))
            clock.worked()
        clock.tell(layer + 1)
    if TRUNK not in making.done:
        write_trunk(dest / TRUNK, checkpoint, trunk_bits)
        making.finished(TRUNK)
    if checkpoint.map.mtp and MTP not in making.done:
        write_mtp(dest / MTP, checkpoint)
        making.finished(MTP)
    manifest = making.seal(source)
    clock.tell(spec.layers + 1)
    return manifest


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


def _write_config(checkpoint: Checkpoint, source: Path, dest: Path, layout: Layout, trunk_bits: int) -> None:
    """config.json that plain transformers can load after `import engine.hf`, and the tokenizer's files."""
    config = checkpoint.text_config.to_dict()
    config["architectures"] = [type(checkpoint.skeleton).__name__]
    config["transformers_weights"] = TRUNK
    config["quantization_config"] = {"quant_method": "floe", "group_size": layout.group, "trunk_bits": trunk_bits}
    for name in COPIED:
        if (source / name).is_file():
            with writing(dest / name):
                shutil.copyfile(source / name, dest / name)
    write_text_atomically(dest / "config.json", json.dumps(config, indent=2, default=str))


class _Clock:
    """Turns layers done into weights per second and time left, counting only what this run worked on."""

    def __init__(self, steps: int, weights_per_layer: int, report: Callable[[Progress], None]) -> None:
        self.steps, self.weights, self.report = steps, weights_per_layer, report
        self.start, self.n_worked = time.monotonic(), 0

    def worked(self) -> None:
        self.n_worked += 1

    def tell(self, step: int) -> None:
        seconds = time.monotonic() - self.start
        per_layer = seconds / self.n_worked if self.n_worked else 0.0
        rate = self.weights / per_layer if per_layer else 0.0
        self.report(Progress(step, self.steps, rate, per_layer * (self.steps - step)))
