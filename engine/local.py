"""Models made from what is on this disk already, in the background: a checkpoint compressed, a GGUF file imported.

Made in `NAME.partial` and renamed when whole, like a download; stopped or killed they go on behind the last finished
layer. In their `Progress` the bytes count layers. Load torch only when they start to work.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event

from engine.fetch import Choice, part_of
from engine.hub import Stopped
from engine.installed import models, models_dir, only_one, partial, partial_share
from engine.progress import Progress
from engine.spec import UserError

ENDING = "-floe"
Report = Callable[[Progress], None]


def compressed_name(name: str) -> str:
    """What the compressed form of the checkpoint `name` is called."""
    return name + ENDING


def compress_installed(name: str, data: str | Path | None = None, choice: Choice | None = None,
                       report: Report = lambda progress: None, stop: Event | None = None) -> Path:
    """Compress the checkpoint `name` of the data folder beside it; -> the new folder.

    Stopped, after the layer in work, when `stop` is set. UserError: no such checkpoint, or it cannot be compressed.
    """
    source = next((model.folder for model in models(data) if model.name == name and model.kind == "checkpoint"), None)
    if source is None:
        raise UserError(f"There is no checkpoint {name!r} in the data folder to compress.")

    def work(dest: Path, bits: int, device: str, told: Callable, check: Callable[[], None]) -> None:
        from engine.compress import compress
        compress(source, dest, trunk_bits=bits, device=device, report=told)
    return _made(compressed_name(name), data, choice or Choice(), report, stop or Event(), work)


def import_file(file: Path, like: str = "", data: str | Path | None = None, choice: Choice | None = None,
                report: Report = lambda progress: None, stop: Event | None = None) -> Path:
    """Import the GGUF file of that path into the data folder, under the file's name; -> the new folder.

    like: see `engine.gguf_import.import_gguf`. Stopped, before the next expert, when `stop` is set. UserError.
    """
    def work(dest: Path, bits: int, device: str, told: Callable, check: Callable[[], None]) -> None:
        from engine.gguf_import import import_gguf
        import_gguf(file, dest, like, bits, device, told,
                    lambda sentence: report(Progress(0, 1, 0.0, None, sentence)), check)
    part = part_of(file.name)
    return _made(part[0] if part else file.stem, data, choice or Choice(), report, stop or Event(), work)


def _made(name: str, data: str | Path | None, choice: Choice, report: Report, stop: Event, work: Callable) -> Path:
    """Run `work` into the partial folder of `name` and give the result its name."""
    dest = models_dir(data) / name
    with only_one(dest):
        if dest.exists():
            raise UserError(f"{name} is there already; delete it first to make it again.")
        making = partial(dest)
        report(Progress(0, 1, 0.0, None, "Loading the compressor"))
        from engine.card_errors import device_for
        from engine.plan import DEFAULT_TRUNK_BITS
        device, _ = device_for(choice.device)

        def check() -> None:
            if stop.is_set():
                raise Stopped

        def told(progress) -> None:
            partial_share(making).write_text(f"{progress.layer / progress.layers:.4f}", encoding="utf-8")
            report(Progress(progress.layer, progress.layers, 0.0, progress.seconds_left,
                            f"Compressing layer {min(progress.layer + 1, progress.layers)} of {progress.layers}"))
            if progress.layer < progress.layers:
                check()
        work(making, choice.trunk_bits or DEFAULT_TRUNK_BITS[device], device, told, check)
        partial_share(making).unlink(missing_ok=True)
        os.replace(making, dest)
    return dest
