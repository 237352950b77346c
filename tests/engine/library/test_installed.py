"""What lies among the models and is none, or is damaged, takes no other out of the list."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from engine import UserError, delete, models
from engine.files.folder_writer import GrowingFile, portable
from engine.library.installed import SOURCE, partial_share, place_of
from engine.paths import choose_models_dir

NOTES = ["5", "null", "true", '"x"', "[]", "{}", "1e999", "[" * 100_000, '{"files": 5}', '{"files": [5]}',
         '{"endpoint": "", "repository": "", "commit": "", "kind": "", "files": [{"path": "a", "bytes": %s}]}'
         % ("9" * 4000)]
SHARES = ["5", "-1", "NaN", "Infinity", "1" + "0" * 400, "null", "[]", ""]


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    model(tmp_path / "models" / "good")
    return tmp_path


@pytest.mark.parametrize("note", NOTES)
def test_a_note_that_is_none_harms_nothing(data, note):
    for name in ("whole", "begun.partial"):
        (model(data / "models" / name) / SOURCE).write_text(note)
    found = models(data)
    assert [(each.name, each.source) for each in found] == [("begun", ""), ("good", ""), ("whole", "")]
    delete("begun", data)
    assert [each.name for each in models(data)] == ["good", "whole"]


@pytest.mark.parametrize("share", SHARES)
def test_a_share_that_is_none_harms_nothing(data, share):
    work = model(data / "models" / "begun.partial")
    (work / SOURCE).write_text('{"endpoint": "", "repository": "a/b", "commit": "", "kind": "", "files": []}')
    partial_share(work).write_text(share)
    assert 0 <= next(each.share for each in models(data) if each.name == "begun") < 1


@pytest.mark.parametrize("name", [b"bad\xff", b"a\nb", b"a\x1b[2Jb", "a\u2028b".encode()])
def test_a_folder_whose_name_nobody_can_write_is_passed_over(data, name):
    try:
        model(data / "models" / os.fsdecode(name))
    except OSError:
        pytest.skip("this disk has no such names")
    assert [each.name for each in models(data)] == ["good"]


@pytest.fixture
def stranger() -> Iterator[Path]:
    """A folder that somebody without rights can use, and from now on the test is that somebody."""
    if not hasattr(os, "seteuid"):
        pytest.skip("rights are another matter there")
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        me = os.geteuid()
        os.seteuid(me or 65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(me)


def test_a_folder_that_may_not_be_looked_into_hides_no_other(stranger):
    model(stranger / "models" / "good")
    locked = model(stranger / "models" / "locked")
    disk = stranger / "disk"
    choose_models_dir(str(disk), stranger)
    choose_models_dir("", stranger)
    for folder in (disk, locked):
        folder.chmod(0)
    try:
        assert [each.name for each in models(stranger)] == ["good"]
        assert place_of("new", stranger) == stranger / "models" / "new"
    finally:
        for folder in (disk, locked):
            folder.chmod(0o700)


@pytest.mark.parametrize("state", [
    "", "5", "{}", "[]", '{"header": 5, "position": 0}', '{"header": {}, "position": "a"}'])
def test_a_damaged_note_of_a_file_that_grows_is_said(tmp_path, state):
    file = tmp_path / "trunk.safetensors"
    Path(f"{file}.part").write_bytes(b"x")
    Path(f"{file}.part.json").write_text(state)
    with pytest.raises(UserError, match="is damaged; delete"):
        GrowingFile(file, 3)


@pytest.mark.parametrize("depth", [400, 600, 900, 100_000])
def test_a_deep_configuration_is_left_to_who_reads_it(tmp_path, depth):
    file = tmp_path / "tokenizer_config.json"
    file.write_text('{"a":' * depth + "1" + "}" * depth)
    assert portable(file) is None
