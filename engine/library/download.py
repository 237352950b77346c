"""`download`: a model by name into the data folder: finds what to take, checks the disk, fetches, goes on after a stop.

Three sources: a ready-made Floe folder (taken as it is), an original checkpoint (compressed while it arrives,
engine/library/compress_stream.py), a GGUF file (imported, engine/library/gguf_import.py). Everything is made in
`NAME.partial`; what is there already is not fetched again, at the commit at which it was begun. Loads torch only to
compress.
"""
from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from engine.core import UserError
from engine.disk import MOST_JSON, check_room
from engine.files.chat_parts import POINTER_BYTES, TEMPLATE, TOKENIZERS, check_chat_parts
from engine.files.manifest import INDEX, MANIFEST, SINGLE, Manifest
from engine.library import catalogue
from engine.library.hub import Hub, Listing, RemoteFile, address
from engine.library.installed import SOURCE, Source, claimed, place_of, unfinished
from engine.library.transfer import CompressOptions, Wanted, arrived, begin, fetch_all, part_of
from engine.paths import typed
from engine.progress import Meter, Report, unheard

SOURCES = ("ready", "original", "gguf")
OURS = (SOURCE, "floe.partial.json")        # in folders that we make: of no repository


def wanted(text: str) -> Wanted:
    """A catalogue name, title, Hub id or address of the Hub. UserError for anything else."""
    entry = catalogue.find(text)
    if entry:
        return Wanted(entry.name, entry.repository, entry.revision, entry.ready, entry.gguf_repository, entry.gguf_file)
    found = address(text)
    if found:
        return Wanted(found[0].partition("/")[2], found[0], gguf_file=found[1])
    raise UserError(f"There is no model {text!r} to download: give a Hub id like owner/name, or a name of the "
                    f"catalogue: {catalogue.nearest(text)}.")


def download(text: str, source: str | None = None, folder: str | Path | None = None, data: str | Path | None = None,
             hub: Hub | None = None, report: Report = unheard,
             stop: Event | None = None, choice: CompressOptions | None = None, file: str = "", like: str = "") -> Path:
    """The folder of the model, whole. Goes on where an earlier call was; nothing to do if it is there.

    source: ready, original or gguf; None takes the first of them that there is. folder: where to put it instead of the
    data folder. stop: set it from any thread to pause, `Stopped` is raised. file: which GGUF of several; like: the
    original that it was made from, where neither the catalogue nor its repository says so.
    UserError, MachineError: one sentence.
    """
    if source not in (None, *SOURCES):
        raise UserError(f"There is no source {source!r}; choose one of {', '.join(SOURCES)}.")
    model, choice, stop = wanted(text), choice or CompressOptions(), stop or Event()
    model = replace(model, gguf_file=file or model.gguf_file, like=like)
    dest = typed(folder).resolve() if folder else place_of(model.name, data)
    with claimed(dest):
        work = unfinished(dest)
        if dest.exists():
            return _present(dest, work, model)
        hub = hub or Hub.here(data=data)
        found = _begun(work, hub, source, model) or _chosen(model, source, hub, stop)
        if found.kind == "ready":
            fetch_ready(hub, found, work, report, stop)
            os.replace(work, dest)
        elif found.kind == "original":
            from engine.library.compress_stream import fetch_and_compress  # loads torch
            fetch_and_compress(hub, found, dest, choice, report, stop)
        else:
            from engine.library.gguf_import import fetch_and_import
            fetch_and_import(hub, found, model, dest, choice, report, stop)
    return dest


def fetch_ready(hub: Hub, source: Source, work: Path, report: Report, stop: Event) -> None:
    """All files of a finished folder into `work`; the manifest's sizes and hashes must be those of the Hub."""
    here = arrived(work, source.files)
    check_room(work, source.bytes - here)
    begin(work, source)
    fetch_all(hub, source, source.files, work, Meter(source.bytes, here, report), stop)
    try:
        promised = Manifest.load(work).files
    except UserError as error:
        raise UserError(f"{source.repository} cannot be used: {error}") from error
    fetched = {file.path: file for file in source.files}
    for entry in promised:
        file = fetched.get(entry.path)
        if file is None or file.bytes != entry.bytes or file.sha256 not in (None, entry.sha256):
            raise UserError(f"{source.repository} is not whole: {entry.path} is missing or is not the file that its "
                            f"{MANIFEST} describes; choose another source.")


def _present(dest: Path, work: Path, model: Wanted) -> Path:
    """What is there already, if it is this model; what a finished download left when it was killed goes."""
    source = Source.load(dest)
    if source and source.repository not in (model.repository, model.ready, model.gguf_repository):
        raise UserError(f"{dest} holds another model of that name, from {source.repository}; choose another folder.")
    if not (dest / "config.json").is_file():
        raise UserError(f"{dest} exists and is no model; choose another folder.")
    if Source.load(work) is not None:
        shutil.rmtree(work, ignore_errors=True)
    return dest


def _begun(work: Path, hub: Hub, kind: str | None, model: Wanted) -> Source | None:
    """What an unfinished download goes on with. UserError if it is of something else."""
    begun = Source.load(work)
    if begun is None:
        return None
    if kind not in (None, begun.kind) or begun.repository not in (model.repository, model.ready, model.gguf_repository):
        raise UserError(f"There is an unfinished download of {begun.repository} ({begun.kind}) in {work}; finish it or "
                        "delete it first.")
    return begun


