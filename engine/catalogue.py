"""The models that people run, from assets/catalogue.toml, and what is known of any model before it is loaded.

`entries()` reads the table, no network at all. `look_up()` takes what a user types: a folder, the name of a model on
disk, a catalogue name, or a Hub id of which only config.json is read. The folder's own files always win over the table.
"""
from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from engine.paths import data_dir, demo_model
from engine.shape import spec_from_config
from engine.spec import ModelSpec, Sampling, UserError

TABLE = Path(__file__).resolve().parents[1] / "assets" / "catalogue.toml"
AIMS = ("fast", "best", "coding", "long")


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue. ready: repository of a finished Floe folder, "" while there is none.
    unverified: fields written from memory. good_for: what the first-run page may offer it for."""

    name: str
    title: str
    repository: str
    revision: str
    licence: str
    about: str
    config: Mapping
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
        return spec_from_config(self.config, self.title)

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
class Known:
    """What is known of a model without loading it. folder: where it lies, if it does; compressed: as a Floe folder."""

    spec: ModelSpec
    folder: Path | None = None
    compressed: bool = False
    trunk_bits: int | None = None
    group_size: int | None = None
    calibration: Mapping = field(default_factory=dict)
    entry: Entry | None = None


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


def look_up(text: str, data: str | Path | None = None) -> Known:
    """What a user means by `text`, without loading it. UserError when it is nothing."""
    if text == "demo":
        return _from_folder(demo_model())
    for folder in (Path(text).expanduser(), data_dir(data) / "models" / text):
        if (folder / "config.json").is_file():
            return _from_folder(folder)
    entry = find(text)
    if entry:
        return Known(entry.spec, entry=entry)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return Known(spec_from_config(_hub_config(text, data_dir(data) / "cache"), text))
    raise UserError(f"There is no model {text!r}: give a folder, a Hub id like owner/name, "
                    f"or one of {', '.join(entries())}.")


def _from_folder(folder: Path) -> Known:
    config = _read_json(folder / "config.json")
    spec = spec_from_config(config, folder.name)
    if not (folder / "floe.json").is_file():
        return Known(spec, folder, entry=find(folder.name))
    manifest = _read_json(folder / "floe.json")
    return Known(spec, folder, compressed=True, trunk_bits=manifest.get("trunk_bits"),
                 group_size=manifest.get("group_size"), calibration=manifest.get("calibration") or {}, entry=find(folder.name))


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a model's configuration.")
    return document


def _hub_config(repository: str, cache_folder: Path) -> dict:
    """config.json of a Hub repository: a few kilobytes, kept in the data folder's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return _read_json(Path(hf_hub_download(repository, "config.json", cache_dir=cache_folder / "hub")))
    except HFValidationError as error:
        raise UserError(f"{repository!r} is not a Hub id; write it like owner/name.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"The configuration of {repository} could not be read from the Hub "
                        f"({type(error).__name__}); check the name and the network.") from error
