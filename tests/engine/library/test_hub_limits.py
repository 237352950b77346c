"""What a Hub may ask of us: listings have an end and can be stopped, the token stays at home, names fit any disk."""
from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest

from engine.core import MachineError, UserError
from engine.library import hub as hub_module
from engine.library import network
from engine.library.catalogue import look_up
from engine.library.download import download
from engine.library.hub import Hub, RemoteFile, Stopped
from tests.support.loopback_hub import LoopbackHub, cut, passes, status

DATA = bytes(range(256)) * 2000
NAME = "weights.safetensors"
INFO = "api/models/me/model/revision/main"


@pytest.fixture
def loopback():
    with LoopbackHub() as hub:
        hub.commit = hub.add("me/model", {NAME: DATA, "config.json": b"{}"})
        hub.tree = f"api/models/me/model/tree/{hub.commit}"
        yield hub


@pytest.fixture
def hub(loopback) -> Hub:
    return Hub(loopback.endpoint, token="hf_secret", delays=(0.01,))


def page(entries: list, following: str = ""):
    def fault(handler) -> bool:
        body = json.dumps(entries).encode()
        handler.start(200, len(body), {"Link": f'<{following}>; rel="next"'} if following else None)
        handler.wfile.write(body)
        return True
    return fault


def endless(piece: bytes, pause: float = 0.0):
    """An answer that does not end, while anyone listens."""
    def fault(handler) -> bool:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        while True:
            try:
                handler.wfile.write(piece)
            except OSError:
                return True
            time.sleep(pause)
    return fault


def entry(n: int) -> dict:
    return {"type": "file", "path": f"f{n}.json", "size": 1, "oid": "0"}


def test_a_listing_has_pages(hub, loopback):
    loopback.fault(loopback.tree, page([entry(0), {"type": "directory", "path": "d"}], f"/{loopback.tree}?cursor=1"),
                   page([entry(1)]))
    assert [file.path for file in hub.listing("me/model").files] == ["f0.json", "f1.json"]


@pytest.mark.parametrize("place", [INFO, "tree"])
def test_a_document_without_end(hub, loopback, place):
    loopback.fault(INFO if place == INFO else loopback.tree, endless(b"[" + b"[]," * 20_000))
    with pytest.raises(MachineError, match="has no end"):
        hub.listing("me/model")


def test_a_document_that_trickles(hub, loopback):
    loopback.fault(INFO, endless(b" ", 0.02))
    with pytest.raises(MachineError, match="has no end"):
        replace(hub, listing_seconds=0.3).listing("me/model")


@pytest.mark.parametrize("entries", [[], [entry(0)]])
def test_pages_without_end(hub, loopback, entries):
    loopback.fault(loopback.tree, *[page(entries, f"{loopback.endpoint}/{loopback.tree}")] * 99)
    with pytest.raises(MachineError, match="has no end"):
        hub.listing("me/model")
    assert len(loopback.faults[loopback.tree]) == 99 - hub_module.MOST_PAGES


def test_more_files_than_a_model_has(hub, loopback, monkeypatch):
    monkeypatch.setattr(hub_module, "MOST_FILES", 1)
    loopback.fault(loopback.tree, page([entry(0), entry(1)]))
    with pytest.raises(UserError, match="lists more than 1 files"):
        hub.listing("me/model")


@pytest.mark.parametrize("stuck", ["listing", "file"])
def test_stop_within_a_second_of_a_hub_that_says_nothing(hub, loopback, tmp_path, stuck):
    """The connection's own patience, 30 s here, is not waited for."""
    release, stop, asked, hub = threading.Event(), threading.Event(), threading.Event(), replace(hub, timeout=30)

    def silent(handler) -> bool:
        asked.set()
        return cut(DATA, 5000, release)(handler) if stuck == "file" else release.wait(20)
    listing = hub.listing("me/model")
    loopback.fault(INFO, silent) if stuck == "listing" else loopback.fault(NAME, passes, silent)

    def work() -> None:
        with pytest.raises(Stopped):
            hub.listing("me/model", stop=stop) if stuck == "listing" else hub.fetch(
                listing, listing.find(NAME), tmp_path / NAME, lambda n_bytes, text: None, stop)
    worker = threading.Thread(target=work)
    worker.start()
    assert asked.wait(10)
    begun = time.monotonic()
    stop.set()
    worker.join(10)
    assert not worker.is_alive() and time.monotonic() - begun < 1
    release.set()
    if stuck == "file":         # the one that was left alone does not disturb its successor
        hub.fetch(listing, listing.find(NAME), tmp_path / NAME, lambda n_bytes, text: None)
        assert (tmp_path / NAME).read_bytes() == DATA


@pytest.mark.parametrize("way", ["redirect", "page"])
def test_the_api_stays_at_the_endpoint(hub, loopback, way):
    with LoopbackHub() as other:                            # another port: another origin
        other.add("me/model", {NAME: DATA})
        if way == "redirect":
            loopback.fault(INFO, status(307, None, Location=f"{other.endpoint}/{INFO}"))
        else:
            loopback.fault(loopback.tree, page([entry(0)], f"{other.endpoint}/{loopback.tree}"))
        with pytest.raises(UserError, match="not its own; nothing was fetched"):
            hub.listing("me/model")
        assert other.requests == []


def test_a_renamed_repository_is_found(hub, loopback):
    """The Hub answers with an address of its own."""
    loopback.repositories["old/name"] = loopback.repositories["me/model"]
    for place in (INFO, loopback.tree):
        loopback.fault(place.replace("me/model", "old/name"), status(307, None, Location=f"/{place}"))
    assert hub.listing("old/name").find(NAME)
    assert {token for _, token in loopback.tokens_seen} == {"Bearer hf_secret"}


