"""Twenty kills (kill -9) each of compressing and of measuring levels, at places that seeds choose: nothing that was
done is lost or half there, the work goes on to the same end, and the model answers. Of downloads: test_download,
test_compress_stream, test_gguf_download."""
from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from engine import Engine, Options, Sampling, calibrate_installed, compress_installed, delete, models
from engine.files.folder_writer import PARTIAL
from engine.library.installed import unfinished
from engine.library.transfer import CompressOptions
from engine.paths import CALIBRATION_LOG
from tests.support import small_model
from tests.support.killed import Nursery

pytestmark = pytest.mark.slow
KILLS = 20
NEEDED = ("engine.library.compress", "engine.quality.requantize", "engine.quality.calibrate",
          "transformers.models.qwen3_moe.modeling_qwen3_moe",
          "transformers.models.qwen3_moe.configuration_qwen3_moe")


@pytest.fixture(scope="module")
def nursery():
    with Nursery(*NEEDED) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def data(tmp_path_factory, demo_checkpoint) -> Path:
    """A data folder with a checkpoint called Small and a text to measure levels on."""
    data = tmp_path_factory.mktemp("data")
    checkpoint, compressed = small_model.make(data / "made", demo_checkpoint)
    (data / "models").mkdir()
    checkpoint.rename(data / "models" / "Small")
    shutil.rmtree(data / "made")
    tale = "The boat went out to sea and came back with {n} fish. "
    (data / "tales.txt").write_text("<|endoftext|>\n".join(tale.format(n=n) + "\n" for n in range(6)))
    return data


@pytest.fixture(scope="module")
def whole(data) -> dict[str, bytes]:
    """What compressing Small makes when nobody kills it."""
    made = contents(compress_installed("Small", data, CompressOptions(16, "cpu")))
    delete("Small-floe", data)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def answer(folder: Path) -> str:
    with Engine.open(folder, Options(device="cpu")) as engine:
        return "".join(event.text for event in engine.chat([{"role": "user", "content": "Hello!"}],
                                                           Sampling(temperature=0, max_tokens=5)))


def test_compressing(nursery, data, whole):
    dest, chance, kills, ends = data / "models" / "Small-floe", random.Random(10), 0, 0
    making, done = unfinished(dest), {}
    while kills < KILLS:
        kills += nursery.killed_when(lambda: False, work="compress", change=chance.randrange(1, 45), name="Small",
                                     data=data)
        before, done = done, finished(dest if dest.exists() else making)
        assert before.items() <= done.items(), "a file that was whole was lost or written again"
        assert all(made == whole[name] for name, made in contents(making).items() if name in whole)
        assert {model.kind for model in models(data) if model.name == "Small-floe"} <= {"unfinished", "compressed"}
        if dest.exists():
            assert contents(dest) == whole and not making.exists()
            delete("Small-floe", data)
            ends, done = ends + 1, {}
    assert ends > 1
    folder = compress_installed("Small", data, CompressOptions(16, "cpu"))
    assert contents(folder) == whole and answer(folder)


def test_compressing_over_a_text(nursery, data):
    """Ten kills on one way: the bytes are those of a run that nobody killed."""
    text, dest, chance, kills = data / "tales.txt", data / "models" / "Small-floe", random.Random(12), 0
    if dest.exists():
        delete("Small-floe", data)
    with_text = contents(compress_installed("Small", data, CompressOptions(16, "cpu", texts=(text,))))
    delete("Small-floe", data)
    while kills < 10:
        kills += nursery.killed_when(lambda: False, work="compress", change=chance.randrange(1, 25), name="Small",
                                     data=data, text=text)
        if dest.exists():
            assert contents(dest) == with_text
            delete("Small-floe", data)
    assert contents(compress_installed("Small", data, CompressOptions(16, "cpu", texts=(text,)))) == with_text
    delete("Small-floe", data)


def finished(making: Path) -> dict[str, int]:
    """Files that are noted as whole, with their inode."""
    notes = [path for path in (making / "floe.json", making / PARTIAL) if path.is_file()]
    noted = json.loads(notes[0].read_text())["files"] if notes else []
    return {entry["path"]: (making / entry["path"]).stat().st_ino for entry in noted}


def test_measuring_levels(nursery, data, whole, tmp_path):
    """Over the figures of an earlier time: until the end those stay, with every file as it is listed."""
    folder, text, other = data / "models" / "Small-floe", data / "tales.txt", tmp_path / "other.txt"
    if not folder.exists():
        compress_installed("Small", data, CompressOptions(16, "cpu"))
    other.write_text(text.read_text().replace("fish", "crabs"))
    new = calibration(calibrate_installed("Small-floe", data, text, "cpu"))
    old = calibration(calibrate_installed("Small-floe", data, other, "cpu"))
    shutil.copytree(folder, tmp_path / "old")
    chance, kills, ends, known = random.Random(11), 0, 0, 0
    while kills < KILLS:
        near_the_end = chance.random() < 0.4
        change, kind = (chance.randrange(1, 5), "os.rename") if near_the_end else (chance.randrange(1, 60), "open")
        kills += nursery.killed_when(lambda: False, work="calibrate", change=change, kind=kind, data=data,
                                     name="Small-floe", text=text)
        assert_listed(folder)
        before, known = known, noted(folder)
        if calibration(folder) == new:
            ends, known = ends + 1, 0
            shutil.copytree(tmp_path / "old", folder, dirs_exist_ok=True)
        else:
            assert calibration(folder) == old and known >= before
    assert ends > 1
    assert calibration(calibrate_installed("Small-floe", data, text, "cpu")) == new
    assert not (folder / CALIBRATION_LOG).exists() and answer(folder)


def calibration(folder: Path) -> dict:
    return json.loads((folder / "floe.json").read_text())["calibration"]


def assert_listed(folder: Path) -> None:
    for entry in json.loads((folder / "floe.json").read_text())["files"]:
        assert hashlib.sha256((folder / entry["path"]).read_bytes()).hexdigest() == entry["sha256"], entry["path"]


def noted(folder: Path) -> int:
    """Lines about documents that have been measured."""
    lines = (folder / CALIBRATION_LOG).read_text().splitlines() if (folder / CALIBRATION_LOG).exists() else []
    return sum(line.startswith("[") and line.endswith("]") for line in lines)
