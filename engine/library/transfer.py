"""The lower half of a download: what is wanted, what is there already, files from the Hub one after the other."""
from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from engine.core import UserError
from engine.disk import trouble
from engine.library.hub import Hub, Listing, RemoteFile
from engine.library.installed import Source, is_begun
from engine.progress import Meter

TOKENS = 32_768     # of the texts that codes are compensated on, unless somebody wishes otherwise
MADE = "made"       # in the folder of an unfinished download: the compressed model
GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Wanted:
    """What a typed name means. revision: of the repository; gguf_file: the one to take, "" for the only one.

    like: whose configuration and tokenizer belong to a GGUF file (folder, catalogue name, Hub id), "" to find out.
    """

    name: str
    repository: str
    revision: str = "main"
    ready: str = ""
    gguf_repository: str = ""
    gguf_file: str = ""
    like: str = ""


@dataclass(frozen=True)
class CompressOptions:
    """How to compress where that is needed. trunk_bits None: what the plan takes for the device. keep_original: the
    checkpoint stays beside the result as NAME-original, a model at level `full`. texts: what its codes are to err less
    on (engine/quality/requantize.py), about so many tokens together. group_size None: 128 where it divides hidden.
    felt_by: as `model` of its `Text`."""

    trunk_bits: int | None = None
    device: str | None = None
    keep_original: bool = True
    texts: tuple[Path, ...] = ()
    text_tokens: int = TOKENS
    group_size: int | None = None
    felt_by: Path | None = None


def fetch_all(hub: Hub, source: Source, files: Iterable[RemoteFile], folder: Path, meter: Meter,
              stop: Event, up_to: int | None = None) -> None:
    """Each file under its plain name, one after the other. up_to: as of `Hub.fetch`."""
    listing = Listing(source.repository, source.commit, source.files)
    for file in files:
        if not (folder / file.name).is_file():
            meter.add(0, f"Fetching {file.name}")
        hub.fetch(listing, file, folder / file.name, meter.add, stop, up_to)


def begin(work: Path, source: Source) -> None:
    """Make the folder of an unfinished download and note what it is."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise trouble(error, work) from error
    if not is_begun(work):
        raise UserError(f"{work} holds something else; move it away or choose another folder.")
    if Source.load(work) != source:
        source.save(work)


def finish(work: Path, source: Source, dest: Path) -> None:
    """What lies whole in `work`/made gets its name, with a note where it comes from; what it was made from goes."""
    source.save(work / MADE)
    os.replace(work / MADE, dest)
    shutil.rmtree(work, ignore_errors=True)


def arrived(folder: Path, files: Iterable[RemoteFile]) -> int:
    """Bytes of these files that are on disk, parts included."""
    total = 0
    for file in files:
        for path in (folder / file.name, folder / (file.name + ".part")):
            total += min(path.stat().st_size, file.bytes) if path.is_file() else 0
    return total


def part_of(name: str) -> tuple[str, int, int] | None:
    """(name before the numbers, number, how many) of one part of a split GGUF file; None for a whole one."""
    found = GGUF_PART.match(name)
    return (found[1], int(found[2]), int(found[3])) if found else None
