"""Models on the disk and on their way: download, pause, go on, delete; what is open cannot be deleted."""
from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from loopback_hub import LoopbackHub

from app.shelf import Shelf
from engine import Options, UserError, demo_model

NAME = "tester/Tiny-Floe"


@pytest.fixture
def loopback(monkeypatch):
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    with LoopbackHub() as hub:
        hub.add_folder(NAME, demo_model())
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def shelf(tmp_path):
    """A shelf whose open model is noted, not opened."""
    opened = SimpleNamespace(folder=demo_model(), state="ready", options=Options(device="cpu"))
    opened.open = lambda folder: setattr(opened, "folder", folder)
    return Shelf(tmp_path, opened)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def on_disk(shelf):
    return {model["name"]: model for model in shelf.shown()["disk"]}


def test_a_model_is_fetched_opened_and_deleted(loopback, shelf):
    shelf.fetch(NAME)
    until(lambda: "Tiny-Floe" in on_disk(shelf) and not shelf.downloads())
    assert on_disk(shelf)["Tiny-Floe"]["kind"] == "compressed"
    assert on_disk(shelf)["demo"]["open"]
    shelf.open("Tiny-Floe")
    assert on_disk(shelf)["Tiny-Floe"]["open"] and not on_disk(shelf)["demo"]["open"]
    with pytest.raises(UserError, match="is open"):
        shelf.remove("Tiny-Floe")
    shelf.open("demo")
    assert shelf.remove("Tiny-Floe") > 10_000_000
    assert list(on_disk(shelf)) == ["demo"]


def test_a_paused_download_goes_on_where_it_was(loopback, shelf):
    loopback.pause = 0.02
    shelf.fetch(NAME)
    until(lambda: shelf.downloads() and shelf.downloads()[0]["done"] > 500_000)
    with pytest.raises(UserError, match="already"):
        shelf.fetch(NAME)
    shelf.pause("Tiny-Floe")
    assert shelf.downloads()[0]["state"] == "paused"
    assert 0 < on_disk(shelf)["Tiny-Floe"]["share"] < 1
    loopback.pause = 0.0
    shelf.fetch(NAME)
    until(lambda: not shelf.downloads())
    assert on_disk(shelf)["Tiny-Floe"]["kind"] == "compressed"
    assert sum(loopback.served.values()) < 1.3 * on_disk(shelf)["Tiny-Floe"]["bytes"]  # nothing came twice


def test_what_cannot_be_fetched_is_said(loopback, shelf):
    shelf.fetch("tester/nothing")
    until(lambda: shelf.downloads()[0]["state"] == "failed")
    assert shelf.downloads()[0]["text"].endswith(".")
    with pytest.raises(UserError):
        shelf.open("nothing")


def test_every_model_of_the_catalogue_has_a_verdict_for_this_machine(shelf):
    offers = shelf.shown()["offers"]
    assert offers and {offer["verdict"] for offer in offers} <= {"fits", "slow", "no"}
    assert all(offer["text"] and offer["download_bytes"] > 1e9 for offer in offers)
    order = ["fits", "slow", "no"]
    assert [order.index(offer["verdict"]) for offer in offers] == sorted(order.index(o["verdict"]) for o in offers)
