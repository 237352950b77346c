"""The models that people run, from assets/catalogue.toml, and what is known of any model before it is loaded.

`entries()` reads the table, no network at all. `look_up()` takes what a user types: a folder, the name of a model on
disk, a catalogue name, or a Hub id of which only config.json is read. The folder's own files always win over the table.
"""
from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

from engine.core import MachineError, ModelSpec, Sampling, UserError
from engine.disk import MOST_JSON
from engine.files.config_json import read_config_json
from engine.files.manifest import Manifest, is_compressed
from engine.library.hub import Hub, Listing, address
from engine.one_thread import one_thread
from engine.paths import data_dir, demo_model, inside, is_name, models_dirs, typed
from engine.units import size

TABLE = Path(__file__).resolve().parents[2] / "assets" / "catalogue.toml"
AIMS = ("fast", "best", "coding", "long")


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue. ready: repository of a finished Floe folder, "" while there is none.
    numbers: of its ModelSpec, as transformers' model of `config` has them; unverified: fields written from memory.
    good_for: what the first-run page may offer it for."""

    name: str
    title: str
    repository: str
    revision: str
    licence: str
    about: str
    config: Mapping
    numbers: Mapping
    sampling: Sampling
    source_bits: float = 16
    ready: str = ""
    gguf_repository: str = ""
    gguf_file: str = ""
    good_for: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.name and "/" in self.repository and self.revision and self.licence):
            raise UserError(f"The catalogue's entry {self.name!r} lacks a repository, a revision or a licence.")
        if not set(self.good_for) <= set(AIMS):
            raise UserError(f"The catalogue's entry {self.name!r} names an unknown aim; use {', '.join(AIMS)}.")

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(self.title, **self.numbers)

    @property
    def source(self) -> str:
        """What to take: "ready" where somebody has published a Floe folder, else "original"."""
        return "ready" if self.ready else "original"

    @property
    def original_bytes(self) -> int:
        """Size of the original's language model: 16-bit trunk, experts as published."""
        spec = self.spec
        return 2 * spec.trunk_params + int(spec.n_experts_total * spec.expert_params * self.source_bits / 8)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading it. folder: where it lies, if it does; compressed: as a Floe folder.
    described: the folder that has its config.json; None: only the catalogue knows it."""

    name: str
    described: Path | None = None
    folder: Path | None = None
    compressed: bool = False
    trunk_bits: int | None = None
    group_size: int | None = None
    calibration: Mapping = field(default_factory=dict)
    entry: Entry | None = None

    @cached_property
    def spec(self) -> ModelSpec:
        """The catalogue's numbers, else those that transformers' model has, which loads torch. UserError for what is
        no Mixture-of-Experts model."""
        if self.described is None:
            return self.entry.spec
        return _counted(self.described, self.name, (self.described / "config.json").stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _counted(folder: Path, name: str, changed_ns: int) -> ModelSpec:
    """Once for each config.json: a large model takes a second or two, and a page plans it at every move of a slider."""
    with one_thread:
        from engine.files.skeleton import spec_of_folder
        return spec_of_folder(folder, name)


@cache
def entries(path: Path = TABLE) -> dict[str, Entry]:
    """The catalogue by short names, best known first. UserError when the table is damaged."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))["models"]
        made = [_entry(dict(row)) for row in rows]
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"The catalogue {path} cannot be read ({error}); install Floe Chat again.") from error
    return {entry.name: entry for entry in made}


def _entry(row: dict) -> Entry:
    gguf = row.pop("gguf", {})
    return Entry(sampling=Sampling(**row.pop("sampling", {})), good_for=tuple(row.pop("good_for", ())),
                 unverified=tuple(row.pop("unverified", ())), gguf_repository=gguf.get("repository", ""),
                 gguf_file=gguf.get("file", ""), **row)


def find(text: str) -> Entry | None:
    """The entry with this short name, title or repository (letter case does not matter)."""
    wanted = text.strip().lower()
    for entry in entries().values():
        if wanted in (entry.name, entry.title.lower(), entry.repository.lower(), entry.ready.lower() or None):
            return entry
    return None


def title_of(name: str) -> str:
    """What people call the model with this name on disk: the catalogue's title, else the name itself."""
    entry = find(name)
    return entry.title if entry else name


def nearest(text: str) -> str:
    """Names of the catalogue to offer for one that it does not have: those that resemble it, else all."""
    wanted, names = text.strip().lower(), list(entries())
    near = [name for name in names if wanted and wanted in name] or difflib.get_close_matches(wanted, names)
    return ", ".join(near or names)


def look_up(text: str, data: str | Path | None = None) -> ModelInfo:
    """What a user means by `text`, without loading it. UserError when it is nothing."""
    if text == "demo":
        return _from_folder(demo_model())
    for folder in (typed(text), *(place / text for place in models_dirs(data) if is_name(text))):
        if (folder / "config.json").is_file():
            return _from_folder(folder)
    entry = find(text)
    if entry:
        return ModelInfo(entry.title, entry=entry)
    if found := address(text):
        return _from_hub(found[0], data)
    raise UserError(f"There is no model {text!r}: give a folder, a Hub id like owner/name, or a name of the catalogue: "
                    f"{nearest(text)}.")


def of_repository(listing: Listing, data: str | Path | None = None) -> ModelInfo:
    """What a repository of the Hub is whose files have been listed. UserError, MachineError: one sentence."""
    entry = find(listing.repository)
    return ModelInfo(entry.title, entry=entry) if entry else _from_hub(listing.repository, data, listing)


def _from_folder(folder: Path) -> ModelInfo:
    read_config_json(folder)
    known = ModelInfo(folder.name, folder, folder, entry=find(folder.name))
    if not is_compressed(folder):
        return known
    manifest = Manifest.load(folder)
    return replace(known, compressed=True, trunk_bits=manifest.trunk_bits, group_size=manifest.group_size,
                   calibration=manifest.calibration)


def _from_hub(repository: str, data: str | Path | None, listing: Listing | None = None,
              follow: bool = True) -> ModelInfo:
    """From the few kilobytes of a repository that say what it is, kept in the data folder's cache by commit.

    listing: its files, where they have been asked for. follow: where it has no config.json (GGUF files alone), that of
    the model which its card says it was made of.
    Without a network what was read last time is taken. UserError, MachineError: one sentence.
    """
    own = inside(data_dir(data) / "cache" / "hub", repository.replace("/", "--"))
    try:
        hub = Hub.waited_for(data)
        listing = listing or hub.listing(repository)
        if follow and listing.base_model and not listing.find("config.json"):
            entry = find(listing.base_model)
            of = ModelInfo(entry.title, entry=entry) if entry else _from_hub(listing.base_model, data, follow=False)
            return replace(of, name=repository)
        folder = inside(own, listing.commit)
        for name in ("config.json", "floe.json"):
            file = listing.find(name)
            if file and file.bytes > MOST_JSON:
                raise UserError(f"The {name} of {repository} has {size(file.bytes)}, more than any such file; choose "
                                "another model.")
            if file:
                folder.mkdir(parents=True, exist_ok=True)
                hub.fetch(listing, file, folder / name, lambda n_bytes, text: None)
    except (MachineError, UserError):
        known = sorted(own.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
        if not known:
            raise
        folder = known[-1].parent
    if not (folder / "config.json").is_file():
        raise UserError(f"{repository} has no config.json: it is not a transformers checkpoint.")
    return replace(_from_folder(folder), name=repository, folder=None)
