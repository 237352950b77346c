"""Work on models of this disk, in the background: a checkpoint compressed, a GGUF file imported, levels calibrated.

What is made is made in `NAME.partial` and renamed when whole, like a download; stopped or killed it goes on behind the
last finished layer. A calibration replaces a file at its end; stopped or killed it goes on behind the last document
that it has measured. In their `Progress` the bytes count layers, or tokens. Load torch only when they start.
"""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

from engine.core import UserError
from engine.disk import write_text_atomically
from engine.library.installed import claimed, models, partial_share, place_of, unfinished
from engine.library.transfer import CompressOptions, part_of
from engine.paths import CALIBRATION_LOG
from engine.progress import Progress, Report, check, said, unheard

ENDING = "-floe"


def compressed_name(name: str) -> str:
    """What the compressed form of the checkpoint `name` is called."""
    return name + ENDING


def compress_installed(name: str, data: str | Path | None = None, choice: CompressOptions | None = None,
                       report: Report = unheard, stop: Event | None = None) -> Path:
    """Compress the checkpoint `name` of the data folder beside it; -> the new folder.

    Stopped, within an expert, when `stop` is set. UserError: no such checkpoint, or it cannot be compressed.
    """
    source = next((model.folder for model in models(data) if model.name == name and model.kind == "checkpoint"), None)
    if source is None:
        raise UserError(f"There is no checkpoint {name!r} in the data folder to compress.")

    def work(dest: Path, bits: int, device: str, heard: Report, check: Callable[[], None]) -> None:
        from engine.library.compress import compress, text_of
        compress(source, dest, choice.group_size, bits, device, heard, check, text_of(choice))
    choice = choice or CompressOptions()
    return _made(compressed_name(name), data, choice, report, stop or Event(), work)


def import_file(file: Path, like: str = "", data: str | Path | None = None, choice: CompressOptions | None = None,
                report: Report = unheard, stop: Event | None = None) -> Path:
    """Import the GGUF file of that path into the data folder, under the file's name; -> the new folder.

    like: see `engine.library.gguf_import.import_gguf`. Stopped, within an expert, when `stop` is set. UserError.
    """
    def work(dest: Path, bits: int, device: str, heard: Report, check: Callable[[], None]) -> None:
        from engine.library.compress import text_of
        from engine.library.gguf_import import import_gguf
        import_gguf(file, dest, like, bits, device, heard, check, None, text_of(choice), choice.group_size)
    part, choice = part_of(file.name), choice or CompressOptions()
    return _made(part[0] if part else file.stem, data, choice, report, stop or Event(), work)


def calibrate_installed(name: str, data: str | Path | None = None, text: Path | None = None, device: str | None = None,
                        report: Report = unheard, stop: Event | None = None) -> Path:
    """Measure what each level of the compressed model `name` may leave out, on `text` (None: ours); -> its folder.

    Stopped, before the next expert, when `stop` is set. UserError: no such model, a text that is too short.
    `seconds_left` is the longest it may take: how many trials a promise needs is not known before.
    """
    folder = _compressed(name, data)
    stop, begun, saying, heard = stop or Event(), 0.0, "", -1
    with claimed(folder):
        report(said("Loading the model"))
        from engine.quality.calibrate import calibrate
        from engine.quality.texts import CALIBRATION_TEXT, CALIBRATION_TOKENS

        def say(line: str) -> None:
            nonlocal saying
            saying = line.split(":")[0]  # the figures behind it are for a terminal

        def measured(read: int, skipped: int, most: int) -> None:
            nonlocal begun, heard
            check(stop)
            if read == heard:           # asked between two experts of one document
                return
            heard, begun = read, begun or time.monotonic()
            left = (time.monotonic() - begun) / read * (most - skipped - read) if read else None
            report(Progress(read + skipped, most, 0.0, left, saying))
        calibrate(folder, [text or CALIBRATION_TEXT], CALIBRATION_TOKENS, None, device, say, measured)
    return folder


def drop_calibration(name: str, data: str | Path | None = None) -> None:
    """Throw away what a calibration of the model `name` that was stopped has measured. UserError: no such model."""
    folder = _compressed(name, data)
    with claimed(folder):
        (folder / CALIBRATION_LOG).unlink(missing_ok=True)


def _compressed(name: str, data: str | Path | None) -> Path:
    folder = next((model.folder for model in models(data) if model.name == name and model.kind == "compressed"), None)
    if folder is None:
        raise UserError(f"There is no compressed model {name!r} in the data folder to calibrate.")
    return folder


def _made(name: str, data: str | Path | None, choice: CompressOptions, report: Report, stop: Event,
          work: Callable) -> Path:
    """Run `work` into the partial folder of `name` and give the result its name."""
    dest = place_of(name, data)
    with claimed(dest):
        if dest.exists():
            raise UserError(f"{name} is there already; delete it first to make it again.")
        making = unfinished(dest)
        report(said("Loading the compressor"))
        from engine.files.folder_writer import is_sealed
        from engine.library.compress import settled
        device, bits = settled(choice)

        def heard(progress: Progress) -> None:
            if progress.done_bytes:     # of a sentence there is nothing to note
                write_text_atomically(partial_share(making), f"{progress.done_bytes / progress.total_bytes:.4f}")
            report(replace(progress, bytes_per_second=0.0))
        if not is_sealed(making):
            work(making, bits, device, heard, partial(check, stop))
        share = partial_share(making)
        for left in (share, share.with_name(f"{share.name}.part")):     # the second of a note that a kill cut short
            left.unlink(missing_ok=True)
        os.replace(making, dest)
    return dest
