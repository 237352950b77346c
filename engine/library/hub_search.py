"""Models of the Hub that the catalogue does not have: searched by words, and looked at before anything is fetched.

What is asked of the network: one page of names, or of one repository the list of its files and its config.json.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from engine.core import UserError
from engine.files.manifest import CONFIG
from engine.library import catalogue
from engine.library.download import gguf_models, weights
from engine.library.hub import REPOSITORY, Hub, address

MOST = 20
FORMATS = ("safetensors", "gguf")
SILENT = ("The card names no original model. Whether a file says enough of its own is seen as soon as its beginning is "
          "here.")


@dataclass(frozen=True)
class Hit:
    """One repository that a search found. formats: of FORMATS, as its makers say; downloads: of the last month."""

    repository: str
    downloads: int
    likes: int
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """One repository. download_bytes: of the original's weights, 0 where it has none; files: its GGUF files, (name,
    bytes) with all parts; file: the one of them that was asked for. known: what a plan needs; why: the sentence where
    nothing can be planned."""

    repository: str
    download_bytes: int
    files: tuple[tuple[str, int], ...]
    file: str
    known: catalogue.ModelInfo | None
    why: str = ""


def search_hub(words: str, data: str | Path | None = None) -> tuple[Hit, ...]:
    """Repositories whose names have these words, most downloaded first. UserError, MachineError: one sentence."""
    asked = {"search": words.strip()[:200], "limit": MOST, "sort": "downloads", "direction": -1}
    rows = Hub.waited_for(data).asked(f"models?{urlencode(asked)}", "the search", list)
    hits = [_hit(row) for row in rows if isinstance(row, dict)]
    return tuple(hit for hit in hits if hit and hit.formats)


def _hit(row: dict) -> Hit | None:
    """None for what is no answer of a Hub; anybody may have written it."""
    name, tags = row.get("id"), row.get("tags")
    if not (isinstance(name, str) and REPOSITORY.fullmatch(name)):
        return None
    numbers = [row.get(key) if type(row.get(key)) is int else 0 for key in ("downloads", "likes")]
    return Hit(name, *numbers, tuple(each for each in FORMATS if isinstance(tags, list) and each in tags))


def examine_repository(text: str, data: str | Path | None = None) -> Examined:
    """What a repository of the Hub holds, by its id or an address, and what is needed to plan it.

    UserError, MachineError: one sentence, where the repository cannot be looked at.
    """
    found = address(text.strip())
    if found is None:
        raise UserError(f"{text.strip()[:100]!r} is not an address of the Hub; write it like owner/name.")
    repository, file = found
    listing = Hub.waited_for(data).listing(repository)
    files = tuple(sorted((name, sum(file.bytes for file in parts)) for name, parts in gguf_models(listing).items()))
    n_bytes = sum(file.bytes for file in weights(listing))
    if files and not (n_bytes or listing.base_model or listing.find(CONFIG) or catalogue.find(repository)):
        return Examined(repository, n_bytes, files, file, None, SILENT)
    try:
        return Examined(repository, n_bytes, files, file, catalogue.of_repository(listing, data))
    except UserError as error:
        return Examined(repository, n_bytes, files, file, None, str(error))
