"""Names and paths from outside: none leads out of its folder, what is removed is gone in one step, a bad one is one
sentence."""
from __future__ import annotations

import os
import stat
from pathlib import Path
from threading import Event, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import MachineError, UserError, delete, download, import_file, models
from engine.__main__ import main
from engine.library.installed import TRASH, claimed, empty_trash, place_of
from engine.paths import choose_models_dir, data_dir, inside, make_private, typed
from tests.support.loopback_hub import LoopbackHub

BAD_NAMES = ["", ".", "..", "...", ".partial", "..partial", "...partial", "x.partial", "x.PARTIAL", "../models", "/tmp",
             "a/b", "a\\b", "C:", "C:x", "~nosuch/x", "x\ny", "x\0y", "x\x7f", "x\x1b[2J", "x\u2028y", "\ud800", "x.",
             "x ", " x", ".x", "n" * 201, "\u00e4" * 101, "con", "CON", "nul.txt", "com1", "COM\u00b9", "conout$",
             "LPT9.floe", "aux .x", "a*b", "a?b", 'a"b', "a|b", "<a>"]
BAD_PATHS = ["~nosuch/x", "~nosuch", "/x\ny", "/x\0y", "/" + "n" * 300, "/" + "a/" * 3000, "/\ud800", "/x\u2028y"]


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def model(folder: Path, name: str = "mine") -> Path:
    """A folder that `models` takes for a checkpoint."""
    made = folder / name
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    return made


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder with a model, an unfinished one, conversations, and what is nobody's model."""
    made = data_dir(tmp_path / "data")
    model(made / "models")
    (made / "models" / "begun.partial").mkdir()
    (made / "models" / "photos").mkdir()
    (made / "models" / "photos" / "me.png").write_bytes(b"x")
    (made / "chats.db").write_bytes(b"conversations")
    return made


@pytest.mark.parametrize("name", [*BAD_NAMES, "photos", "models", "cache", "mine/", "mine.partial", "MINE",
                                  "begun.partial"])
def test_delete_takes_nothing_but_a_model_by_its_name(data, name):
    before = contents(data.parent)
    with pytest.raises(UserError, match="There is no model .*; there are: begun, mine.$"):
        delete(name, data)
    assert contents(data.parent) == before
    assert delete("mine", data) == 2, "the same program still deletes what it should"
    assert delete("begun", data) == 0
    assert contents(data) == before_without(before, "mine", "begun.partial")


