"""floe.json, the manifest of a compressed folder: read, checked and written here alone, without torch.

It lists every file of the folder with its sha256 (engine/files/proof.py holds them against it), and carries a checksum
of itself. Format 1 listed the weights only and had no checksum; its folders open as before.
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from pydantic.dataclasses import dataclass

from engine.core import LEVELS, UserError
from engine.disk import read_json, write_text_atomically
from kernels.layout import Layout

FORMAT_VERSION = 3  # of a table; all other folders are written as 2, which earlier versions read
MOST_BYTES = 4 << 20  # of floe.json; a third of a megabyte for 61 layers of 384 experts
# The folder's experts_implementation: a transformers that does not know it names it in its refusal.
EXPERTS = "floe, which needs: import engine.hf"
MANIFEST, CONFIG, TRUNK, MTP = "floe.json", "config.json", "trunk.safetensors", "mtp.safetensors"
TABLE = "table.safetensors"  # of a Mixture of Lookup Experts, in place of the experts' files
MADE_OF = ("codes", "specialist")   # of "calibration": what measuring the levels does not change
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"     # of a checkpoint
# What a compressed folder takes over from its checkpoint; the first four a person may change, with a note to say so.
CHANGEABLE = ("chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE")
COPIED = (*CHANGEABLE, "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
          "added_tokens.json", "special_tokens_map.json")

Count = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
Neurons = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[FiniteFloat, Field(ge=0)]
Threshold = Annotated[Positive, Field(le=65504)]  # the largest float16


def experts_name(layer: int) -> str:
    return f"experts-{layer:05d}.safetensors"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FileEntry:
    """One file of the folder. path: its plain name."""

    path: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    bytes: Annotated[int, Field(strict=True, ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Level(BaseModel):
    budgets: list[tuple[Neurons, Neurons]] | None = None
    thresholds: list[list[Threshold]] | None = None
    perplexity: FiniteFloat | None = None
    kl: FiniteFloat | None = None


class _Calibration(BaseModel):
    """What of "calibration" is read; whatever else stands there is nobody's."""

    levels: dict[Literal[LEVELS], _Level] = {}
    miss_curves: dict[str, list[tuple[Positive, Positive]]] = {}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Manifest:
    """floe.json. `calibration` is empty until `calibrate` has run. ValueError for numbers that no model has."""

    group_size: Literal[64, 128]
    trunk_bits: Literal[16, 8, 4]
    layers: Annotated[Count, Field(le=1000)]
    experts: Count
    top_k: Count
    neurons: Count
    hidden: Count
    files: tuple[FileEntry, ...]
    calibration: dict = Field(default_factory=dict)
    format_version: Annotated[Count, Field(le=FORMAT_VERSION)] = 2

    def __post_init__(self) -> None:
        names = [entry.path for entry in self.files]
        needed = {TRUNK, *(() if TABLE in names else map(experts_name, range(self.layers)))}
        if not (self.top_k <= self.experts and self.layout and needed <= set(names) and len(set(names)) == len(names)):
            raise ValueError("these are not the numbers of a model")
        for level in _Calibration.model_validate(self.calibration).levels.values():
            if not self._fits(level):
                raise ValueError("these are not the levels of this model")

    def _fits(self, level: _Level) -> bool:
        """Whether a level's budgets, or thresholds, are as many and as large as this model can have."""
        most, budgets, thresholds = self.top_k * self.neurons, level.budgets, level.thresholds
        return ((budgets is None or len(budgets) == self.layers and all(0 < sum(pair) <= most for pair in budgets))
                and (thresholds is None or [len(row) for row in thresholds] == [self.experts] * self.layers))

    @property
    def has_table(self) -> bool:
        return any(entry.path == TABLE for entry in self.files)

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.hidden, self.neurons, self.group_size)

    @property
    def levels(self) -> tuple[str, ...]:
        """`exact` always, and whatever has been calibrated."""
        return ("exact", *(level for level in self.calibration.get("levels", {}) if level != "exact"))

    def save(self, folder: Path) -> None:
        raw = asdict(self)
        sealed = raw if self.format_version == 1 else raw | {"checksum": _checksum(raw)}
        write_text_atomically(folder / MANIFEST, json.dumps(sealed, indent=1))

    @staticmethod
    def load(folder: Path) -> Manifest:
        """UserError when the folder holds no compressed model, a newer one, or a damaged manifest."""
        try:
            raw = read_json(folder / MANIFEST, MOST_BYTES)
            version = raw["format_version"]
            if version > FORMAT_VERSION:
                raise UserError(f"{folder} was made by a newer Floe Chat (format {version}, this one reads up to "
                                f"{FORMAT_VERSION}); update Floe Chat.")
            if version > 1 and raw.pop("checksum") != _checksum(raw):
                raise ValueError("it is not what was written")
            files = tuple(FileEntry(**entry) for entry in raw.pop("files"))
            return Manifest(files=files, **raw)
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no compressed model: {MANIFEST} is missing.") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged; download or compress the model again.") from error

    def check_sizes(self, folder: Path) -> None:
        """UserError for a file that is missing or has another size than the manifest says."""
        for entry in self.files:
            path = folder / entry.path
            size = path.stat().st_size if path.is_file() else None
            if size != entry.bytes and entry.path not in CHANGEABLE:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
                raise UserError(f"{path} {found}; download or compress the model again.")


def is_compressed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def file_entry(path: Path) -> FileEntry:
    """Name, size and sha256 of a finished file."""
    with path.open("rb") as file:
        return FileEntry(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def texts_of(folder: Path) -> tuple[FileEntry, ...]:
    """Configuration and tokenizer as they lie in the folder."""
    return tuple(file_entry(folder / name) for name in (CONFIG, *COPIED) if (folder / name).is_file())


def _checksum(raw: dict) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
