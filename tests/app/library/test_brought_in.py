"""What a person brings in: a folder that stays where it is, what was dropped on the page, a pasted address, a
text to compress with."""
from __future__ import annotations

import shutil

import pytest

from engine import CALIBRATION_TEXT, UserError, demo_model
from engine.files.manifest import Manifest
from tests.app.library import test_model_library as library
from tests.support.waiting import until

shelf, loopback, unmeasured = library.shelf, library.loopback, library.unmeasured


def test_a_folder_elsewhere_is_added_opened_and_never_deleted(shelf, tmp_path):
    away = shutil.copytree(demo_model(), tmp_path / "away" / "Mine")
    assert shelf.add(f" {away} ") == {"name": "Mine", "kind": "folder"}
    mine = library.on_disk(shelf)["Mine"]
    assert mine["linked"] and mine["kind"] == "compressed" and shelf.shown()["used_bytes"] == 0
    shelf.open("Mine", "fast")
    shelf.open("demo")
    with pytest.raises(UserError, match="in the list already"):
        shelf.add(str(away))
    assert shelf.remove("Mine") == 0 and "Mine" not in library.on_disk(shelf)
    assert (away / "floe.json").is_file()
    for wrong, said in ((tmp_path / "away", "add one of its folders: Mine"), (tmp_path, "no model in"),
                        (tmp_path / "none", "no GGUF file")):
        with pytest.raises(UserError, match=said):
            shelf.add(str(wrong))


def test_what_was_dropped_is_found_by_name_and_size(shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    downloads = tmp_path / "home" / "Downloads"
    other = tmp_path / "home" / ".lmstudio" / "models" / "maker" / "model"
    for folder in (downloads, other):
        folder.mkdir(parents=True)
    (downloads / "a.gguf").write_bytes(b"12345")
    (other / "b [1].gguf").write_bytes(b"123")
    assert shelf.where("a.gguf", 5) == str(downloads / "a.gguf")
    assert shelf.where("b [1].gguf", 3) == str(other / "b [1].gguf")
    assert shelf.where("a.gguf", 6) == shelf.where("../Downloads/a.gguf", 5) == shelf.where("*.gguf", 5) == ""
    shutil.copytree(demo_model(), downloads / "Folder")
    assert shelf.where("Folder", 0) == str(downloads / "Folder")


def test_the_speed_of_a_download_is_measured(loopback, shelf):
    assert shelf.shown()["fetch_rate"] is None
    loopback.pause = 0.001
    shelf.fetch(f"{loopback.endpoint}/{library.NAME}")
    until(lambda: "Tiny-Floe" in library.on_disk(shelf) and not library.works(shelf))
    assert shelf.shown()["fetch_rate"] > 0


def test_a_checkpoint_is_compressed_over_a_text(shelf, unmeasured, tmp_path, monkeypatch):
    """The folder says which text its codes were made over; without a path it is the built-in one."""
    (tmp_path / "made" / "checkpoint").rename(tmp_path / "models" / "Original")
    with pytest.raises(UserError, match="no text file"):
        shelf.compress("Original", str(tmp_path / "none.txt"))
    shelf.compress("Original", str(unmeasured[1]))
    until(lambda: not library.works(shelf) or library.works(shelf)["Original-floe"]["state"] == "failed")
    assert library.works(shelf) == {} and library.on_disk(shelf)["Original-floe"]["levels"] == ["exact"]
    plain, over = (Manifest.load(tmp_path / "models" / name) for name in ("Small", "Original-floe"))
    assert over.calibration["codes"] and "codes" not in plain.calibration
    shelf.remove("Original-floe")
    seen = []                                   # what is asked for: the built-in text itself takes minutes
    monkeypatch.setattr(library.model_library, "compress_installed", lambda name, data, choice, **how:
                        seen.append((name, choice.texts)))
    for text in ("", None):
        shelf.compress("Original", text)
        until(lambda: not library.works(shelf))
    assert seen == [("Original", (CALIBRATION_TEXT,)), ("Original", ())]


def test_a_gguf_file_is_imported_and_a_cancelled_import_leaves_nothing(shelf, tmp_path):
    pytest.importorskip("gguf")
    from tests.support.gguf_files import tiny
    file, original = map(str, tiny(tmp_path, "Tiny.gguf"))
    shelf.bring_in(file, original)
    until(lambda: not library.works(shelf) or library.works(shelf)["Tiny"]["state"] == "failed")
    assert library.works(shelf) == {} and library.on_disk(shelf)["Tiny"]["kind"] == "compressed"
    shelf.remove("Tiny")
    shelf.bring_in(file, original)
    shelf.cancel("Tiny")
    assert library.works(shelf) == {} and not (tmp_path / "models" / "Tiny.partial").exists()
