"""A compressed folder made again from its original, with codes that err less (engine/quality/requantize.py).

The old one's gradients say which errors an answer feels. The new one is made beside it, `NAME-again`, over as many runs
as it takes, and then takes its place in two renames; a run that was killed between them is put right by the next one.
What was measured of the levels goes: it held for the old codes.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.core import UserError
from engine.files.folder_writer import is_sealed
from engine.files.manifest import Manifest
from engine.library.compress import compress
from engine.library.download import download
from engine.library.gguf_import import import_gguf
from engine.library.hub import Hub
from engine.library.installed import SOURCE
from engine.library.transfer import CompressOptions
from engine.model.registration import SIZES
from engine.paths import typed
from engine.progress import Report, said, unheard
from engine.quality.requantize import Text, digest


def requantize(folder: Path, original: str, text: Text, device: str | None = None, like: str = "",
               report: Report = unheard, check: Callable[[], None] = lambda: None, hub: Hub | None = None) -> None:
    """Put codes in place of those of `folder`.

    original: the checkpoint it was made from: a folder, a GGUF file (like: its configuration, see `import_gguf`), else
    a catalogue name or Hub id, which is downloaded and removed again. UserError, MachineError: one sentence; the old
    folder stays until the new one is whole.
    """
    again, before = (folder.with_name(folder.name + ending) for ending in ("-again", "-before"))
    if before.is_dir() and not folder.is_dir():
        os.replace(again if is_sealed(again) else before, folder)
    shutil.rmtree(before, ignore_errors=True)
    manifest, text = Manifest.load(folder), replace(text, model=folder)
    if manifest.calibration.get("codes") == digest(text.documents(folder), folder):
        report(said(f"The codes of {folder} are those of this text already."))
        return
    if not is_sealed(again):
        path, bits, group = typed(original), manifest.trunk_bits, manifest.group_size
        if path.is_dir():
            compress(path, again, group, bits, device, report, check, text)
        elif path.suffix == ".gguf":
            import_gguf(path, again, like, bits, device, report, check, hub, text, group)
        else:
            choice = CompressOptions(bits, device, False, text.paths, text.n_tokens, group, folder)
            download(original, "original", again, None, hub, report, None, choice)
    made = Manifest.load(again)
    if any(getattr(made, name) != getattr(manifest, name) for name in SIZES):
        shutil.rmtree(again)
        raise UserError(f"{original} is not what {folder} was made from: its layers and experts are others; name its "
                        "original.")
    if (folder / SOURCE).is_file():
        shutil.copyfile(folder / SOURCE, again / SOURCE)
    os.replace(folder, before)
    os.replace(again, folder)
    shutil.rmtree(before, ignore_errors=True)
