"""GGUF files to a compressed folder, and what quantising twice costs.

Configuration and tokenizer are the original's (engine/files/gguf/tokenizer.py). Groups of a GGUF file run along another
axis than ours, so its codes cannot be kept: every weight is decoded and quantised again, and `cost` measures what that
adds, matrix kind by matrix kind. Stopped anywhere it goes on at the first layer that is not whole.
"""
from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from engine.core import UserError
from engine.disk import check_room
from engine.files.checkpoint import Checkpoint
from engine.files.folder_writer import is_sealed, result_bytes
from engine.files.gguf.config import refuse
from engine.files.gguf.header import GgufHeader, joined, read_beginning, read_header, require_package
from engine.files.gguf.names import BLOCK
from engine.files.gguf.source import FLOATS, GgufSource
from engine.files.gguf.tokenizer import alone, check_talk, completed, config_of, copy_small
from engine.files.manifest import CONFIG, COPIED, Manifest
from engine.files.quantize import nested
from engine.files.skeleton import spec_of
from engine.library import catalogue
from engine.library.compress import compress_checkpoint, settled, text_of
from engine.library.hub import Hub, Listing, RemoteFile
from engine.library.installed import Source, unfinished
from engine.library.transfer import MADE, CompressOptions, Wanted, arrived, begin, fetch_all, finish, part_of
from engine.paths import typed
from engine.progress import Meter, Progress, Report, check, said, unheard
from engine.quality.requantize import NO_TEXT, Text
from kernels.layout import Layout, default_group_size
from kernels.planes import decode_down, decode_gate, decode_up, record_rows, sketch_rows

KINDS = ("gate", "up", "down")
SMALL_FILES = (CONFIG, *COPIED)
FIRST_LOOK = 4 << 20      # bytes of a GGUF file; then at twice as many, until what stands before its weights is whole


@dataclass(frozen=True)
class Imported:
    """kinds: how the file holds the experts; added_error: of gate, up and down, see `cost`."""

    manifest: Manifest
    kinds: tuple[str, ...]
    added_error: dict[str, float]


def import_gguf(file: Path, dest: Path, like: str | Path = "", trunk_bits: int = 16, device: str | None = None,
                report: Report = unheard, check: Callable[[], None] = lambda: None, hub: Hub | None = None,
                text: Text = NO_TEXT, group_size: int | None = None) -> Imported:
    """Make the compressed folder `dest` from a GGUF file (of several parts: any of them).

    like: where the original's configuration and tokenizer are: a folder, a catalogue name, a Hub id; "" the folder of
    the file, and the file itself where that folder has none. report: hears what quantising twice costs, too. check: is
    called within every expert and may raise.
    UserError, MachineError: one sentence; what is finished survives, and the next call goes on behind it. Also for
    what has no tokenizer or no chat template anywhere: before any work.
    """
    paths = parts_of(Path(file))
    with TemporaryDirectory() as scratch:
        original = _like_folder(str(like), paths[0], Path(scratch) / "like", hub)
        report(said(f"Reading {paths[0].name}"))        # a large vocabulary takes the package ten seconds and more
        header = joined([read_header(path) for path in paths])
        folder, source = _described(paths[0].name, paths[0], header, original, Path(scratch) / "alone")
        checkpoint = Checkpoint.whole(config_of(folder), source, source.name.removesuffix(".gguf"))
        folder = completed(folder, paths[0], source.texts, Path(scratch) / "made")
        if source.left_out:
            report(said(f"Left out, the text model has no place for them: {len(source.left_out)} tensors, the first is "
                        f"{source.left_out[0]}."))
        added = cost(checkpoint)
        report(said(warning(source, added)))
        origin = f"{source.name} of {sum(path.stat().st_size for path in paths)} bytes"
        manifest = compress_checkpoint(checkpoint, folder, dest, origin, group_size, trunk_bits, device, report, check,
                                       text)
    return Imported(manifest, source.kinds, added)


