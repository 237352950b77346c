"""What is read of a compressed folder is what its manifest lists: swapped, changed, added and lost files are seen."""
from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from engine.core import Options, UserError
from engine.files import proof
from engine.files.manifest import MTP, TRUNK, Manifest, experts_name, file_entry
from engine.model import load
from tests.support.folders import as_format_1, compressed, edit


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return compressed("qwen3_moe", tmp_path_factory.mktemp("proof"))[2]


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "model")


def opened(folder: Path) -> load.Loaded:
    return load.load(folder, Options("exact", device="cpu"))


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        opened(folder)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and all(word in text for word in words), text


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "x")
    (folder / other).rename(folder / one)
    (folder / "x").rename(folder / other)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("small", [proof.SMALL, 0])
@pytest.mark.parametrize("old", [False, True])
def test_layers_that_changed_places_are_seen(folder, monkeypatch, small, old):
    """Of either format, and of large files that had been proved before."""
    monkeypatch.setattr(proof, "SMALL", small)
    if old:
        as_format_1(folder)
    opened(folder)
    swap(folder, experts_name(0), experts_name(1))
    refuse(folder, "experts-0000", "is damaged (it is not the file")
    with pytest.raises(UserError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", [TRUNK, MTP, "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_one_bit_is_seen_of_every_file_that_is_listed(folder, name):
    if name == MTP:
        shutil.copyfile(folder / TRUNK, folder / MTP)
        manifest = Manifest.load(folder)
        replace(manifest, files=(*manifest.files, file_entry(folder / MTP))).save(folder)
    opened(folder)
    flip(folder / name, (folder / name).stat().st_size * 2 // 3)
    refuse(folder, name)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "tokenizer.model", "vocab.json"])
def test_a_file_that_was_added_is_seen(folder, name):
    """transformers would read it."""
    (folder / name).write_text("{}")
    refuse(folder, name, "is damaged")


def test_one_number_of_the_manifest_is_seen(folder):
    edit(folder / "floe.json", calibration={"levels": {"fast": {"budgets": [[9, 1], [9, 1]]}}})
    refuse(folder, "floe.json is damaged")
    as_format_1(folder)  # it had no checksum
    assert "fast" in opened(folder).runtime.levels


def test_what_a_person_may_change_is_said_and_read(folder):
    (folder / "chat_template.jinja").write_text("mine")
    (folder / "generation_config.json").unlink()
    said = []
    loaded = load.load(folder, Options("exact", device="cpu"), lambda text, share: said.append(text))
    assert loaded.tokenizer.chat_template == "mine"
    for name in ("chat_template.jinja", "generation_config.json"):
        (sentence,) = [text for text in said if name in text]
        assert sentence.endswith(".") and sentence in loaded.runtime.reason


def test_large_files_are_read_once(folder, monkeypatch):
    """As long as they are the same; small ones at every opening."""
    monkeypatch.setattr(proof, "SMALL", 100_000)
    read, digest = [], proof._digest
    monkeypatch.setattr(proof, "_digest", lambda path, *stop: read.append(path.name) or digest(path, *stop))
    large = {entry.path for entry in Manifest.load(folder).files if entry.bytes >= proof.SMALL}
    opened(folder)
    assert large and large < set(read) and len(read) == len(set(read))
    read.clear()
    opened(folder)
    assert read and not large & set(read)
    read.clear()
    shutil.copyfile(folder / TRUNK, folder / "x")
    (folder / "x").replace(folder / TRUNK)
    opened(folder)
    assert large & set(read) == {TRUNK}


def test_damage_that_is_found_late_gives_everything_back(folder, monkeypatch):
    monkeypatch.setattr(proof, "SMALL", 0)
    flip(folder / TRUNK, -1)
    refuse(folder, TRUNK, "is damaged")
    assert not (folder / proof.NOTES).exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("proof")]


def test_a_folder_that_cannot_be_written_to_opens(folder, monkeypatch):
    monkeypatch.setattr(proof, "SMALL", 0)
    (folder / (proof.NOTES + ".part")).mkdir()
    opened(folder)
    assert not (folder / proof.NOTES).exists()


def test_the_demonstration_of_the_old_format_opens(repository, tmp_path):
    demo = shutil.copytree(repository / "assets" / "demo", tmp_path / "demo")
    opened(as_format_1(demo))
    assert Manifest.load(demo).format_version == 1
