"""GGUF files to a compressed folder, and what quantising twice costs.

Configuration and tokenizer are the original's: a folder that holds them, or a repository of which only these small
files are fetched. Groups of a GGUF file run along another axis than ours, so its codes cannot be kept: every weight is
decoded and quantised again, and `cost` measures what that adds, matrix kind by matrix kind.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event

import torch

from engine import compress as compression
from engine.checkpoint import Checkpoint
from engine.fetch import INDEX, Choice, arrived, begin, check_disk, fetch_all
from engine.format import MANIFEST, Manifest
from engine.gguf_source import GgufSource
from engine.hub import Hub, Listing, Stopped
from engine.installed import Source, partial
from engine.plan import DEFAULT_TRUNK_BITS
from engine.progress import Meter, Progress
from engine.quantize import nested
from engine.skeleton import read_config, text_config_of
from engine.spec import UserError
from kernels.layout import Layout, default_group_size
from kernels.planes import decode_down, decode_gate, decode_up, record_rows, sketch_rows

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
KINDS = ("gate", "up", "down")
Say = Callable[[str], None]


def import_gguf(file: Path, dest: Path, like: Path, trunk_bits: int = 16, device: str | None = None,
                report: Callable[[compression.Progress], None] = lambda progress: None,
                say: Say = lambda sentence: None) -> Manifest:
    """Make the compressed folder `dest` from a GGUF file (of several parts: any of them) and the original's
    configuration and tokenizer in the folder `like`. say: receives the warning of what quantising twice costs."""
    paths = parts_of(Path(file))
    config = text_config_of(read_config(like))
    source = GgufSource(paths, config)
    checkpoint = Checkpoint(config, source, source.name.removesuffix(".gguf"))
    checkpoint.check_shapes()
    if source.left_out:
        say(f"Left out, the text model has no place for them: {len(source.left_out)} tensors, the first is "
            f"{source.left_out[0]}.")
    say(warning(source, cost(checkpoint)))
    origin = f"{source.name} like {config.model_type}"
    return compression.compress_checkpoint(checkpoint, like, dest, origin, None, trunk_bits, device, report)


def parts_of(file: Path) -> list[Path]:
    """All parts of a file that was split (`-00001-of-00003.gguf`). UserError when one is missing."""
    stem, marker, rest = file.name.partition("-00")
    if not marker or "-of-" not in rest:
        return [file]
    number = int(rest.partition("-of-")[2].removesuffix(".gguf"))
    paths = [file.with_name(f"{stem}-{i:05d}-of-{number:05d}.gguf") for i in range(1, number + 1)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path.name} is missing beside {file.name}; get all {number} parts.")
    return paths


def cost(checkpoint: Checkpoint) -> dict[str, float]:
    """Relative error that quantising again adds, gate, up and down: root of the summed squares of the differences
    over that of the weights. Measured on one expert of the first, the middle and the last layer."""
    spec = checkpoint.spec
    layout = Layout(spec.hidden, spec.neurons, default_group_size(spec.hidden))
    errors, weights = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for layer in sorted({0, spec.layers // 2, spec.layers - 1}):
        expert = checkpoint.read_expert(layer, 0)
        before = [getattr(expert, kind)[0].float() for kind in KINDS]
        codes = [nested(matrix, layout) for matrix in before]
        sketch, records = sketch_rows(codes[0], codes[1], layout), record_rows(*codes, layout)
        after = (decode_gate(sketch, records, layout), decode_up(sketch, records, layout), decode_down(records, layout))
        for kind, old, new in zip(KINDS, before, after, strict=True):
            errors[kind] += float((new[:, :spec.hidden] - old).square().sum())
            weights[kind] += float(old.square().sum())
    return {kind: (errors[kind] / weights[kind]) ** 0.5 if weights[kind] else 0.0 for kind in KINDS}


def warning(source: GgufSource, added: dict[str, float]) -> str:
    parts = ", ".join(f"{kind} {100 * error:.1f} %" for kind, error in added.items())
    return (f"The experts of {source.name} are stored as {', '.join(sorted(source.kinds()))} and are quantised a "
            f"second time: that adds a relative weight error of {parts}. The original checkpoint gives a better "
            "result.")


def fetch_and_import(hub: Hub, source: Source, original: str, dest: Path, choice: Choice,
                     report: Callable[[Progress], None], stop: Event) -> None:
    """`dest` from the GGUF files that `source` names, with configuration and tokenizer of the repository `original`."""
    work = partial(dest)
    small = _small_files(hub, source, original, stop)
    check_disk(work, 2 * source.bytes - arrived(work, source.files))
    begin(work, source)
    like = work / "like"
    like.mkdir(exist_ok=True)
    meter = Meter(source.bytes, arrived(work, source.files), report)
    quiet = Meter(small.bytes, 0, lambda progress: None)
    fetch_all(hub, small, small.files, like, quiet, stop)
    fetch_all(hub, source, source.files, work, meter, stop)
    bits = choice.trunk_bits or DEFAULT_TRUNK_BITS[choice.device or ("cuda" if torch.cuda.is_available() else "cpu")]

    def between(progress: compression.Progress) -> None:
        meter.other_seconds = progress.seconds_left
        meter.say(f"Compressing layer {progress.layer} of {progress.layers}")
        if stop.is_set():
            raise Stopped
    made = work / "made"
    if not (made / MANIFEST).is_file():
        import_gguf(work / source.files[0].name, made, like, bits, choice.device, between, meter.say)
    source.save(made)
    os.replace(made, dest)
    shutil.rmtree(work, ignore_errors=True)


def _small_files(hub: Hub, source: Source, original: str, stop: Event) -> Source:
    """Configuration and tokenizer: beside the GGUF file if they are there, else in the original's repository."""
    listing = hub.listing(source.repository, source.commit, stop)
    if not (listing.find("config.json") and any(listing.find(name) for name in TOKENIZERS)):
        listing = hub.listing(original, stop=stop)
    files = tuple(file for file in listing.files if file.fetchable and "/" not in file.path and file.name != INDEX
                  and not file.path.endswith((".safetensors", ".gguf")))
    if not Listing(listing.repository, listing.commit, files).find("config.json"):
        raise UserError(f"{source.repository} has no config.json, and neither has {original}; import the file with "
                        "import_gguf and the original's folder.")
    return Source(hub.endpoint, listing.repository, listing.commit, "original", files)
