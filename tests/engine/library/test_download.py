"""download, models, delete: a published folder by name, whole or not there; stops, kills, full disks, wrong folders."""
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from engine.core import UserError
from engine.files.chat_parts import LFS
from engine.library import catalogue
from engine.library.download import download, wanted
from engine.library.hub import Hub, Stopped
from engine.library.installed import Source, claimed, delete, models, unfinished
from engine.progress import Meter, Progress
from tests.support.killed import CHUNK, Nursery
from tests.support.loopback_hub import LoopbackHub
from tests.support.manifests import manifest
from tests.support.waiting import until

NAME = "me/Small-Floe"


def published(extra: int = 1_200_000) -> dict[str, bytes]:
    """A repository shaped like a compressed folder; its weights are noise, nobody opens them here."""
    random.seed(1)
    files = {"trunk.safetensors": random.randbytes(extra // 4), "experts-00000.safetensors": random.randbytes(extra)}
    listed = manifest(files, calibration={"levels": {"balanced": {}, "exact": {}}})
    return files | {"floe.json": listed, "config.json": b'{"model_type": "qwen3_moe"}',
                    "tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}", "LICENSE": b"free",
                    "README.md": b"# hello", "run.py": b"import os", "model.bin": b"pickle", "onnx/config.json": b"{}",
                    ".gitattributes": b"* lfs"}


FETCHED = {"trunk.safetensors", "experts-00000.safetensors", "floe.json", "config.json", "tokenizer.json",
           "chat_template.jinja", "LICENSE", "README.md"}


@pytest.fixture
def loopback(monkeypatch):
    with LoopbackHub() as hub:
        hub.add(NAME, published())
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "floe.source.json"}


def test_a_ready_folder_arrives_whole(loopback, tmp_path):
    told: list[Progress] = []
    folder = download(NAME, data=tmp_path, report=told.append)
    assert folder == tmp_path / "models" / "Small-Floe"
    assert contents(folder) == {name: data for name, data in published().items() if name in FETCHED}
    assert told[-1].done_bytes == told[-1].total_bytes == sum(map(len, contents(folder).values()))
    assert told[-1].seconds_left == 0.0 and any("trunk.safetensors" in progress.text for progress in told)
    assert os.listdir(tmp_path / "models") == ["Small-Floe"]
    n_requests = len(loopback.requests)
    assert download(NAME, data=tmp_path) == folder and len(loopback.requests) == n_requests


def test_a_name_of_the_catalogue_takes_what_is_published(loopback, tmp_path, monkeypatch):
    entry = next(iter(catalogue.entries().values()))
    table = {entry.name: replace(entry, ready=NAME)}
    monkeypatch.setattr(catalogue, "entries", lambda: table)
    assert wanted(entry.title).ready == NAME
    folder = download(entry.title, data=tmp_path)
    assert folder.name == entry.name and Source.load(folder).repository == NAME


def test_models_and_delete(loopback, tmp_path):
    folder = download(NAME, data=tmp_path)
    (found,) = models(tmp_path)
    assert (found.name, found.kind, found.source) == ("Small-Floe", "compressed", NAME)
    assert found.levels == ("exact", "balanced")
    assert found.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert delete("Small-Floe", tmp_path) == found.bytes
    assert models(tmp_path) == [] and os.listdir(tmp_path / "models") == []
    with pytest.raises(UserError, match="no model 'Small-Floe'.*none yet"):
        delete("Small-Floe", tmp_path)


def test_a_pause_keeps_what_has_arrived(loopback, tmp_path):
    stop = Event()

    def report(progress: Progress) -> None:
        if progress.done_bytes > 300_000:
            stop.set()
    loopback.pause = 0.001
    with pytest.raises(Stopped):
        download(NAME, data=tmp_path, report=report, stop=stop, hub=Hub(loopback.endpoint, chunk_bytes=CHUNK))
    (found,) = models(tmp_path)
    assert found.kind == "unfinished" and 0.1 < found.share < 1 and found.source == NAME
    assert not (tmp_path / "models" / "Small-Floe").exists()
    loopback.pause = 0
    assert download(NAME, data=tmp_path).is_dir()
    assert sum(loopback.served.values()) <= sum(len(published()[name]) for name in FETCHED) + CHUNK


def test_a_cancelled_download_leaves_nothing(loopback, tmp_path):
    stop = Event()
    with pytest.raises(Stopped):
        download(NAME, data=tmp_path, report=lambda progress: stop.set(), stop=stop)
    delete("Small-Floe", tmp_path)
    assert os.listdir(tmp_path / "models") == []


def test_killed_at_twenty_points(loopback, tmp_path):
    """Never a half file under a name, never more than one chunk twice."""
    loopback.pause, loopback.piece = 0.002, 8 << 10
    dest, expected = tmp_path / "model", {name: published()[name] for name in FETCHED}
    total, rng, wasted, kills = sum(map(len, expected.values())), random.Random(4), 0, 0

    def served() -> int:
        return sum(loopback.served.values())

    with Nursery("huggingface_hub.hf_api", "huggingface_hub.file_download") as nursery:
        for point in sorted(rng.randrange(total * 9 // 10) for _ in range(20)):
            assert nursery.killed_when(lambda goal=point + wasted: served() > goal, model=NAME, folder=dest,
                                       endpoint=loopback.endpoint)
            kills += 1
            assert not dest.exists()
            loopback.settle()
            before, wasted = wasted, served() - on_disk(unfinished(dest), expected)
            assert wasted - before <= CHUNK
    loopback.pause = 0
    download(NAME, folder=dest)
    assert contents(dest) == expected
    assert served() <= total + wasted <= total + kills * CHUNK


def on_disk(folder: Path, expected: dict[str, bytes]) -> int:
    """Bytes of the expected files; what has a file's name must be whole, what is a part must be its beginning."""
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        whole, found = expected.get(path.name.removesuffix(".part")), path.read_bytes()
        assert path.name not in expected or found == whole
        assert whole is None or whole.startswith(found)
        total += len(found) if whole is not None else 0
    return total


def test_a_moving_branch_goes_on_with_the_commit_it_was_begun_at(loopback, tmp_path):
    stop = Event()
    with pytest.raises(Stopped):
        download(NAME, data=tmp_path, report=lambda progress: progress.done_bytes > 99 and stop.set(), stop=stop)
    loopback.add(NAME, published(500_000))
    folder = download(NAME, data=tmp_path)
    assert contents(folder)["floe.json"] == published()["floe.json"]
    assert Source.load(folder).commit != loopback.repositories[NAME].branches["main"]


def test_the_disk_is_looked_at_first(loopback, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=200_500_000))
    with pytest.raises(UserError, match="200 MB free, and 201 MB|200 MB free, and 202 MB"):
        download(NAME, data=tmp_path)
    fetched = {request.rpartition("/")[2] for request in loopback.requests if "resolve" in request}
    assert fetched == {"tokenizer.json"}        # so small that it may be a note in place of one
    assert os.listdir(tmp_path / "models") == []


def test_a_published_folder_that_is_not_whole(loopback, tmp_path):
    files = published()
    files["experts-00000.safetensors"] = b"other"
    loopback.add(NAME, files)
    with pytest.raises(UserError, match="not whole: experts-00000.safetensors"):
        download(NAME, data=tmp_path)
    assert not (tmp_path / "models" / "Small-Floe").exists()


@pytest.mark.parametrize("lacking, said", [("tokenizer.json", "has no tokenizer"),
                                           ("chat_template.jinja", "has no chat template"),
                                           ("trunk.safetensors", "only the note of Git LFS .*choose another source")])
def test_a_published_folder_that_nobody_could_talk_to_is_refused_at_once(loopback, tmp_path, lacking, said):
    note = {lacking: LFS + b"v1\noid sha256:0\nsize 7000000\n"} if lacking.endswith("safetensors") else {}
    loopback.add("me/Mute", {name: data for name, data in published().items() if name != lacking} | note)
    with pytest.raises(UserError, match=said):
        download("me/Mute", data=tmp_path)
    assert models(tmp_path) == [] and sum(loopback.served.values()) < 10_000


def test_one_download_of_a_model_at_a_time(loopback, tmp_path):
    with claimed(tmp_path / "models" / "Small-Floe"):
        with pytest.raises(UserError, match="being downloaded or removed already"):
            download(NAME, data=tmp_path)
    assert download(NAME, data=tmp_path).is_dir()


def test_a_folder_that_is_taken(loopback, tmp_path):
    (tmp_path / "papers").mkdir()
    with pytest.raises(UserError, match="is no model"):
        download(NAME, folder=tmp_path / "papers")
    download(NAME, folder=tmp_path / "mine")
    loopback.add("you/Other", published())
    with pytest.raises(UserError, match="holds another model of that name, from me/Small-Floe"):
        download("you/Other", folder=tmp_path / "mine")


def test_an_unfinished_download_of_something_else(loopback, tmp_path):
    stop = Event()
    with pytest.raises(Stopped):
        download(NAME, data=tmp_path, report=lambda progress: stop.set(), stop=stop)
    with pytest.raises(UserError, match="unfinished download of me/Small-Floe .ready"):
        download(NAME, source="original", data=tmp_path)


@pytest.mark.parametrize("text, words", [("nonsense", "Hub id like owner/name, or a name of the catalogue: qwen"),
                                         ("./here/x", "Hub id"), ("me/Nothing", "does not exist")])
def test_names_that_mean_nothing(loopback, tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        download(text, data=tmp_path)


def test_repositories_without_weights_to_take(loopback, tmp_path):
    loopback.add("me/Pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(UserError, match="no safetensors files"):
        download("me/Pickled", data=tmp_path)
    with pytest.raises(UserError, match="no ready-made Floe folder"):
        download("me/Pickled", source="ready", data=tmp_path)
    with pytest.raises(UserError, match="these GGUF files: none"):
        download("me/Pickled", source="gguf", data=tmp_path)


def test_verbs(loopback, tmp_path):
    def verb(*words: str, **changes: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"HF_ENDPOINT": loopback.endpoint} | changes
        return subprocess.run([sys.executable, "-m", "engine", *words, "--data", str(tmp_path), "--json"],
                              capture_output=True, text=True, env=environment)
    offline = verb("download", NAME, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "switched off" in offline.stderr and not offline.stdout
    done = verb("download", NAME)
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "models" / "Small-Floe")}, done.stderr
    assert "100.0 %" in done.stderr or "Fetching" in done.stderr
    assert [model["name"] for model in json.loads(verb("models").stdout)["models"]] == ["Small-Floe"]
    assert json.loads(verb("delete", "Small-Floe").stdout)["freed_bytes"] > 1_000_000


def test_ctrl_c_keeps_what_has_arrived_and_says_so(loopback, tmp_path):
    loopback.pause = 0.02
    command = [sys.executable, "-m", "engine", "download", NAME, "--data", str(tmp_path), "--json"]
    verb = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"HF_ENDPOINT": loopback.endpoint})
    until(lambda: sum(loopback.served.values()) > 300_000)
    verb.send_signal(signal.SIGINT)
    out, said = verb.communicate(timeout=120)
    assert verb.returncode == 130 and out == "" and "Traceback" not in said
    assert "What has arrived is kept: start again to go on, or delete it." in said
    (found,) = models(tmp_path)
    assert found.kind == "unfinished" and found.bytes > 100_000
    loopback.pause = 0
    done = subprocess.run(command, env=os.environ | {"HF_ENDPOINT": loopback.endpoint}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "models" / "Small-Floe").keys() == FETCHED


def test_speed_is_honest():
    now, told = [0.0], []
    meter = Meter(1000, 400, told.append, lambda: now[0])
    for _ in range(20):
        now[0] += 1
        meter.add(10)
    assert told[-1].bytes_per_second == pytest.approx(10, rel=0.15)
    assert told[-1].seconds_left == pytest.approx(40, rel=0.15) and told[-1].done_bytes == 600
    now[0] += 60
    meter.add(0, "The connection was lost")
    assert told[-1].bytes_per_second < 1 and told[-1].text == "The connection was lost"
    now[0] += 60
    meter.add(0, "still")
    assert told[-1].bytes_per_second == 0 and told[-1].seconds_left is None


def test_nothing_of_this_needs_torch():
    code = ("import sys, engine; engine.download, engine.models, engine.delete, engine.Hub; "
            "sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
