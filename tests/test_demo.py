"""The embedded model: what its card says is there, whole, small enough, made from the checkpoint it names."""
from __future__ import annotations

import json
import lzma
import re
from itertools import islice
from pathlib import Path

import pytest
import torch

from engine.core import PROMISES
from engine.files.checkpoint import Checkpoint
from engine.files.compressed import ExpertsFile, MappedFile
from engine.files.manifest import TRUNK, Manifest, experts_name, file_entry
from engine.library.compress import compress
from engine.quality.requantize import Text, digest
from engine.quality.texts import DOCUMENT_END, conversations
from tests.support.folders import stored_experts

MOST_BYTES = 16 << 20
MOST_ERROR = 0.2    # of the weights' norm: 4-bit codes over a text reach .17, without one .08; 2 bits .3 and more


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
    """What no text was asked for is as without one; its codes err little more on the weights, which is not what they
    are chosen by."""
    plain, manifest = tmp_path / "plain", Manifest.load(demo)
    compress(shared / "models" / "tiny-chat", plain, manifest.group_size, manifest.trunk_bits, "cpu")
    ours, stored = MappedFile(plain / TRUNK), MappedFile(demo / TRUNK)
    assert ours.header.keys() == stored.header.keys()
    for key in ours.header.keys() - {"__metadata__"}:
        one, other = (file.tensor(key).float() for file in (ours, stored))
        assert one.shape == other.shape and (".self_attn." in key or torch.equal(one, other)), key
    weights = Checkpoint.open(shared / "models" / "tiny-chat")
    for layer in range(manifest.layers):
        experts = [weights.read_expert(layer, expert) for expert in range(manifest.experts)]
        original = (torch.cat(parts) for parts in zip(*((e.gate, e.up, e.down) for e in experts), strict=True))
        for codes, matrix in zip(stored_experts(demo, layer), original, strict=True):
            assert (codes - matrix).norm() <= MOST_ERROR * matrix.norm()


def test_its_codes_know_the_texts_of_its_card_and_none_that_a_test_reads(demo, shared, repository, tmp_path):
    """The manifest has a digest of the documents that they were made over."""
    data, judged = shared / "data", list(conversations(repository / "assets" / "texts" / "evaluation.jsonl"))
    tiny, african = (_texts(data / f"{name}.txt.xz") for name in ("tinystories_train", "african_storybook_ccby"))
    chats = {"held-out": list(conversations(data / "heldout_chat.jsonl.xz"))[180:358],
             "trained": islice(conversations(data / "chat.jsonl.xz"), 600)}
    known = {*tiny, *african}
    texts = {"held-out": _texts(data / "heldout_tinystories.txt.xz")[100:120], "trained": tiny,
             "fiction": [text for text in _texts(data / "stories.txt.xz") if text not in known]}
    for name, found in chats.items():
        lines = (json.dumps({"messages": messages}) for messages in found if messages not in judged)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, found in texts.items():
        (tmp_path / f"{name}.txt").write_text(f"\n{DOCUMENT_END}\n".join(found[:300]), encoding="utf-8")
    paths = ("held-out.jsonl", "held-out.txt", "trained.jsonl", "trained.txt", "fiction.txt")
    documents = Text(tuple(map(tmp_path.joinpath, paths)), 120_000).documents(demo)
    assert Manifest.load(demo).calibration["codes"] == digest(documents, demo)


def _texts(path: Path) -> list[str]:
    return [text for part in lzma.decompress(path.read_bytes()).decode("utf-8").split(DOCUMENT_END)
            if (text := part.strip())]
