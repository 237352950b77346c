"""A checkpoint to a compressed folder, layer by layer; interrupted and started again it goes on where it was.

What can be compressed on its own is a `Unit`. `compress` does them one after the other; a download that compresses as
shards arrive (engine/library/compress_stream.py) does each as soon as its keys are there.
"""
from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.core import ModelSpec, UserError
from engine.files.checkpoint import Checkpoint, ExpertLayer
from engine.files.folder_writer import FolderWriter, encoded, is_sealed
from engine.files.key_map import Group
from engine.files.lookup.table import block, block_name, blocks, table_keys
from engine.files.manifest import MTP, TABLE, TRUNK, Manifest, experts_name
from engine.library.transfer import CompressOptions
from engine.machine import errors
from engine.planning.sizes import DEFAULT_TRUNK_BITS
from engine.progress import Progress, Report, of_pass, said, unheard
from engine.quality.loss_probe import Documents
from engine.quality.requantize import NO_TEXT, Requantizer, Text, digest, expected

PLAIN = "plain"     # in a folder that is made over a text: the same without one, until it is whole


def compress(source: Path, dest: Path, group_size: int | None = None, trunk_bits: int = 16,
             device: str | None = None, report: Report = unheard, check: Callable[[], None] = lambda: None,
             text: Text = NO_TEXT) -> Manifest:
    """Make the compressed folder `dest` from the checkpoint folder `source`.

    text: what the model's own inputs are taken from, for codes that err less on them (engine/quality/requantize.py).
    Where it names no model, one is made first, without a text, in `dest`.
    report: hears where it is, and what a user should know besides (parts of the checkpoint that are left out). check:
    is called within every expert and may raise.
    UserError: not a MoE checkpoint, a group size that does not divide hidden, weights that are not finite, a dest that
    holds something else or was begun with other settings.
    MachineError: full disk, no card. Finished files survive any failure, and the next call goes on behind them.
    """
    source = Path(source)
    return compress_checkpoint(Checkpoint.open(source), source, Path(dest), str(source.resolve()), group_size,
                               trunk_bits, device, report, check, text)


def compress_checkpoint(checkpoint: Checkpoint, source: Path, dest: Path, origin: str, group_size: int | None,
                        trunk_bits: int, device: str | None, report: Report, check: Callable[[], None],
                        text: Text = NO_TEXT) -> Manifest:
    """`compress` for a checkpoint that is open already. source: the folder of its tokenizer; origin: see
    `FolderWriter.begin`; check: is called within every expert and before every tensor, and may raise."""
    if checkpoint.left_out and not checkpoint.spec.table_bytes:      # which is made of what the model has not
        report(said(left_out(checkpoint)))
    if checkpoint.warning:
        report(said(checkpoint.warning))
    spec, device, documents = checkpoint.spec, errors.device_for(device)[0], text.documents(source)
    if documents:
        report(said(expected(spec, documents, device, bool(text.model))))
    model = text.model or dest / PLAIN
    with writer_for(checkpoint, dest, origin, group_size, trunk_bits, documents, model) as writer:
        units = list(units_of(writer, checkpoint, device, check, documents, model))
        if documents and not text.model and not all(unit.done for unit in units):
            _plain(checkpoint, source, model, origin, group_size, trunk_bits, device, of_pass(report, 0, 2), check)
            report = of_pass(report, 1, 2)
        clock = _work(units, writer, report)
        shutil.rmtree(dest / PLAIN, ignore_errors=True)
        manifest = writer.seal(checkpoint.text_config, checkpoint.skeleton, source, calibration=noted(documents, model))
    clock.report(clock.layers + 1)
    return manifest