def _chosen(model: Wanted, kind: str | None, hub: Hub, stop: Event) -> Source:
    """Ask the Hub what there is, and take the best or what the user asked for."""
    if kind in (None, "ready") and model.ready:
        return _ready(hub, hub.listing(model.ready, stop=stop), stop)
    if kind == "gguf" and model.gguf_repository:
        return _gguf(hub, hub.listing(model.gguf_repository, stop=stop), model.gguf_file)
    listing = hub.listing(model.repository, model.revision, stop)
    if kind == "ready" or kind is None and listing.find(MANIFEST):
        return _ready(hub, listing, stop)
    if kind == "original" or kind is None and not any(file.path.endswith(".gguf") for file in listing.files):
        return _original(hub, listing, stop)
    return _gguf(hub, listing, model.gguf_file)


def _source(hub: Hub, listing: Listing, kind: str, files: Iterable[RemoteFile]) -> Source:
    """Small files first: what a stop leaves behind can then already be looked at."""
    chosen = sorted(files, key=lambda file: (file.bytes > 10**7, file.path))
    names = {name: name for name in (MANIFEST, *OURS)}
    for file in chosen:
        other = names.setdefault(unicodedata.normalize("NFC", file.name).casefold(), file.name)
        if other != file.name:
            raise UserError(f"{listing.repository} has a file {file.name}, which many disks cannot tell from {other}; "
                            "choose another source.")
    return Source(hub.endpoint, listing.repository, listing.commit, kind, tuple(chosen))


def _flat(listing: Listing) -> list[RemoteFile]:
    """What may be fetched, from the top folder alone, weights aside."""
    return [file for file in listing.files if file.fetchable and "/" not in file.path
            and not file.path.endswith((".safetensors", ".gguf")) and file.path not in OURS]


def weights(listing: Listing) -> list[RemoteFile]:
    """What an original keeps its weights in: the one file of that name where there is no index, else its shards."""
    single = listing.find(SINGLE)
    return [single] if single and not listing.find(INDEX) else _shards(listing)


def _shards(listing: Listing) -> list[RemoteFile]:
    """Of the top folder; some makers put a second copy of all weights beside them as consolidated files."""
    return [file for file in listing.files if file.path.endswith(".safetensors") and "/" not in file.path
            and not file.path.startswith("consolidated")]


def _ready(hub: Hub, listing: Listing, stop: Event) -> Source:
    if not listing.find(MANIFEST):
        raise UserError(f"{listing.repository} holds no ready-made Floe folder; use --source original.")
    source = _source(hub, listing, "ready", _flat(listing) + _shards(listing))
    _check_chat_parts(hub, listing, source.files, stop)
    return source


def _original(hub: Hub, listing: Listing, stop: Event) -> Source:
    """Configuration, tokenizer and all shards that the repository has in its top folder, if a chat could use them."""
    if not listing.find("config.json"):
        raise UserError(f"{listing.repository} has no config.json: it is not a transformers checkpoint.")
    shards = weights(listing)
    if not shards:
        raise UserError(f"{listing.repository} has no safetensors files; Floe Chat takes no other format than these "
                        "and GGUF (--source gguf).")
    source = _source(hub, listing, "original", [file for file in _flat(listing) if file.path != MANIFEST] + shards)
    _check_chat_parts(hub, listing, source.files, stop)
    return source


def _check_chat_parts(hub: Hub, listing: Listing, files: Iterable[RemoteFile], stop: Event) -> None:
    """UserError for a repository that nobody could talk to afterwards: by its names, and by the few kilobytes that
    have to be read for it: where the template may stand inside, and what is too small to be what it is called."""
    names = {file.name for file in files}
    inside = set() if TEMPLATE in names else {"tokenizer_config.json"}
    with TemporaryDirectory(prefix="floe-", ignore_cleanup_errors=True) as folder:
        for file in files:
            tiny = file.bytes < POINTER_BYTES and file.name.endswith((".safetensors", *TOKENIZERS))
            if tiny or file.name in inside and file.bytes <= MOST_JSON:
                hub.fetch(listing, file, Path(folder) / file.name, lambda n_bytes, text: None, stop)
        check_chat_parts(Path(folder), listing.repository, names)


def gguf_models(listing: Listing) -> dict[str, list[RemoteFile]]:
    """The GGUF files of a repository by name without the ending, the parts of a split one together."""
    models: dict[str, list[RemoteFile]] = {}
    for file in listing.files:
        if file.path.endswith(".gguf") and "mmproj" not in file.name:
            part = part_of(file.path)
            models.setdefault(part[0] if part else file.path.removesuffix(".gguf"), []).append(file)
    return models


def _gguf(hub: Hub, listing: Listing, name: str) -> Source:
    """The named file (with or without its folder) or the only one, with all its parts (`-00001-of-00003.gguf`)."""
    models = gguf_models(listing)
    wanted = part_of(name)[0] if part_of(name) else name.removesuffix(".gguf")
    chosen = [model for model in models if wanted in ("", model, model.rpartition("/")[2])]
    if not chosen:  # "Q4_K_M", as other programs write it
        chosen = [model for model in models if model.lower().endswith(("-" + wanted.lower(), "." + wanted.lower()))]
    if len(chosen) != 1:
        known = ", ".join(sorted(file.path for files in models.values() for file in files)) or "none"
        raise UserError(f"{listing.repository} offers these GGUF files: {known}; "
                        + ("name one with --file." if not name or chosen else f"{name} is not among them."))
    files = sorted(models[chosen[0]], key=lambda file: file.path)
    promised = part_of(files[0].path)
    if promised and len(files) != promised[2]:
        raise UserError(f"{listing.repository} holds {len(files)} of the {promised[2]} parts of {chosen[0]}; choose "
                        "another file.")
    return _source(hub, listing, "gguf", files)
