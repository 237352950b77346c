"""Trouble with a disk is one sentence wherever it comes up, what was whole stays whole, a lock dies with its holder."""
from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core import MachineError, UserError
from engine.disk import check_room, only_one, size_of, write_text_atomically, writing
from engine.machine.errors import in_words
from engine.paths import CALIBRATION_LOG
from engine.quality.loss_probe import MeasurementLog

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_whatever_the_disk_says_is_one_sentence(number, tmp_path):
    for keep in (False, True):
        file = tmp_path / "half"
        file.write_text("ha")
        with pytest.raises((UserError, MachineError), match=r"^[^\n]+\.$") as caught:
            with writing(file, keep):
                raise OSError(number, os.strerror(number))
        assert file.exists() == keep and str(tmp_path) in str(caught.value)
    assert ("disk is full" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_what_is_no_trouble_of_the_disk_stays_what_it_is(tmp_path):
    for error in (KeyboardInterrupt(), ValueError("x"), OSError("an answer of a Hub is one without a number")):
        with pytest.raises(type(error)) as caught:
            with writing(tmp_path / "half"):
                raise error
        assert caught.value is error


@needs_full
def test_a_text_is_there_whole_or_as_it_was(tmp_path):
    write_text_atomically(tmp_path / "note", "old")
    (tmp_path / "note.part").symlink_to(FULL)
    with pytest.raises(MachineError, match="disk is full"):
        write_text_atomically(tmp_path / "note", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["note"] and (tmp_path / "note").read_text() == "old"
    write_text_atomically(tmp_path / "note", "new")
    assert (tmp_path / "note").read_text() == "new"


@needs_full
def test_a_calibration_on_a_full_disk_keeps_what_it_has_measured_and_says_it(tmp_path):
    log = tmp_path / CALIBRATION_LOG
    MeasurementLog(tmp_path, "this").put((1, 2), 0, 3, (0.5, 0.25))
    (tmp_path / f"{CALIBRATION_LOG}.part").symlink_to(FULL)
    with pytest.raises(MachineError, match="disk is full"):
        MeasurementLog(tmp_path, "this")
    again = MeasurementLog(tmp_path, "this")
    assert again.get((1, 2), 0, 3) == (0.5, 0.25)
    kept = log.read_bytes()
    log.unlink()
    log.symlink_to(FULL)
    with pytest.raises(MachineError, match="disk is full"):
        again.put((1, 2), 1, 3, (0.5, 0.25))
    log.unlink()
    log.write_bytes(kept)
    again.put((1, 2), 1, 3, (0.5, 0.25))
    assert MeasurementLog(tmp_path, "this").get((1, 2), 1, 3) == (0.5, 0.25)


def test_the_words_for_a_full_disk_are_the_same_everywhere():
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(MachineError) as caught:
        with writing(Path("/somewhere/model")):
            raise full
    assert str(caught.value).replace(" on the disk of /somewhere", "") == in_words(full)


HOLDER = """
import sys, time
from pathlib import Path
from engine.disk import only_one
with only_one(Path(sys.argv[1]), "It is taken."):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_held_over_processes_and_dies_with_its_holder(tmp_path, repository):
    lock = tmp_path / ".model.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], cwd=repository, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="^It is taken.$"):
        with only_one(lock, "It is taken."):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    for _ in range(2):
        with only_one(lock, "It is taken."):
            assert lock.exists()
    assert not lock.exists() or sys.platform == "win32"


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x.lock", tmp_path / ("x" * 300), Path("/proc/x/x.lock")):
        with pytest.raises((UserError, MachineError), match=r"^[^\n]+\.$"):
            with only_one(place, "taken"):
                pass


def test_room_is_asked_for_where_the_folder_will_be(tmp_path):
    check_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match=f"The disk of {tmp_path} has .* free, and .* are needed; make room, or so or"):
        check_room(tmp_path / "not" / "yet", 1 << 60, ", or so")


def test_what_vanishes_while_it_is_counted_does_not_count(tmp_path, monkeypatch):
    """A download renames and removes folders beside the page that asks for sizes."""
    folder = tmp_path / "models"
    for name in ("a/one", "b/two", "c/three", "c/.note"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("12345")
    scandir = os.scandir

    def vanishing(place):
        if Path(place) == folder / "b":
            os.rename(place, tmp_path / "elsewhere")
        return scandir(place)
    monkeypatch.setattr(os, "scandir", vanishing)
    assert size_of(folder) == 10 and (tmp_path / "elsewhere").is_dir()