def _plain(checkpoint: Checkpoint, source: Path, dest: Path, origin: str, group_size: int | None, trunk_bits: int,
           device: str, report: Report, check: Callable[[], None]) -> None:
    """The same folder without a text, whose gradients say which errors an answer feels."""
    if is_sealed(dest):
        return
    report(said("First without the text, for a model that can be asked"))
    with writer_for(checkpoint, dest, origin, group_size, trunk_bits) as writer:
        _work(list(units_of(writer, checkpoint, device, check)), writer, report)
        writer.seal(checkpoint.text_config, checkpoint.skeleton, source)


def _work(units: list[Unit], writer: FolderWriter, report: Report) -> _Clock:
    """What an earlier run has left of them; -> the clock, which has still to tell the end."""
    clock = _Clock(sum(bool(unit.layer) for unit in units), writer.spec.experts * writer.spec.expert_params, report,
                   part_of(writer.spec))
    for unit in units:
        worked = not unit.done
        if worked:
            unit.work()
            unit.done = True
        if unit.layer:
            writer.save()
            clock.report(unit.layer, worked)
    return clock


def part_of(spec: ModelSpec) -> str:
    """What is counted while it is made."""
    return "part of the table" if spec.table_bytes else "layer"


def left_out(checkpoint: Checkpoint) -> str:
    return f"Left out, the text model has no place for them: {', '.join(checkpoint.left_out)}."


def text_of(choice: CompressOptions) -> Text:
    return Text(choice.texts, choice.text_tokens, choice.felt_by)


def settled(choice: CompressOptions) -> tuple[str, int]:
    """Device and bits of the trunk that a choice means on this machine."""
    device = errors.device_for(choice.device)[0]
    return device, choice.trunk_bits or DEFAULT_TRUNK_BITS[device]


@dataclass(eq=False)
class Unit:
    """One thing that can be compressed once its keys are there. layer: its number, counted from 1; 0 for others; of a
    Mixture of Lookup Experts that of a block of the table. after: what has to be done before it, over a text."""

    keys: list[str]
    work: Callable[[], None]
    done: bool = False
    layer: int = 0
    after: tuple[Unit, ...] = ()
    files: frozenset[str] = frozenset()         # that hold the keys, where these are still to come

    def is_ready(self, absent: set[str]) -> bool:
        return not self.done and not self.files & absent and all(unit.done for unit in self.after)


def writer_for(checkpoint: Checkpoint, dest: Path, origin: str, group_size: int | None, trunk_bits: int,
               documents: Documents = (), model: Path | None = None) -> FolderWriter:
    """UserError as of `FolderWriter.begin`: also for what was begun over another text."""
    origin = f"{origin}, over the text {digest(documents, model)}" if documents else origin
    return FolderWriter.begin(dest, checkpoint.spec, len(checkpoint.skeleton.state_dict()), origin, group_size,
                              trunk_bits, len(checkpoint.map.mtp),
                              len(blocks(checkpoint.spec)) if checkpoint.spec.table_bytes else 0)


def units_of(writer: FolderWriter, checkpoint: Checkpoint, device: str, check: Callable[[], None],
             documents: Documents = (), model: Path | None = None) -> Iterator[Unit]:
    """Layers, trunk tensors and multi-token-prediction tensors (kept against a second download, unused for now),
    those of an earlier run marked as done. check: is called within every expert and before every tensor, and
    may raise. documents: the codes are to err less on these, which asks for an order; model: as of `Text`."""
    source = checkpoint.source
    if documents and checkpoint.spec.table_bytes:
        raise UserError(f"{checkpoint.name} is kept as a table, for which no text is needed; leave the text out.")

    def extra(key: str) -> None:
        check()
        writer.mtp.add({key: source.get(key)})
    yield from (_over_text(writer, checkpoint, documents, device, check, model) if documents else
                _without_text(writer, checkpoint, device, check))
    for key in checkpoint.map.mtp:
        yield Unit(source.parts(key), partial(extra, key), MTP in writer.done or key in writer.mtp)


