"""One file from a Hub that misbehaves: whole and verified or not there at all, and always a clear sentence."""
from __future__ import annotations

import os
import random
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core import MachineError, UserError
from engine.library.hub import Hub, Listing, RemoteFile, Stopped
from tests.support.loopback_hub import LoopbackHub, cut, instead, passes, sha256, status

DATA = random.Random(0).randbytes(1_000_000)
CHUNK = 256 << 10
NAME = "weights.safetensors"


@pytest.fixture
def loopback():
    with LoopbackHub() as hub:
        hub.add("me/model", {NAME: DATA, "config.json": b'{"a": 1}', "evil.bin": DATA, "sub/run.py": b"x"})
        yield hub


@pytest.fixture
def hub(loopback) -> Hub:
    """Patient enough for a busy machine; where a test is about impatience it says so."""
    return Hub(loopback.endpoint, timeout=20, delays=(0.01, 0.01, 0.01), chunk_bytes=CHUNK)


class Told:
    def __init__(self) -> None:
        self.bytes, self.texts = 0, []

    def __call__(self, n_bytes: int, text: str) -> None:
        self.bytes += n_bytes
        self.texts += [text] if text else []


def fetch(hub: Hub, folder, name: str = NAME, told=None, stop=None):
    listing = hub.listing("me/model")
    hub.fetch(listing, listing.find(name), folder / name, told or Told(), stop)
    return folder / name


def test_listing_names_commit_sizes_and_hashes(hub, loopback):
    listing = hub.listing("me/model")
    assert listing.commit == loopback.repositories["me/model"].branches["main"]
    assert listing.find(NAME) == RemoteFile(NAME, len(DATA), sha256(DATA))
    assert listing.find("config.json").git_hash and listing.find("config.json").bytes == 8
    assert [file.path for file in listing.files if file.fetchable] == [NAME, "config.json"]


