"""An original checkpoint, compressed while it is downloaded: the disk holds the result and about three shards of it.

Shards arrive in the order of their names, one ahead of the work. As soon as all keys of a layer (or of a trunk tensor)
are there it is compressed; a shard that nothing needs any more is deleted, if the user agreed to that. Stopped or
killed at any point it goes on behind the last finished layer: experts files are noted in floe.partial.json, the trunk
grows in a file of its own whose end is noted beside it. Vision and audio parts are not even fetched, unless the
original is to be kept.
"""
from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch

from engine.core import UserError
from engine.disk import check_room, read_json, write_text_atomically, writing
from engine.files.checkpoint import Checkpoint
from engine.files.compressed import SafetensorsWriter
from engine.files.manifest import MTP, TRUNK, experts_name
from engine.files.skeleton import read_config
from engine.files.tensor_source import SafetensorsFolder, open_safetensors
from engine.files.trunk import CODES, bits_of, encode
from engine.library.compress import Making, experts_of, is_sealed, result_bytes
from engine.library.hub import Hub, RemoteFile, Stopped
from engine.library.installed import Source, partial, partial_share
from engine.library.transfer import INDEX, Choice, arrived, begin, fetch_all
from engine.machine import errors
from engine.planning.sizes import DEFAULT_TRUNK_BITS
from engine.progress import Meter, Progress

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


class GrowingFile:
    """A safetensors file that is written over several runs: `NAME.part`, and beside it how much of that counts.

    `save` after every shard, `finish` when all tensors are in. Nothing is created before the first tensor.
    """

    def __init__(self, path: Path, n_tensors: int) -> None:
        self.path, self.notes = path, path.with_name(path.name + ".part.json")
        self.writer = SafetensorsWriter(path, n_tensors)
        if self.notes.is_file() and self.writer.temporary.is_file():
            state = json.loads(self.notes.read_text(encoding="utf-8"))
            self.writer.header, self.writer.position = state["header"], state["position"]
            self._open("r+b")

    def __contains__(self, name: str) -> bool:
        return name in self.writer.header or name + CODES in self.writer.header

    def add(self, tensors: dict[str, Tensor]) -> None:
        if not self.is_open:
            self._open("w+b")
        with writing(self.path, keep=True):
            for name, tensor in tensors.items():
                self.writer.add(name, tensor)

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
        if self.is_open:
            self.writer.file.close()

    @property
    def is_open(self) -> bool:
        return hasattr(self.writer, "file") and not self.writer.file.closed

    def _open(self, mode: str) -> None:
        with writing(self.path, keep=True):
            self.writer.file = self.writer.temporary.open(mode)
            self.writer.file.truncate(self.writer.start + self.writer.position)
            self.writer.file.seek(self.writer.start + self.writer.position)


@dataclass
class Unit:
    """One thing that can be compressed once its shards are there; `files` their names."""

    name: str
    files: frozenset[str]
    work: Callable[[], None]
    done: bool = False


def fetch_and_compress(hub: Hub, source: Source, dest: Path, choice: Choice, report: Callable[[Progress], None],
                       stop: Event) -> None:
    """`dest`, compressed from the original that `source` names; with keep_original also `dest-original`."""
    work = partial(dest)
    made, shards, original = work / "made", work / "source", dest.with_name(dest.name + "-original")
    if choice.keep_original and original.exists() and (shards.exists() or not made.exists()):
        raise UserError(f"{original} exists already; move it away, or let the original be deleted.")
    if not is_sealed(made):
        begin(work, source)
        with ThreadPoolExecutor(1) as ahead:
            Stream(hub, source, work, choice, report, stop, ahead).run()
    source.save(made)
    if choice.keep_original and shards.is_dir():
        source.save(shards)
        os.replace(shards, original)
    os.replace(made, dest)
    shutil.rmtree(work, ignore_errors=True)