def _described(name: str, file: Path, header: GgufHeader, original: Path | None, scratch: Path,
               ) -> tuple[Path, GgufSource]:
    """Where the configuration is, and the file of that name by it; needs no weights. original: a folder, None where
    the file itself has to say all: `scratch` then. UserError for what cannot be imported, or talked to afterwards."""
    folder = original or alone(name, file, header, scratch)
    config = config_of(folder)
    source = GgufSource(name, header, config)
    if original is None:
        _refuse_unplaced(source, config.num_hidden_layers, header)
    check_talk(folder, name, header.texts)
    return folder, source


def _refuse_unplaced(source: GgufSource, layers: int, header: GgufHeader) -> None:
    """UserError for a tensor that the configuration made from the file itself knows nothing of: it may change what the
    model says. Layers behind the last one only predict further tokens."""
    for name in source.left_out:
        found = BLOCK.match(name)
        if found is None or int(found[1]) < layers:
            raise refuse(source.name, f"{name} is not known here", header.fields)


def parts_of(file: Path) -> list[Path]:
    """All parts of a file that was split (`-00001-of-00003.gguf`), in order. UserError when any is missing."""
    if not file.is_file():
        raise UserError(f"There is no file {file}; give the path of a .gguf file.")
    part = part_of(file.name)
    if part is None:
        return [file]
    stem, _, number = part
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
        try:
            codes = [nested(matrix, layout) for matrix in before]
        except ValueError as error:
            raise UserError(f"{checkpoint.name} cannot be compressed: layer {layer}, expert 0: {error}; get an intact "
                            "file.") from error
        sketch, records = sketch_rows(codes[0], codes[1], layout), record_rows(*codes, layout)
        after = (decode_gate(sketch, records, layout), decode_up(sketch, records, layout), decode_down(records, layout))
        for kind, old, new in zip(KINDS, before, after, strict=True):
            errors[kind] += float((new[:, :spec.hidden] - old).square().sum())
            weights[kind] += float(old.square().sum())
    return {kind: (errors[kind] / weights[kind]) ** 0.5 if weights[kind] else 0.0 for kind in KINDS}


def warning(source: GgufSource, added: dict[str, float]) -> str:
    parts = ", ".join(f"{kind} {100 * error:.1f} %" for kind, error in added.items())
    stored = f"The experts of {source.name} are stored as {', '.join(source.kinds)}"
    if set(source.kinds) <= FLOATS.keys():
        return f"{stored}; 4 bits cost a relative weight error of {parts}, as with the original checkpoint."
    return (f"{stored} and are quantised a second time: that adds a relative weight error of {parts}. The original "
            "checkpoint gives a better result.")


def fetch_and_import(hub: Hub, source: Source, model: Wanted, dest: Path, choice: CompressOptions,
                     report: Report, stop: Event) -> None:
    """`dest` from the GGUF files that `source` names; they are removed once they are compressed."""
    require_package()
    work = unfinished(dest)
    if not is_sealed(work / MADE):
        device, bits = settled(choice)
        meter = Meter(source.bytes, arrived(work, source.files), report)
        like = _prepare(hub, source, model, work, choice, meter, stop)
        fetch_all(hub, source, source.files, work, meter, stop)

        def heard(progress: Progress) -> None:
            meter.other_seconds = progress.seconds_left or 0.0
            meter.add(0, progress.text)
        import_gguf(work / source.files[0].name, work / MADE, like or "", bits, device, heard, partial(check, stop),
                    text=text_of(choice), group_size=choice.group_size)
    finish(work, source, dest)