def test_a_file_arrives_in_chunks_through_the_redirect(hub, loopback, tmp_path):
    told = Told()
    assert fetch(hub, tmp_path, told=told).read_bytes() == DATA
    assert told.bytes == loopback.served[NAME] == len(DATA)
    assert sum("GET cdn/" in request for request in loopback.requests) == -(-len(DATA) // CHUNK)
    assert os.listdir(tmp_path) == [NAME]
    assert fetch(hub, tmp_path, "config.json").read_bytes() == b'{"a": 1}'


def test_cut_connections_go_on_where_they_were(hub, loopback, tmp_path):
    loopback.fault(NAME, *[fault for after in (1, 100_000, 0, 50_000) for fault in (passes, cut(DATA, after))])
    told = Told()
    assert fetch(hub, tmp_path, told=told).read_bytes() == DATA
    assert loopback.served[NAME] == len(DATA)               # nothing twice
    assert any("connection was lost" in text for text in told.texts)


def test_a_stalled_stream_is_taken_up_again(hub, loopback, tmp_path):
    release = threading.Event()
    loopback.fault(NAME, passes, cut(DATA, 70_000, stall=release))
    told, impatient = Told(), replace(hub, timeout=0.4, delays=(0.01,) * 50)
    assert fetch(impatient, tmp_path, told=told).read_bytes() == DATA
    assert any("No answer in time" in text for text in told.texts)
    release.set()


def test_a_slow_stream_is_waited_for(hub, loopback, tmp_path):
    """Slower as a whole than the patience for one silence: no new try, nothing twice."""
    loopback.pause, loopback.piece, told = 0.05, 16 << 10, Told()      # three seconds for all
    assert fetch(replace(hub, timeout=2.0), tmp_path, told=told).read_bytes() == DATA
    assert told.texts == [] and loopback.served[NAME] == len(DATA)
    assert sum("GET cdn/" in request for request in loopback.requests) == -(-len(DATA) // CHUNK)


def test_tries_begin_anew_when_bytes_arrive(hub, loopback, tmp_path):
    loopback.fault(NAME, *[fault for _ in range(12) for fault in (passes, cut(DATA, 20_000))])
    assert fetch(hub, tmp_path).read_bytes() == DATA


def test_a_dead_hub_is_given_up_and_the_part_stays(hub, loopback, tmp_path):
    loopback.fault(NAME, passes, cut(DATA, 100_000), *[status(500)] * 9)
    with pytest.raises(MachineError, match="keeps failing .error 500.*goes on where it was"):
        fetch(hub, tmp_path)
    assert (tmp_path / f"{NAME}.part").read_bytes() == DATA[:100_000] and not (tmp_path / NAME).exists()
    loopback.faults.clear()
    assert fetch(hub, tmp_path).read_bytes() == DATA
    assert loopback.served[NAME] == len(DATA)


@pytest.mark.parametrize("code, name, kind, words", [
    (401, None, UserError, "token"), (403, None, UserError, "licence"), (403, "GatedRepo", UserError, "licence"),
    (404, "EntryNotFound", UserError, "does not exist"), (404, "RepoNotFound", UserError, "does not exist|token"),
    (410, None, UserError, "refused"), (500, None, MachineError, "error 500"), (503, None, MachineError, "error 503"),
    (429, None, MachineError, "too many requests")])
@pytest.mark.parametrize("place", [NAME, "api/models/me/model/revision/main"])
def test_refusals_become_one_sentence(hub, loopback, tmp_path, code, name, kind, words, place):
    loopback.fault(place, *[status(code, name)] * 9)
    with pytest.raises(kind, match=words) as caught:
        fetch(hub, tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / NAME).exists()
    assert len(loopback.faults[place]) == (8 if kind is UserError else 5)         # at once, or after four tries


def test_too_many_requests_pass(hub, loopback, tmp_path):
    loopback.fault(NAME, status(429), status(503))
    assert fetch(hub, tmp_path).read_bytes() == DATA


def test_other_bytes_are_not_taken_for_the_file(hub, loopback, tmp_path):
    wrong = DATA[:-1] + b"!"
    loopback.fault(NAME, *[fault for _ in range(8) for fault in (passes, instead(wrong))])
    with pytest.raises(MachineError, match="arrived damaged and was removed"):
        fetch(hub, tmp_path)
    assert os.listdir(tmp_path) == []
    loopback.faults.clear()
    assert fetch(hub, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("other", [DATA[:-1], DATA + b"more", b""])
def test_another_size_is_noticed(hub, loopback, tmp_path, other):
    loopback.fault(NAME, passes, instead(other))
    with pytest.raises(MachineError, match="instead of 1,000,000"):
        fetch(hub, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_small_file_is_verified_too(hub, loopback, tmp_path):
    loopback.fault("config.json", instead(b'{"b": 1}'))
    with pytest.raises(MachineError, match="config.json arrived damaged"):
        fetch(hub, tmp_path, "config.json")


def test_a_part_that_rotted_on_disk_is_noticed(hub, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(b"!" * 300_000)
    with pytest.raises(MachineError, match="damaged"):
        fetch(hub, tmp_path)
    assert fetch(hub, tmp_path).read_bytes() == DATA


def test_a_part_longer_than_the_file_starts_over(hub, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(DATA + b"tail")
    assert fetch(hub, tmp_path).read_bytes() == DATA


def test_a_branch_that_moves_does_not_mix_files(hub, loopback, tmp_path):
    listing = hub.listing("me/model")
    loopback.add("me/model", {NAME: DATA[::-1], "config.json": b"{}"})
    hub.fetch(listing, listing.find(NAME), tmp_path / NAME, Told())
    assert (tmp_path / NAME).read_bytes() == DATA


def test_a_commit_that_changes_its_bytes_is_refused(hub, loopback, tmp_path):
    listing = hub.listing("me/model")
    loopback.repositories["me/model"].commits[listing.commit][NAME] = DATA[::-1]
    with pytest.raises(MachineError, match="was changed at the Hub"):
        hub.fetch(listing, listing.find(NAME), tmp_path / NAME, Told())


def test_a_server_without_ranges_starts_over(loopback, tmp_path):
    loopback.ranges = False
    (tmp_path / f"{NAME}.part").write_bytes(DATA[:1000])
    told = Told()
    assert fetch(Hub(loopback.endpoint), tmp_path, told=told).read_bytes() == DATA
    assert told.bytes == len(DATA) - 1000


@pytest.mark.parametrize("target", ["http://evil.example/x", "http://127.0.0.2:1/x", "https://huggingface.co.evil.com/x",
                                    "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirects_go_to_the_endpoint_alone(hub, loopback, tmp_path, target):
    loopback.fault(NAME, status(302, None, Location=target))
    with pytest.raises(UserError, match="not its own; nothing was fetched"):
        fetch(hub, tmp_path)


def test_redirects_in_circles_end(hub, loopback, tmp_path):
    commit = hub.listing("me/model").commit
    loopback.fault(NAME, *[status(302, None, Location=f"/me/model/resolve/{commit}/{NAME}")] * 20)
    with pytest.raises(MachineError, match="in circles"):
        fetch(hub, tmp_path)


def test_the_token_goes_to_the_endpoint_and_nowhere_else(loopback, tmp_path):
    loopback.gated.add("me/model")
    with pytest.raises(UserError, match="licence"):
        Hub(loopback.endpoint, delays=()).listing("me/model")
    with LoopbackHub() as cdn:                              # another port: another origin
        cdn.lfs = loopback.lfs
        loopback.cdn = cdn.endpoint
        assert fetch(Hub(loopback.endpoint, token="hf_secret"), tmp_path).read_bytes() == DATA
        assert all(token == "Bearer hf_secret" for _, token in loopback.tokens_seen[1:])
        assert cdn.tokens_seen and all(token is None for _, token in cdn.tokens_seen)


def test_only_safe_files_are_fetched(hub, tmp_path):
    with pytest.raises(UserError, match="not a file that Floe Chat fetches"):
        fetch(hub, tmp_path, "evil.bin")


def test_stop_pauses_and_the_next_call_goes_on(hub, loopback, tmp_path):
    loopback.pause, stop = 0.002, threading.Event()

    def tell(n_bytes: int, text: str) -> None:
        if loopback.served[NAME] > 300_000:
            stop.set()
    with pytest.raises(Stopped):
        fetch(hub, tmp_path, told=tell, stop=stop)
    have = (tmp_path / f"{NAME}.part").stat().st_size
    assert 0 < have < len(DATA)
    loopback.pause = 0
    assert fetch(hub, tmp_path).read_bytes() == DATA
    assert loopback.served[NAME] <= len(DATA) + CHUNK


def test_stop_ends_a_wait(loopback, tmp_path):
    loopback.fault(NAME, *[status(500)] * 9)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Stopped):
        fetch(Hub(loopback.endpoint, delays=(60,)), tmp_path, stop=stop)


def test_a_disk_that_cannot_hold_the_file(hub, tmp_path):
    """A limit on the size of files makes the system refuse a write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(MachineError, match="cannot hold a file"):
            fetch(hub, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / f"{NAME}.part").stat().st_size == 400_000
    assert fetch(hub, tmp_path).read_bytes() == DATA


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk(hub, tmp_path):
    (tmp_path / f"{NAME}.part").symlink_to("/dev/full")
    with pytest.raises(MachineError, match="disk is full: make room on the disk of"):
        fetch(hub, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_no_answer_at_all(tmp_path):
    with pytest.raises(MachineError, match="127.0.0.1 cannot be reached"):
        Hub("http://127.0.0.1:9", delays=(0.01,)).listing("me/model")


def test_something_that_is_no_hub(loopback):
    loopback.fault("api/models/me/model/revision/main", lambda handler: handler.document({"hello": 1}) or True)
    with pytest.raises(MachineError, match="not a Hub's"):
        Hub(loopback.endpoint).listing("me/model")


@pytest.mark.parametrize("name", ["a//b", "a/b/c", "a b/c", "../x/y"])
def test_names_that_are_no_hub_ids(hub, name):
    with pytest.raises(UserError, match="not a Hub id"):
        hub.listing(name)


def test_offline_and_mirror(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert Hub.here().endpoint == "https://mirror.example"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="switched off"):
        Hub.here()


def test_unknown_revision(hub):
    with pytest.raises(UserError, match="no such revision"):
        hub.listing("me/model", "v9")


def test_listing_finds_by_path():
    assert Listing("a/b", "c", ()).find("x") is None