def _without_text(writer: FolderWriter, checkpoint: Checkpoint, device: str, check: Callable[[], None],
                  ) -> Iterator[Unit]:
    def layer(i: int) -> None:
        writer.layer(i, encoded(_experts_of(checkpoint, i), writer.layout, device, i, check))

    def group(group: Group) -> None:
        check()
        for name, tensor in checkpoint.read_group(group).items():
            writer.add_to_trunk(name, tensor)
    if checkpoint.spec.table_bytes:
        yield from _table(writer, checkpoint, check)
    for i in range(0 if checkpoint.spec.table_bytes else checkpoint.spec.layers):
        yield Unit(checkpoint.layer_keys(i), partial(layer, i), experts_name(i) in writer.done, i + 1)
    for each in checkpoint.trunk_groups():
        yield Unit(_parts(checkpoint, each), partial(group, each),
                   TRUNK in writer.done or all(name in writer.trunk for name in each.targets))


def _table(writer: FolderWriter, checkpoint: Checkpoint, check: Callable[[], None]) -> Iterator[Unit]:
    def rows(tokens: range) -> None:
        check()
        writer.table.add({block_name(tokens): block(checkpoint, tokens)})
    keys = [part for key in table_keys(checkpoint) for part in checkpoint.source.parts(key)]
    last: tuple[Unit, ...] = ()         # one after the other, each saved, since all wait for the last shard
    for n, tokens in enumerate(blocks(checkpoint.spec)):
        there = TABLE in writer.done or block_name(tokens) in writer.table
        unit = Unit(keys, partial(rows, tokens), there, n + 1, last)
        last = (unit,)
        yield unit


def _over_text(writer: FolderWriter, checkpoint: Checkpoint, documents: Documents, device: str,
               check: Callable[[], None], model: Path | None) -> Iterator[Unit]:
    """What the layers need, the layers in their order, and the rest of the trunk whenever it comes."""
    work = Requantizer(checkpoint, writer, documents, device, check, model)
    before = [Unit(_parts(checkpoint, group), partial(work.outside, group), work.has([group]))
              for group in work.walk.before]
    yield from before
    last: tuple[Unit, ...] = tuple(before)
    for n, groups in enumerate(work.walk.within):
        index = work.index(n)
        keys = [] if index is None else checkpoint.layer_keys(index)
        keys += [key for group in groups for key in _parts(checkpoint, group)]
        unit = Unit(keys, partial(work.layer, n), work.is_done(n), n + 1, last)
        last = (unit,)
        yield unit
    for group in work.walk.behind:
        yield Unit(_parts(checkpoint, group), partial(work.outside, group), work.has([group]))


def _parts(checkpoint: Checkpoint, group: Group) -> list[str]:
    return [part for key in group.keys for part in checkpoint.source.parts(key)]


def _experts_of(checkpoint: Checkpoint, layer: int) -> Iterator[ExpertLayer]:
    for e in range(checkpoint.spec.experts):
        yield checkpoint.read_expert(layer, e)


def noted(documents: Documents, model: Path | None) -> dict:
    """What the manifest's "calibration" says of codes that were compensated over a text, until levels are measured."""
    return {"codes": digest(documents, model)} if documents else {}


class _Clock:
    """Turns layers done into weights per second and time left, counting only what this run worked on."""

    def __init__(self, layers: int, weights_per_layer: int, report: Report, part: str) -> None:
        self.part = part
        self.layers, self.weights, self.tell = layers, weights_per_layer, report
        self.start, self.n_worked = time.monotonic(), 0

    def report(self, done: int, worked: bool = False) -> None:
        self.n_worked += worked
        per_layer = (time.monotonic() - self.start) / self.n_worked if self.n_worked else 0.0
        rate = self.weights / per_layer if per_layer else 0.0
        text = (f"Compressing {self.part} {done + 1} of {self.layers}" if done < self.layers else
                "Compressing the rest" if done == self.layers else "Compressed")
        self.tell(Progress(done, self.layers + 1, rate, per_layer * (self.layers + 1 - done), text))