@pytest.mark.parametrize("path", [
    "../x.json", "/etc/x.json", "a/../../x.json", "C:x.json", "a\\b.json", "", "a\nb.json", "a\rb.json", "a\0b.json",
    "a\x1b[2Jb.json", "a\u202egnp.json", "a//b.json", "./a.json", "a/./b.json", "a/", "x.json.", "x.json ", "a /b.json",
    "..", ".", "x" * 300 + ".json", "a\u2028b.json", "a?.json", "<x>.json", None, 7, ["x.json"]])
def test_names_that_not_every_disk_can_hold(path):
    with pytest.raises(UserError, match="not every disk can hold") as caught:
        RemoteFile(path, 1)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("size", [-1, 1.0, True, None, "1"])
def test_sizes_that_no_file_has(size):
    with pytest.raises(UserError, match="damaged"):
        RemoteFile("x.json", size)


@pytest.mark.parametrize("twin", ["Floe.json", "Floe.source.json", "floe.Partial.json", "Config.json"])
@pytest.mark.parametrize("source", ["original", "ready"])
def test_names_that_another_file_has_on_some_disks(hub, loopback, tmp_path, twin, source):
    loopback.add("me/model", {NAME: DATA, "config.json": b"{}", twin: b"{}"} | (
        {"floe.json": b"{}"} if source == "ready" else {}))
    with pytest.raises(UserError, match="many disks cannot tell from"):
        download("me/model", source, tmp_path / "model", hub=hub)
    assert [path.name for path in tmp_path.rglob("*")] == []


def test_a_configuration_that_is_no_small_file_is_not_fetched(loopback, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", loopback.endpoint)
    loopback.fault(loopback.tree, page([entry(0) | {"path": "config.json", "size": 10**11}]))
    with pytest.raises(UserError, match="config.json of me/model has 100"):
        look_up("me/model", tmp_path)
    assert not any("/resolve/" in request for request in loopback.requests)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://x", "https://", "file:///x", "", "http://["])
def test_an_endpoint_that_is_no_address(endpoint):
    with pytest.raises(UserError, match="HF_ENDPOINT"):
        Hub(endpoint)


# What this computer says of the way to a Hub is looked at before anything is asked

@pytest.mark.parametrize("name, value", [("ALL_PROXY", "socks://127.0.0.1:9/"), ("https_proxy", "ftp://a:1"),
                                         ("HTTP_PROXY", "gopher://a"), ("SSL_CERT_FILE", "/nonexistent/ca.pem")])
def test_a_variable_that_cannot_be_used_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"variable {name} "):
        Hub.here()


@pytest.mark.parametrize("token, what", [("hf_a\n", "a line break"), ("hf a", "a blank"), ("\u201cx\u201d", "\u201c"),
                                         ("'hf_a'", "'"), ("hf_ä", "ä"), ("", "empty"), ("a\u200bb", "cannot be seen")])
def test_what_is_wrong_with_a_token_is_said_at_once(token, what):
    with pytest.raises(UserError, match=what) as refused:
        Hub("https://hub.example", token)
    assert token not in str(refused.value) or not token


def test_of_a_token_in_the_environment_as_well(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "\u201chf_a\u201d")
    with pytest.raises(UserError, match="The variable HF_TOKEN has"):
        Hub.here()


def test_hosts_are_allowed_by_a_person_a_variable_and_an_option(monkeypatch, tmp_path):
    assert network.allowed_hosts(tmp_path) == ()
    assert network.allow_hosts("https://Store.example.com/x, b.example", tmp_path) == ("store.example.com", "b.example")
    monkeypatch.setenv("FLOECHAT_HOSTS", "c.example")
    hub = Hub.here(hosts=("d.example",), data=tmp_path)
    assert hub.hosts == ("d.example", "store.example.com", "b.example", "c.example")
    for bad in ("a b.c!", "http://", "*.example"):
        with pytest.raises(UserError, match="not the name of a host"):
            network.allow_hosts(bad, tmp_path)
    assert network.allow_hosts("", tmp_path) == ()


def test_a_mirror_is_chosen_by_a_person_and_the_variable_goes_before_it(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert network.choose_mirror(" https://hub.example.com/ ", tmp_path) == "https://hub.example.com"
    assert Hub.here(data=tmp_path).endpoint == network.mirror(tmp_path) == "https://hub.example.com"
    for bad in ("hub.example.com", "ftp://hub.example", "https://", "https://a b", "https://me:secret@hub.example",
                "https://hub.example/?x=1", "https://hub.example:many", "https://[half", "https://hub.ex\nample"):
        with pytest.raises(UserError, match="is not the address of a Hub"):
            network.choose_mirror(bad, tmp_path)
    assert network.mirror(tmp_path) == "https://hub.example.com"
    monkeypatch.setenv("HF_ENDPOINT", "http://other.example")
    assert Hub.here(data=tmp_path).endpoint == "http://other.example"
    monkeypatch.delenv("HF_ENDPOINT")
    assert network.choose_mirror("", tmp_path) == "" and Hub.here(data=tmp_path).endpoint == "https://huggingface.co"


def test_a_redirect_to_an_allowed_host_is_followed_and_to_another_not():
    hub = Hub("https://hub.example", hosts=("store.example",))
    class Out:
        pass
    assert hub._allowed("https://eu.store.example/f", Out()) == "https://eu.store.example/f"
    with pytest.raises(UserError, match="allow this host"):
        hub._allowed("https://other.example/f", Out())
