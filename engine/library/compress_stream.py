"""An original checkpoint, compressed while it is downloaded: the disk holds the result and about three shards of it.

Shards arrive in the order of their names, one ahead of the work. As soon as all keys of a layer (or of a trunk tensor)
are there it is compressed; a shard that nothing needs any more is deleted, if the user agreed to that. Stopped or
killed at any point it goes on behind the last finished layer: experts files are noted in floe.partial.json, the trunk
grows in a file of its own whose end is noted beside it. Vision and audio parts are not even fetched, unless the
original is to be kept. Over a text there are two passes, as in `compress`: the first makes the model that is asked
which errors an answer feels; an original that is not kept is fetched twice.
"""
from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import torch

from engine.core import UserError
from engine.disk import check_room, write_text_atomically
from engine.files.checkpoint import Checkpoint, own_values
from engine.files.folder_writer import FolderWriter, is_sealed, result_bytes
from engine.files.manifest import INDEX
from engine.files.skeleton import read_config
from engine.files.tensor_source import SafetensorsFolder, open_safetensors, read_index
from engine.library.compress import PLAIN, Unit, left_out, noted, part_of, settled, text_of, units_of, writer_for
from engine.library.hub import Hub, RemoteFile
from engine.library.installed import Source, partial_share, unfinished
from engine.library.transfer import MADE, CompressOptions, arrived, begin, fetch_all, finish
from engine.progress import Meter, Report, check, of_pass, unless
from engine.quality.requantize import expected

Tensor = torch.Tensor
MOST_SHARDS = 3                 # on disk at a time, where the layers of the checkpoint allow it


class ArrivingShards(SafetensorsFolder):
    """The shards of one folder by their index, opened when first read; they may arrive late and leave early."""

    def __init__(self, folder: Path, file_of: dict[str, str]) -> None:
        self.folder, self._file_of, self._open = folder, file_of, {}

    def _handle(self, key: str):
        name = self._file_of[key]
        if name not in self._open:
            self._open[name] = open_safetensors(self.folder / name)
        return self._open[name]

    def files(self) -> Iterable[str]:
        return self._file_of.values()

    def close(self, name: str) -> None:
        self._open.pop(name, None)


def fetch_and_compress(hub: Hub, source: Source, dest: Path, choice: CompressOptions,
                       report: Report, stop: Event) -> None:
    """`dest`, compressed from the original that `source` names; with keep_original also `dest-original`."""
    work = unfinished(dest)
    made, shards, original = work / MADE, work / "source", dest.with_name(dest.name + "-original")
    if choice.keep_original and original.exists() and (shards.exists() or not made.exists()):
        raise UserError(f"{original} exists already; move it away, or let the original be deleted.")
    if not is_sealed(made):
        begin(work, source)
        passes = [(made, choice)]
        if choice.texts and not choice.felt_by:
            passes = [(work / PLAIN, choice), (made, replace(choice, felt_by=work / PLAIN))]
        with ThreadPoolExecutor(1) as ahead:
            for n, (folder, how) in enumerate(passes):
                if not is_sealed(folder):
                    Stream(hub, source, folder, how, report, stop, ahead, (n, len(passes))).run()
    if choice.keep_original and shards.is_dir():
        source.save(shards)
        os.replace(shards, original)
    finish(work, source, dest)