class Stream:
    """One run over all shards that are still needed."""

    def __init__(self, hub: Hub, source: Source, work: Path, choice: Choice, report: Callable[[Progress], None],
                 stop: Event, ahead: ThreadPoolExecutor) -> None:
        self.hub, self.source, self.choice, self.stop, self.ahead = hub, source, choice, stop, ahead
        self.folder, self.made = work / "source", work / "made"
        self.halt = _Either(stop)
        self.weights = {file.name: file for file in source.files if file.name.endswith(".safetensors")}
        self.report = report
        self.seconds_per_unit = 0.0

    def run(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.meter = Meter(self.source.bytes, arrived(self.folder, self.source.files), self.report)
        small = [file for file in self.source.files if file.name not in self.weights]
        fetch_all(self.hub, self.source, small, self.folder, self.meter, self.halt)
        file_of = self._file_of()
        self.tensors = ArrivingShards(self.folder, file_of)
        checkpoint = Checkpoint(read_config(self.folder), self.tensors, self.source.repository.partition("/")[2])
        origin = f"{self.source.repository} at {self.source.commit}"
        bits = self.choice.trunk_bits or DEFAULT_TRUNK_BITS[errors.device_for(self.choice.device)[0]]
        making = Making.begin(checkpoint, self.made, origin, None, bits, self.choice.device)
        if checkpoint.left_out:
            self.meter.say(f"Left out, the text model has no place for them: {', '.join(checkpoint.left_out)}.")
        grown = [GrowingFile(self.made / TRUNK, 2 * len(checkpoint.skeleton.state_dict())),
                 GrowingFile(self.made / MTP, len(checkpoint.map.mtp))]
        try:
            for file in grown:
                if file.path.is_file() and file.path.name not in making.done:       # killed just behind its renaming
                    making.finished(file.path.name)
            self._all_shards(list(units_of(making, *grown, file_of, self._pause_if_asked)), making, grown)
            for file in grown:
                if file.is_open:
                    file.finish()
                    making.finished(file.path.name)
            making.seal(self.folder)
        finally:
            self.halt.set()
            for file in grown:
                file.close()

    def _file_of(self) -> dict[str, str]:
        """Key -> shard; without an index all shards have to arrive before they can be asked."""
        if (self.folder / INDEX).is_file():
            return names_in_index(self.folder, self.weights)
        fetch_all(self.hub, self.source, self.weights.values(), self.folder, self.meter, self.halt)
        return {key: name for name in self.weights for key in open_safetensors(self.folder / name).keys()}

    def _all_shards(self, units: list[Unit], making: Making, grown: list[GrowingFile]) -> None:
        order = self._needed(units)
        self._check_room(units, order, making)
        next_one = self._fetch(order, 0)
        for n, name in enumerate(order):
            if next_one is None:
                next_one = self._fetch(order, n)
            next_one.result()
            here = {each for each in order[:n + 1] if (self.folder / each).is_file()}
            next_one = self._fetch(order, n + 1) if len(here) < MOST_SHARDS else None
            self._compress(units, set(order[n + 1:]))
            for file in grown:
                file.save()
            write_text_atomically(partial_share(self.folder.parent), str(self.meter.done / max(1, self.meter.total)))
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
        return self.ahead.submit(fetch_all, self.hub, self.source, [file], self.folder, self.meter, self.halt)

    def _compress(self, units: list[Unit], absent: set[str]) -> None:
        for unit in units:
            if not unit.done and not unit.files & absent:
                self._pause_if_asked()
                self.meter.say(f"Compressing {unit.name}" if unit.name else "")
                begun = time.monotonic()
                unit.work()
                unit.done = True
                self._pace(units, time.monotonic() - begun, bool(unit.name))

    def _pace(self, units: list[Unit], seconds: float, is_layer: bool) -> None:
        """Tell the meter how long the layers that are left will take: the network may not be the slowest part."""
        if is_layer:
            self.seconds_per_unit = seconds if not self.seconds_per_unit else (self.seconds_per_unit + seconds) / 2
            self.meter.other_seconds = self.seconds_per_unit * sum(bool(u.name) and not u.done for u in units)

    def _release(self, units: list[Unit], here: set[str]) -> None:
        if self.choice.keep_original:
            return
        for name in here - set().union(*(unit.files for unit in units if not unit.done)):
            self.tensors.close(name)
            (self.folder / name).unlink()

    def _pause_if_asked(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def _check_room(self, units: list[Unit], order: list[str], making: Making) -> None:
        files = [self.weights[name] for name in order]
        shards = sum(file.bytes for file in files) if self.choice.keep_original else most_held(units, files)
        result = result_bytes(making.checkpoint.spec, making.trunk_bits)
        there = sum(path.stat().st_size for path in self.made.iterdir() if path.is_file())
        hint = ", let each part of the original be deleted once it is compressed" if self.choice.keep_original else ""
        check_room(self.folder, max(0, result - there) + shards - arrived(self.folder, files), hint)


def units_of(making: Making, trunk: GrowingFile, mtp: GrowingFile, file_of: dict[str, str],
             pause: Callable[[], None]) -> Iterator[Unit]:
    """Layers, trunk tensors and multi-token-prediction tensors, those of an earlier run marked as done."""
    checkpoint, n_layers = making.checkpoint, making.checkpoint.spec.layers

    def files(keys: list[str]) -> frozenset[str]:
        return frozenset(file_of[part] for key in keys for part in checkpoint.source.parts(key))

    for i in range(n_layers):
        yield Unit(f"layer {i + 1} of {n_layers}", frozenset(file_of[key] for key in checkpoint.layer_keys(i)),
                   lambda i=i: making.layer(i, experts_of(checkpoint, i, pause)), experts_name(i) in making.done)
    for group in checkpoint.trunk_groups():
        yield Unit("", files(group.keys), lambda group=group: _trunk_group(making, trunk, group),
                   TRUNK in making.done or all(name in trunk for name in group.targets))
    for key in checkpoint.map.mtp:
        yield Unit("", files([key]), lambda key=key: mtp.add({key: checkpoint.source.get(key)}),
                   MTP in making.done or key in mtp)


def most_held(units: list[Unit], files: list[RemoteFile]) -> int:
    """Bytes of shards that lie on the disk together at the worst moment, the one that is being fetched included."""
    worst = 0
    for n in range(len(files)):
        absent = {file.name for file in files[n:]}
        waiting = set().union(*(unit.files for unit in units if not unit.done and unit.files & absent))
        worst = max(worst, sum(file.bytes for file in files[:n] if file.name in waiting)
                    + sum(file.bytes for file in files[n:n + 2]))
    return worst


def _trunk_group(making: Making, trunk: GrowingFile, group) -> None:
    for name, tensor in making.checkpoint.read_group(group).items():
        bits = bits_of(name, tensor, making.trunk_bits, making.checkpoint.spec.decoder_layers)
        trunk.add(encode(name, tensor, bits))


def names_in_index(folder: Path, weights: dict[str, RemoteFile]) -> dict[str, str]:
    """Key -> shard. UserError for an index that is damaged or names what the repository does not have."""
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        names = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The {INDEX} of the repository is damaged; choose another source.") from error
    for name in sorted(set(names.values())):
        if name not in weights:
            raise UserError(f"The repository lacks {name}, which its {INDEX} names; choose another source.")
    return names


class _Either(Event):
    """Set when it is set itself or the other event is."""

    def __init__(self, other: Event) -> None:
        super().__init__()
        self.other = other

    def is_set(self) -> bool:
        return super().is_set() or self.other.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        end = time.monotonic() + (timeout or 0)
        while not self.is_set() and time.monotonic() < end:
            super().wait(min(0.1, max(0.0, end - time.monotonic())))
        return self.is_set()