def _prepare(hub: Hub, source: Source, model: Wanted, work: Path, choice: CompressOptions, meter: Meter,
             stop: Event) -> Path | None:
    """Configuration and tokenizer, the beginnings of the files, and whether they can be imported and stored at all; if
    not, nothing stays. -> the folder of the original, None where the files say all of it."""
    begun, name = arrived(work, source.files), source.files[0].name
    begin(work, source)
    try:
        original = _original(hub, source, model, work / "like", stop)
        if original:
            _check_room(original, source, work, choice)
        header = joined([_beginning(hub, source, file, work, meter, stop) for file in source.files])
        first = work / name if (work / name).is_file() else _arriving(work, name)
        with TemporaryDirectory(prefix="floe-", ignore_cleanup_errors=True) as scratch:
            folder, _ = _described(name, first, header, original, Path(scratch))
            _check_room(folder, source, work, choice)
        return original
    except UserError:
        if not begun:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _check_room(like: Path, source: Source, work: Path, choice: CompressOptions) -> None:
    results = 2 if choice.texts and not choice.felt_by else 1   # over a text one without it comes first
    result = results * result_bytes(spec_of(config_of(like), source.repository), settled(choice)[1])
    made = sum(path.stat().st_size for path in (work / MADE).rglob("*") if path.is_file())
    check_room(work, source.bytes - arrived(work, source.files) + max(0, result - made))


def _beginning(hub: Hub, source: Source, file: RemoteFile, work: Path, meter: Meter, stop: Event) -> GgufHeader:
    """What stands before the weights of a file, of which no more is fetched than that takes, where the rest of it will
    come."""
    wanted = FIRST_LOOK
    while not (work / file.name).is_file():
        if header := read_beginning(_arriving(work, file.name)):
            return header
        fetch_all(hub, source, [file], work, meter, stop, wanted)
        wanted *= 2
    return read_header(work / file.name)


def _arriving(work: Path, name: str) -> Path:
    return work / (name + ".part")


def _original(hub: Hub, source: Source, model: Wanted, folder: Path, stop: Event) -> Path | None:
    """`folder` with configuration and tokenizer of the original; None where nobody names one."""
    if (folder / CONFIG).is_file():
        return folder
    all_here = arrived(folder.parent, source.files) == source.bytes
    if all_here and not model.like and not folder.exists():     # nobody did when they were fetched
        return None
    original = model.repository if model.repository != source.repository else ""
    beside = None if model.like else hub.listing(source.repository, source.commit, stop)
    known = model.like or ("" if beside.find(CONFIG) else original)
    if not (known or beside.find(CONFIG) or beside.base_model):
        return None
    fetch_like(hub, known, folder, stop, beside)
    return folder


def _like_folder(like: str, file: Path, scratch: Path, hub: Hub | None) -> Path | None:
    """A folder that has the configuration; None where nobody names one."""
    folder = typed(like) if like else file.parent
    if (folder / CONFIG).is_file():
        return folder
    if not like:
        return None
    fetch_like(hub or Hub.here(), like, scratch)
    return scratch


def fetch_like(hub: Hub, like: str, folder: Path, stop: Event | None = None, beside: Listing | None = None) -> None:
    """Small files of the original into `folder`. like: a folder, a catalogue name or a Hub id; "" takes what lies
    beside the GGUF file (`beside`, its repository) or what that repository names as its original."""
    if (folder / CONFIG).is_file():             # always the last to arrive
        return
    noted = Source.load(folder)
    if noted is None and like and typed(like).is_dir():
        copy_small(typed(like), folder)
        return
    if noted is None:
        listing = _listing(hub, like, stop, beside)
        files = sorted((file for file in listing.files if file.path in SMALL_FILES), key=lambda f: f.path == CONFIG)
        noted = Source(hub.endpoint, listing.repository, listing.commit, "original", tuple(files))
        begin(folder, noted)
    fetch_all(hub, noted, noted.files, folder, Meter(noted.bytes, 0, unheard), stop or Event())


def _listing(hub: Hub, like: str, stop: Event | None, beside: Listing | None) -> Listing:
    """The repository that has the configuration."""
    if not like and beside is not None and beside.find(CONFIG):
        return beside
    entry = catalogue.find(like) if like else None
    repository = entry.repository if entry else like or (beside.base_model if beside else "")
    if repository.count("/") != 1:
        raise UserError(f"{like!r} is no folder and no model; name the original model (--like in a terminal): a folder "
                        "or a Hub id like owner/name.")
    listing = hub.listing(repository, entry.revision if entry else "main", stop)
    if not listing.find(CONFIG):
        raise UserError(f"{repository} has no {CONFIG}; name the original model (--like in a terminal): a folder or a "
                        "Hub id like owner/name.")
    return listing