class Stream:
    """One run over all shards that are still needed. made: the folder to make, beside which they lie in `source`;
    passes: the how manieth of how many this is."""

    def __init__(self, hub: Hub, source: Source, made: Path, choice: CompressOptions, report: Report, stop: Event,
                 ahead: ThreadPoolExecutor, passes: tuple[int, int]) -> None:
        self.hub, self.source, self.choice, self.stop, self.ahead = hub, source, choice, stop, ahead
        self.folder, self.made, self.passes = made.with_name("source"), made, passes
        self.ended = Event()        # what is fetched ahead is wanted no more
        self.weights = {file.name: file for file in source.files if file.name.endswith(".safetensors")}
        self.report = of_pass(report, *passes)
        self.seconds_per_unit = 0.0

    def run(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.meter = Meter(self.source.bytes, arrived(self.folder, self.source.files), self.report)
        small = [file for file in self.source.files if file.name not in self.weights]
        fetch_all(self.hub, self.source, small, self.folder, self.meter, self.stop)
        file_of = self._file_of()
        self.tensors = ArrivingShards(self.folder, file_of)
        checkpoint = Checkpoint.arriving(read_config(self.folder), self.tensors,
                                         self.source.repository.partition("/")[2])
        origin = f"{self.source.repository} at {self.source.commit}"
        device, bits = settled(self.choice)
        text = text_of(self.choice)
        documents = text.documents(self.folder)     # also looked at before the pass that makes nothing of them
        if documents and not self.passes[0]:
            self.meter.add(0, expected(checkpoint.spec, documents, device, has_model=self.passes[1] == 1))
        if self.passes[0] + 1 < self.passes[1]:
            documents = []
        writer = writer_for(checkpoint, self.made, origin, self.choice.group_size, bits, documents, text.model)
        if checkpoint.left_out and not checkpoint.spec.table_bytes:
            self.meter.add(0, left_out(checkpoint))
        try:
            with writer:
                units = list(units_of(writer, checkpoint, device, partial(check, self.stop), documents, text.model))
                for unit in units:
                    unit.files = frozenset(file_of[key] for key in unit.keys)
                self._all_shards(copies_last(units, checkpoint), writer)
                self._tell_copies(checkpoint, writer)
                writer.seal(checkpoint.text_config, checkpoint.skeleton, self.folder,
                            calibration=noted(documents, text.model))
        finally:
            self.ended.set()

    def _tell_copies(self, checkpoint: Checkpoint, writer: FolderWriter) -> None:
        """Both are compressed by now, and were never here together before: a mere copy is stored once."""
        own = writer.without_copies(checkpoint.copies)
        if checkpoint.copies:
            checkpoint.text_config.tie_word_embeddings = not own
        if own:
            self.meter.add(0, own_values(own))

    def _file_of(self) -> dict[str, str]:
        """Key -> shard; without an index all shards have to arrive before they can be asked."""
        if (self.folder / INDEX).is_file():
            return names_in_index(self.folder, self.weights)
        fetch_all(self.hub, self.source, self.weights.values(), self.folder, self.meter, self.stop)
        return {key: name for name in self.weights for key in open_safetensors(self.folder / name).keys()}

    def _all_shards(self, units: list[Unit], writer: FolderWriter) -> None:
        order = self._needed(units)
        self._check_room(units, order, writer)
        next_one = self._fetch(order, 0)
        for n, name in enumerate(order):
            if next_one is None:
                next_one = self._fetch(order, n)
            unless(self.stop.is_set, next_one.result)
            here = {each for each in order[:n + 1] if (self.folder / each).is_file()}
            next_one = self._fetch(order, n + 1) if len(here) < MOST_SHARDS else None
            self._compress(units, set(order[n + 1:]), writer)
            writer.save()
            share = (self.passes[0] + self.meter.done / max(1, self.meter.total)) / self.passes[1]
            write_text_atomically(partial_share(self.folder.parent), str(share))
            self._release(units, here)
            self.tensors.close(name)

    def _needed(self, units: list[Unit]) -> list[str]:
        """Names of the shards that are still to be read, in order; all of them when the original is kept."""
        open_files = set().union(*(unit.files for unit in units if not unit.done))
        kept = set(self.tensors.files()) if self.choice.keep_original else set()
        order = [name for name in sorted(self.weights) if name in open_files | kept]
        skipped = sum(self.weights[name].bytes for name in self.weights.keys() - set(order))
        self.meter.done = arrived(self.folder, [file for file in self.source.files if file.name not in self.weights
                                                or file.name in order]) + skipped
        return order

    def _fetch(self, order: list[str], n: int) -> Future | None:
        if n >= len(order):
            return None
        file = self.weights[order[n]]
        return self.ahead.submit(fetch_all, self.hub, self.source, [file], self.folder, self.meter, self.ended)

    def _compress(self, units: list[Unit], absent: set[str], writer: FolderWriter) -> None:
        for unit in units:
            if unit.is_ready(absent):
                check(self.stop)
                n_layers = sum(bool(each.layer) for each in units)
                part = f"Compressing {part_of(writer.spec)} {unit.layer} of {n_layers}"
                self.meter.add(0, part if unit.layer else "")
                begun = time.monotonic()
                unit.work()
                unit.done = True
                if unit.after:                  # over a text a layer is hours of work: what it gave stays
                    writer.save()
                self._pace(units, time.monotonic() - begun, bool(unit.layer))

    def _pace(self, units: list[Unit], seconds: float, is_layer: bool) -> None:
        """Tell the meter how long the layers that are left will take: the network may not be the slowest part."""
        if is_layer:
            self.seconds_per_unit = seconds if not self.seconds_per_unit else (self.seconds_per_unit + seconds) / 2
            self.meter.other_seconds = self.seconds_per_unit * sum(bool(u.layer) and not u.done for u in units)

    def _release(self, units: list[Unit], here: set[str]) -> None:
        if self.choice.keep_original:
            return
        for name in here - set().union(*(unit.files for unit in units if not unit.done)):
            self.tensors.close(name)
            (self.folder / name).unlink()

    def _check_room(self, units: list[Unit], order: list[str], writer: FolderWriter) -> None:
        files = [self.weights[name] for name in order]
        shards = sum(file.bytes for file in files) if self.choice.keep_original else most_held(units, files)
        results = (self.passes[1] - self.passes[0]) * result_bytes(writer.spec, writer.trunk_bits)
        there = sum(path.stat().st_size for path in self.made.iterdir() if path.is_file())
        hint = ", let each part of the original be deleted once it is compressed" if self.choice.keep_original else ""
        check_room(self.folder, max(0, results - there) + shards - arrived(self.folder, files), hint)


def copies_last(units: list[Unit], checkpoint: Checkpoint) -> list[Unit]:
    """What may turn out to be a copy of another tensor is added to the trunk behind everything else."""
    wanted = {part for name in checkpoint.copies for key in checkpoint.map.of[name].keys
              for part in checkpoint.source.parts(key)}
    last = [unit for unit in units if wanted.intersection(unit.keys)]
    for n, unit in enumerate(last):
        unit.after = (*(each for each in units if each not in last), *last[:n])
    return [*(unit for unit in units if unit not in last), *last]


def reach(unit: Unit) -> frozenset[str]:
    """The files of a unit and of all that is done before it."""
    return unit.files.union(*map(reach, unit.after))


def most_held(units: list[Unit], files: list[RemoteFile]) -> int:
    """Bytes of shards that lie on the disk together at the worst moment, the one that is being fetched included."""
    worst, open_ones = 0, [(unit.files, reach(unit)) for unit in units if not unit.done]
    for n in range(len(files)):
        absent = {file.name for file in files[n:]}
        waiting = set().union(*(own for own, reached in open_ones if reached & absent))
        worst = max(worst, sum(file.bytes for file in files[:n] if file.name in waiting)
                    + sum(file.bytes for file in files[n:n + 2]))
    return worst


def names_in_index(folder: Path, weights: dict[str, RemoteFile]) -> dict[str, str]:
    """Key -> shard. UserError for an index that is damaged or names what the repository does not have."""
    names = read_index(folder)
    for name in sorted(set(names.values())):
        if name not in weights:
            raise UserError(f"The repository lacks {name}, which its {INDEX} names; choose another source.")
    return names
