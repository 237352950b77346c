"""A checkpoint to a compressed folder, layer by layer; interrupted and started again it goes on where it was.

What can be compressed on its own is a `Unit`. `compress` does them one after the other; a download that compresses as
shards arrive (engine/library/compress_stream.py) does each as soon as its keys are there.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.core import ModelSpec
from engine.files.checkpoint import Checkpoint, ExpertLayer
from engine.files.folder_writer import FolderWriter, encoded
from engine.files.manifest import MTP, TRUNK, Manifest, experts_name
from engine.library.transfer import CompressOptions
from engine.machine import errors
from engine.planning.sizes import DEFAULT_TRUNK_BITS
from engine.progress import Progress, Report, said, unheard


def compress(source: Path, dest: Path, group_size: int | None = None, trunk_bits: int = 16,
             device: str | None = None, report: Report = unheard, check: Callable[[], None] = lambda: None) -> Manifest:
    """Make the compressed folder `dest` from the checkpoint folder `source`.

    report: hears where it is, and what a user should know besides (parts of the checkpoint that are left out). check:
    is called within every expert and may raise.
    UserError: not a MoE checkpoint, a group size that does not divide hidden, weights that are not finite, a dest that
    holds something else or was begun with other settings.
    MachineError: full disk, no card. Finished files survive any failure, and the next call goes on behind them.
    """
    source = Path(source)
    return compress_checkpoint(Checkpoint.open(source), source, Path(dest), str(source.resolve()), group_size,
                               trunk_bits, device, report, check)


def compress_checkpoint(checkpoint: Checkpoint, source: Path, dest: Path, origin: str, group_size: int | None,
                        trunk_bits: int, device: str | None, report: Report, check: Callable[[], None]) -> Manifest:
    """`compress` for a checkpoint that is open already. source: the folder of its tokenizer; origin: see
    `FolderWriter.begin`; check: is called within every expert and before every tensor, and may raise."""
    if checkpoint.left_out:
        report(said(left_out(checkpoint)))
    clock = _Clock(checkpoint.spec, report)
    with writer_for(checkpoint, dest, origin, group_size, trunk_bits) as writer:
        for unit in units_of(writer, checkpoint, errors.device_for(device)[0], check):
            if not unit.done:
                unit.work()
            if unit.layer:
                clock.report(unit.layer, not unit.done)
        manifest = writer.seal(checkpoint.text_config, checkpoint.skeleton, source)
    clock.report(checkpoint.spec.layers + 1)
    return manifest


def left_out(checkpoint: Checkpoint) -> str:
    return f"Left out, the text model has no place for them: {', '.join(checkpoint.left_out)}."


def settled(choice: CompressOptions) -> tuple[str, int]:
    """Device and bits of the trunk that a choice means on this machine."""
    device = errors.device_for(choice.device)[0]
    return device, choice.trunk_bits or DEFAULT_TRUNK_BITS[device]


@dataclass
class Unit:
    """One thing that can be compressed once its keys are there. layer: its number, counted from 1; 0 for others."""

    keys: list[str]
    work: Callable[[], None]
    done: bool = False
    layer: int = 0
    files: frozenset[str] = frozenset()         # that hold the keys, where these are still to come


def writer_for(checkpoint: Checkpoint, dest: Path, origin: str, group_size: int | None, trunk_bits: int
               ) -> FolderWriter:
    return FolderWriter.begin(dest, checkpoint.spec, len(checkpoint.skeleton.state_dict()), origin, group_size,
                              trunk_bits, len(checkpoint.map.mtp))


def units_of(writer: FolderWriter, checkpoint: Checkpoint, device: str, check: Callable[[], None]) -> Iterator[Unit]:
    """Layers, trunk tensors and multi-token-prediction tensors (kept against a second download, unused for now),
    those of an earlier run marked as done. check: is called within every expert and before every tensor, and
    may raise."""
    source = checkpoint.source

    def layer(i: int) -> None:
        writer.layer(i, encoded(_experts_of(checkpoint, i), writer.layout, device, i, check))

    def group(group) -> None:
        check()
        for name, tensor in checkpoint.read_group(group).items():
            writer.add_to_trunk(name, tensor)

    def extra(key: str) -> None:
        check()
        writer.mtp.add({key: source.get(key)})
    for i in range(checkpoint.spec.layers):
        yield Unit(checkpoint.layer_keys(i), partial(layer, i), experts_name(i) in writer.done, i + 1)
    for each in checkpoint.trunk_groups():
        yield Unit([part for key in each.keys for part in source.parts(key)], partial(group, each),
                   TRUNK in writer.done or all(name in writer.trunk for name in each.targets))
    for key in checkpoint.map.mtp:
        yield Unit(source.parts(key), partial(extra, key), MTP in writer.done or key in writer.mtp)


def _experts_of(checkpoint: Checkpoint, layer: int) -> Iterator[ExpertLayer]:
    for e in range(checkpoint.spec.experts):
        yield checkpoint.read_expert(layer, e)


class _Clock:
    """Turns layers done into weights per second and time left, counting only what this run worked on."""

    def __init__(self, spec: ModelSpec, report: Report) -> None:
        self.layers, self.weights, self.tell = spec.layers, spec.experts * spec.expert_params, report
        self.start, self.n_worked = time.monotonic(), 0

    def report(self, done: int, worked: bool = False) -> None:
        self.n_worked += worked
        per_layer = (time.monotonic() - self.start) / self.n_worked if self.n_worked else 0.0
        rate = self.weights / per_layer if per_layer else 0.0
        text = (f"Compressing layer {done + 1} of {self.layers}" if done < self.layers else
                "Compressing the rest" if done == self.layers else "Compressed")
        self.tell(Progress(done, self.layers + 1, rate, per_layer * (self.layers + 1 - done), text))
