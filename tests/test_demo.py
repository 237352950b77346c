"""The embedded model: what its card says is there, whole, small enough, made from the checkpoint it names."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from engine.core import PROMISES
from engine.files.compressed import ExpertsFile, MappedFile
from engine.files.manifest import TRUNK, Manifest, experts_name, file_entry
from engine.library.compress import compress

MOST_BYTES = 16 << 20


@pytest.fixture(scope="module")
def demo(repository: Path) -> Path:
    return repository / "assets" / "demo"


def test_it_is_whole_and_small(demo):
    manifest = Manifest.load(demo)
    assert [file_entry(demo / entry.path) for entry in manifest.files] == list(manifest.files)
    assert sum(path.stat().st_size for path in demo.iterdir()) <= MOST_BYTES
    assert manifest.trunk_bits == 8
    for layer in range(manifest.layers):
        experts = ExpertsFile(demo / experts_name(layer))
        for expert in range(manifest.experts):
            experts.verify(expert)


def test_its_card_has_the_stored_figures(demo):
    """Every level's row of the table, and the two sums below it."""
    manifest, card = Manifest.load(demo), (demo / "README.md").read_text(encoding="utf-8")
    rows = {cells[0]: cells[1:] for line in card.splitlines()
            if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4}
    levels = manifest.calibration["levels"]
    assert set(levels) == {"exact", *PROMISES, "floe"}
    for level, found in levels.items():
        shown = found.get("record_bytes_per_token")
        assert rows[level] == [f"{found['perplexity']:.2f}", f"{found['kl']:.3f}", f"{shown:,}" if shown else ""]
    sixteen, exact = (int(n.replace(",", "")) for n in re.findall(r"([\d,]{7,}) bytes a token, at `exact` ([\d,]+)",
                                                                  card)[0])
    routed, n_weights = manifest.layers * manifest.top_k, 3 * manifest.neurons * manifest.hidden
    assert (sixteen, exact) == (routed * n_weights * 2, routed * manifest.layout.blob_bytes)


def test_budgets_are_each_layers_own(demo):
    """Not one percentage for all; the stricter the promise, the more bytes."""
    levels = Manifest.load(demo).calibration["levels"]
    for level in PROMISES:
        assert len(set(map(tuple, levels[level]["budgets"]))) > 1
    n_bytes = [levels[level]["record_bytes_per_token"] for level in PROMISES]
    assert n_bytes == sorted(n_bytes, reverse=True) and len(set(n_bytes)) == len(n_bytes)


def test_it_is_the_checkpoint_compressed(demo, shared, tmp_path):
    """Made again it is the same, but for codes that another processor's sums round to the other side."""
    made, manifest = tmp_path / "made", Manifest.load(demo)
    compress(shared / "models" / "tiny-chat", made, manifest.group_size, manifest.trunk_bits, "cpu")
    for name in (TRUNK, *map(experts_name, range(manifest.layers))):
        ours, stored = MappedFile(made / name), MappedFile(demo / name)
        assert ours.header.keys() == stored.header.keys()
        for key in ours.header.keys() - {"__metadata__", "checksums"}:
            one, other = (file.tensor(key).contiguous().view(torch.uint8) for file in (ours, stored))
            assert one.shape == other.shape and (one != other).float().mean() < 1e-3, (name, key)