def before_without(before: set[str], *names: str) -> set[str]:
    kept = {path.removeprefix("data/") for path in before if path != "data"}
    return {path for path in kept if not any(path == f"models/{name}" or path.startswith(f"models/{name}/")
                                             for name in names)}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_model_is_made_under_a_name_that_leads_elsewhere(data, name, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(UserError, match="cannot be the name of a model"):
        place_of(name, data)
    with pytest.raises(UserError):
        download(f"owner/{name}", data=data)
    if "/" not in name:
        with pytest.raises(UserError, match="cannot be the name of a model"):
            import_file(tmp_path / f"{name}.gguf", data=data)
    assert contents(tmp_path) == before


@given(st.text(max_size=300) | st.lists(st.sampled_from(["..", ".", "/", "\\", "partial", "a"])).map("".join))
@settings(max_examples=300, deadline=None)
def test_a_name_is_refused_or_lies_directly_in_its_folder(name):
    folder = Path("/models")
    try:
        path = inside(folder, name)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 800
        return
    assert path.parent == folder and path.name == name and os.path.normpath(path) == str(path)


@given(st.text(max_size=300) | st.just("/" + "a/" * 3000) | st.text(min_size=300, alphabet="ab/~.\0\n"))
@settings(max_examples=300, deadline=None)
def test_a_typed_path_is_one_that_the_disk_can_be_asked_for(text):
    try:
        path = typed(text)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 800
        return
    path.is_file(), path.is_dir(), path.exists()


def test_names_that_differ_in_capital_letters_are_not_two_models(data):
    assert place_of("mine", data) == data / "models" / "mine"
    for twin in ("Mine", "MINE", "Begun"):
        with pytest.raises(UserError, match="There is a model (mine|begun) already"):
            place_of(twin, data)


def test_a_link_is_removed_and_what_it_leads_to_stays(data, tmp_path):
    far = model(tmp_path, "far")
    (data / "models" / "near").symlink_to(far)
    assert [found.name for found in models(data)] == ["begun", "mine", "near"]
    assert delete("near", data) == 0
    assert contents(far) == {"config.json"} and not (data / "models" / "near").is_symlink()


def test_an_unfinished_folder_of_somebody_else_is_not_ours(data, tmp_path):
    (data / "models" / "album.partial").mkdir()
    (data / "models" / "album.partial" / "me.png").write_bytes(b"x")
    with pytest.raises(UserError, match="no model 'album'"):
        delete("album", data)
    with LoopbackHub() as loopback, pytest.MonkeyPatch.context() as patch:
        loopback.add("me/album", {"floe.json": b"{}", "config.json": b"{}", "tokenizer.json": b"{}",
                                  "chat_template.jinja": b"{{ messages }}"})
        patch.setenv("HF_ENDPOINT", loopback.endpoint)
        with pytest.raises(UserError, match="album.partial holds something else"):
            download("me/album", data=data)
    assert contents(data / "models" / "album.partial") == {"me.png"}


def test_cancelling_removes_what_is_unfinished_alone(data, tmp_path):
    """The whole model was on a disk that was not connected when its download was begun again."""
    disk = tmp_path / "disk"
    choose_models_dir(str(disk), data)
    (disk / "mine.partial").mkdir()
    delete("mine", data, unfinished=True)
    assert [found.folder for found in models(data) if found.name == "mine"] == [data / "models" / "mine"]
    with pytest.raises(UserError, match="no model 'mine'"):
        delete("mine", data, unfinished=True)


def test_a_killed_removal_is_ended_later_and_shows_no_half_model(data, monkeypatch):
    for number in range(3):
        model(data / "models", f"m{number}")
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr("shutil.rmtree", raise_interrupt)
            delete(f"m{number}", data)
    assert [found.name for found in models(data)] == ["begun", "mine"]
    assert len(list((data / "models").glob(TRASH + "*"))) == 3
    empty_trash(data)
    assert sorted(os.listdir(data / "models")) == ["begun.partial", "mine", "photos"]


def raise_interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_what_cannot_be_moved_is_said_and_stays_whole(data, monkeypatch):
    with monkeypatch.context() as busy:
        busy.setattr(os, "replace", raise_busy)
        with pytest.raises(MachineError, match="cannot be removed .*; close what uses it and try again"):
            delete("mine", data)
    assert delete("mine", data) == 2


def raise_busy(*args):
    raise OSError(16, "Device or resource busy")


def test_two_removals_at_once_are_one(data):
    with claimed(data / "models" / "mine"):
        with pytest.raises(UserError, match="being downloaded or removed already"):
            delete("mine", data)
    freed, go = [], Event()

    def remove() -> None:
        go.wait()
        try:
            freed.append(delete("mine", data))
        except UserError:
            freed.append(None)
    threads = [Thread(target=remove) for _ in range(8)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(freed, key=str) == [2] + [None] * 7
    assert sorted(os.listdir(data / "models")) == ["begun.partial", "photos"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_folder_to_keep_models_in_is_a_path(data, path):
    with pytest.raises(UserError, match="path"):
        choose_models_dir(path, data)
    assert sorted(os.listdir(data)) == ["cache", "chats.db", "logs", "models"]
    with pytest.raises(UserError):
        data_dir(path)
    assert choose_models_dir("", data) == data / "models"


@pytest.mark.parametrize("words", [
    ["delete", "{bad}"], ["download", "a/b", "--folder", "{bad}"], ["models", "--keep-in", "{bad}"],
    ["compress", "{bad}", "x"], ["compress", "x", "{bad}"], ["calibrate", "{bad}"], ["chat", "{bad}", "--prompt", "x"],
    ["plan", "{bad}"], ["eval", "{bad}"], ["publish", "{bad}", "a/b"], ["import_gguf", "{bad}", "x"],
    ["hardware", "--data", "{bad}"]])
@pytest.mark.parametrize("bad", ["~nosuch/x", "/x\ny/z", "/" + "n" * 300])
def test_a_verb_says_in_a_sentence_what_is_wrong_with_a_path(data, words, bad, capfd):
    assert main([word.format(bad=bad) for word in [words[0], "--data", str(data), *words[1:]]]) == 2
    said = capfd.readouterr().err.strip()
    assert "Traceback" not in said and said.count("\n") == 0 and said.endswith("."), said


def test_nobody_else_reads_the_data_folder(tmp_path):
    old = os.umask(0o022)
    try:
        data = data_dir(tmp_path / "data")
        assert rights(data) == rights(data / "logs") == rights(data / "models") == 0o700
        data.chmod(0o755)
        (data / "models").chmod(0o777)
        for name in ("chats.db", "chats.db-wal", "chats.db-shm", "chats.db.v1.backup", "logs/x.log",
                     "cache/export.json", "models-folders"):
            (data / name).write_bytes(b"x")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (data / "models" / "link").symlink_to(elsewhere)
        make_private(data)
    finally:
        os.umask(old)
    assert rights(data) == rights(data / "models") == 0o700
    assert {rights(path) for path in data.rglob("*") if path.is_file()} == {0o600}
    assert rights(elsewhere) == 0o755, "what a link leads to is not ours"


def test_a_home_folder_that_is_named_as_the_data_folder_stays_open(tmp_path):
    (tmp_path / "Documents").mkdir()
    (tmp_path / "Documents" / "letter").write_text("x")
    tmp_path.chmod(0o755)
    (tmp_path / "Documents").chmod(0o755)
    data = data_dir(tmp_path)
    (data / "chats.db").write_text("x")
    (data / "chats.db").chmod(0o644)
    make_private(data)
    assert rights(tmp_path) == rights(tmp_path / "Documents") == 0o755
    assert rights(data / "chats.db") == 0o600 and rights(data / "logs") == 0o700


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
