"""A floe.json for files that nobody opens: numbers of a small model, and what lies beside it."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.files.manifest import MANIFEST, TRUNK, FileEntry, Manifest, experts_name
from tests.support.loopback_hub import sha256

NUMBERS = dict(group_size=64, trunk_bits=8, layers=1, experts=8, top_k=2, neurons=48, hidden=64)


def manifest(files: Mapping[str, bytes] | None = None, **changes) -> bytes:
    """files: name -> content; the trunk and one layer must be among them."""
    files = files or {TRUNK: b"", experts_name(0): b""}
    entries = tuple(FileEntry(name, len(content), sha256(content)) for name, content in files.items())
    with TemporaryDirectory() as folder:
        Manifest(**NUMBERS | changes, files=entries).save(Path(folder))
        return (Path(folder) / MANIFEST).read_bytes()
