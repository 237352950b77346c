"""Models on the disk and on their way: download, pause, cancel, delete, compress, import, and what a plan says."""
from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from app.library import model_library
from app.library.machine_status import Surroundings
from app.library.model_library import Shelf
from engine import Options, Stopped, UserError, calibrate_installed, data_dir, demo_model
from tests.engine.test_names import BAD_NAMES, BAD_PATHS, contents
from tests.support.loopback_hub import LoopbackHub
from tests.support.waiting import until

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
    opened = SimpleNamespace(folder=demo_model(), state="ready", options=Options(device="cpu"), asked=None)

    def open_it(folder, level, context, near_bytes, preset):
        opened.folder, opened.asked, opened.near_bytes, opened.preset = folder, (level, context), near_bytes, preset
    opened.open = open_it
    shelf = Shelf(opened, Surroundings(tmp_path, "cpu"))
    yield shelf
    shelf.close()


def on_disk(shelf):
    return {model["name"]: model for model in shelf.shown()["disk"]}


def works(shelf):
    return {work["name"]: work for work in shelf.works.shown()}


@pytest.fixture
def kept(shelf, tmp_path):
    """What must stay: a model, conversations, a folder that is nobody's model."""
    data_dir(tmp_path)
    for folder, file in (("models/mine", "config.json"), ("models/photos", "me.png"), (".", "chats.db")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text("{}")
    return contents(tmp_path)


def test_the_names_are_one_walk_of_the_disk_and_begin_with_the_open_model(shelf, tmp_path, monkeypatch):
    """A program's request asks for them, however many models there are."""
    walks, models = [], model_library.models
    for name in ("a", "b", "c"):
        shutil.copytree(demo_model(), data_dir(tmp_path) / "models" / f"{name}-floe", copy_function=os.symlink)
    monkeypatch.setattr(model_library, "models", lambda data: walks.append(data) or models(data))
    assert shelf.names() == ["demo", "a-floe", "b-floe", "c-floe"] and len(walks) == 1
    shelf._opened.folder = tmp_path / "models" / "b-floe"
    assert shelf.names() == ["b-floe", "demo", "a-floe", "c-floe"] and len(walks) == 2


def test_no_name_from_the_page_leads_out_of_the_models(loopback, shelf, kept, tmp_path):
    for name in [*BAD_NAMES, "photos", "mine.partial", "MINE"]:
        for ask in (shelf.open, shelf.plan, shelf.remove, shelf.measure, shelf.compress):
            with pytest.raises(UserError, match="no model"):
                ask(name)
        assert shelf.cancel(name) == 0
        shelf.fetch(name)
    until(lambda: all(work["state"] == "failed" for work in works(shelf).values()))
    assert all("\n" not in work["text"] for work in works(shelf).values())
    assert contents(tmp_path) == kept and shelf.remove("mine") == 2


def test_no_path_from_the_page_ends_in_anything_but_a_sentence(shelf, kept, tmp_path):
    for path in BAD_PATHS:
        for ask in (shelf.keep_in, lambda path: shelf.bring_in(f"{path}.gguf"), lambda p: shelf.measure("mine", p)):
            with pytest.raises(UserError, match="path|no GGUF file|no text file"):
                ask(path)
        for kind in ("gguf", "text", "folder"):
            assert shelf.suggest(path, kind) == shelf.suggest(path + "/", kind) == []
    assert contents(tmp_path) == kept


def test_a_model_is_fetched_opened_and_deleted(loopback, shelf):
    shelf.fetch(NAME)
    until(lambda: "Tiny-Floe" in on_disk(shelf) and not works(shelf))
    assert on_disk(shelf)["Tiny-Floe"]["kind"] == "compressed"
    assert shelf.works.finished == [{"name": "Tiny-Floe", "title": "Tiny-Floe", "kind": "download"}]
    assert on_disk(shelf)["demo"]["open"]
    shelf.open("Tiny-Floe")
    assert on_disk(shelf)["Tiny-Floe"]["open"] and not on_disk(shelf)["demo"]["open"]
    with pytest.raises(UserError, match="is loaded"):
        shelf.remove("Tiny-Floe")
    shelf.open("demo")
    assert shelf.shown()["used_bytes"] == on_disk(shelf)["Tiny-Floe"]["bytes"] > 10_000_000
    assert shelf.remove("Tiny-Floe") > 10_000_000
    assert list(on_disk(shelf)) == ["demo"] and shelf.shown()["used_bytes"] == 0


def test_a_paused_download_goes_on_where_it_was(loopback, shelf):
    loopback.pause = 0.02
    shelf.fetch(NAME)
    until(lambda: works(shelf) and works(shelf)["Tiny-Floe"]["done"] > 500_000)
    with pytest.raises(UserError, match="already"):
        shelf.fetch(NAME)
    shelf.pause("Tiny-Floe")
    assert works(shelf)["Tiny-Floe"]["state"] == "paused"
    assert 0 < works(shelf)["Tiny-Floe"]["done"] < works(shelf)["Tiny-Floe"]["total"]
    loopback.pause = 0.0
    assert shelf.works.go_on("Tiny-Floe")
    until(lambda: not works(shelf))
    assert on_disk(shelf)["Tiny-Floe"]["kind"] == "compressed"
    assert sum(loopback.served.values()) < 1.3 * on_disk(shelf)["Tiny-Floe"]["bytes"]  # nothing came twice


def test_work_that_was_begun_before_the_program_ended_can_be_resumed_or_cancelled(loopback, shelf, tmp_path):
    kept = []
    first = Shelf(shelf._opened, Surroundings(tmp_path, "cpu"), keep=kept.append)
    loopback.pause = 0.02
    first.fetch(NAME)
    until(lambda: works(first)["Tiny-Floe"]["done"] > 500_000)
    first.close()
    until(lambda: works(first)["Tiny-Floe"]["state"] == "paused")
    loopback.pause = 0.0
    nonsense = [5, {"name": "x"}, {"name": "y", "kind": "of tomorrow", "asked": {}},
                {"name": "z", "kind": "import", "asked": 1}]
    again = Shelf(shelf._opened, Surroundings(tmp_path, "cpu"), keep=kept.append, unfinished=[*nonsense, *kept[-1]])
    assert {name: (work["state"], work["kind"]) for name, work in works(again).items()} == {
        "Tiny-Floe": ("paused", "download")}
    assert list(on_disk(again)) == ["demo"]  # once on the page, as work
    again.works.go_on("Tiny-Floe")
    until(lambda: not works(again))
    assert on_disk(again)["Tiny-Floe"]["kind"] == "compressed" and kept[-1] == []
    again.measure("Tiny-Floe")
    last = Shelf(shelf._opened, Surroundings(tmp_path, "cpu"), unfinished=kept[-1])
    assert works(last)["Tiny-Floe"]["kind"] == "measure"
    again.works.pause("Tiny-Floe", seconds=600)     # a busy machine may be long in the middle of a step
    last.cancel("Tiny-Floe")
    assert works(last) == {} and "Tiny-Floe" in on_disk(last)


def test_a_cancelled_download_leaves_nothing(loopback, shelf, tmp_path):
    loopback.pause = 0.02
    shelf.fetch(NAME)
    until(lambda: works(shelf) and works(shelf)["Tiny-Floe"]["done"] > 500_000)
    assert shelf.cancel("Tiny-Floe") > 500_000
    assert works(shelf) == {} and list(on_disk(shelf)) == ["demo"]
    assert not any(path.is_dir() for path in (tmp_path / "models").iterdir())
    loopback.pause = 0.0
    shelf.fetch(NAME)  # and it can be begun again
    until(lambda: not works(shelf))
    assert on_disk(shelf)["Tiny-Floe"]["kind"] == "compressed"


def test_cancelling_never_deletes_a_model_that_is_whole(loopback, shelf):
    shelf.fetch(NAME)
    until(lambda: "Tiny-Floe" in on_disk(shelf) and not works(shelf))
    assert shelf.cancel("Tiny-Floe") == 0 and "Tiny-Floe" in on_disk(shelf)


def test_what_cannot_be_fetched_is_said(loopback, shelf):
    shelf.fetch("tester/nothing")
    until(lambda: works(shelf)["nothing"]["state"] == "failed")
    assert works(shelf)["nothing"]["text"].endswith(".")
    with pytest.raises(UserError):
        shelf.open("nothing")
    shelf.cancel("nothing")
    assert works(shelf) == {}


def test_every_model_of_the_catalogue_has_a_verdict_for_this_machine(shelf):
    offers = shelf.shown()["offers"]
    assert offers and {offer["verdict"] for offer in offers} <= {"fits", "slow", "impractical", "no"}
    assert all(offer["about"] and offer["download_bytes"] > 1e9 for offer in offers)
    order = ["fits", "slow", "impractical", "no"]
    assert [order.index(offer["verdict"]) for offer in offers] == sorted(order.index(o["verdict"]) for o in offers)


def test_the_plan_follows_level_and_context(shelf):
    name = shelf.shown()["offers"][0]["name"]
    for model in ("demo", name):
        free = shelf.plan(model)
        assert free["text"] and free["levels"] and free["context"] <= free["longest"]
        for level in ("exact", "fast"):
            chosen = shelf.plan(model, level, 512)
            assert chosen["level"] == level and "512 tokens" in chosen["text"]
    beyond = shelf.plan("demo", None, 4096)
    assert beyond["verdict"] == "no" and "at most 1,024 tokens" in beyond["text"]
    with pytest.raises(UserError):
        shelf.plan("tester/elsewhere")  # never asks the network


def test_a_model_is_opened_at_the_chosen_level_and_context(shelf):
    shelf.open("demo", "fast", 512)
    assert shelf._opened.asked == ("fast", 512)
    shelf.open("demo")
    assert shelf._opened.asked == (shelf.plan("demo")["level"], None)
    with pytest.raises(UserError, match="at most"):
        shelf.open("demo", None, 5000)
    assert shelf._opened.asked[1] is None  # nothing was closed for it


def test_what_may_stand_in_for_what_is_far_is_a_choice_of_loading(shelf):
    """With what it was measured to cost on this model; refused in a sentence where it cannot be, nothing closed."""
    rows = {row["name"]: row for row in shelf.plan("demo", "exact", None, 4 << 20)["presets"]}
    assert list(rows) == ["lossless", "prefer_cached", "cached_only"]
    assert rows["lossless"]["cost"] is None and 0 < rows["prefer_cached"]["cost"]["moved"] < 1
    assert rows["cached_only"]["cost"]["moved"] == 0 and not any(row["why_not"] for row in rows.values())
    sparse = {row["name"]: row for row in shelf.plan("demo", "fast")["presets"]}
    assert sparse["cached_only"]["why_not"].endswith("choose exact.") and sparse["prefer_cached"]["cost"] is None
    shelf.open("demo", "exact", None, 4 << 20, "prefer_cached")
    assert shelf._opened.preset == "prefer_cached"
    with pytest.raises(UserError, match="has to be exact"):
        shelf.open("demo", "fast", None, None, "cached_only")
    assert shelf._opened.preset == "prefer_cached"


def test_near_memory_is_a_choice_of_loading(shelf):
    free = shelf.plan("demo", "fast")
    assert shelf.plan("demo", "fast", None, free["near_bytes"] // 2)["near_bytes"] <= free["near_bytes"] // 2
    shelf.open("demo", "fast", None, 5 << 20)
    assert shelf._opened.near_bytes == 5 << 20


def test_the_folder_is_shown_by_the_computers_file_manager(shelf, tmp_path, monkeypatch):
    manager, seen = tmp_path / "bin" / "xdg-open", tmp_path / "seen"
    manager.parent.mkdir()
    manager.write_text(f'#!/bin/sh\nprintf %s "$1" > {seen}.part && mv {seen}.part {seen}\n')
    manager.chmod(0o755)
    monkeypatch.setattr("app.library.folders.sys.platform", "linux")
    monkeypatch.setenv("PATH", f"{manager.parent}{os.pathsep}{os.environ['PATH']}")
    assert shelf.show_folder("demo") == str(demo_model())
    until(seen.exists)
    assert seen.read_text() == str(demo_model())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="the folder is"):
        shelf.show_folder("demo")


def test_where_models_are_kept_is_said_without_the_name_of_the_home_folder(shelf, tmp_path, monkeypatch):
    assert shelf.shown()["folder"] == str(tmp_path / "models")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert shelf.shown()["folder"] == os.path.join("~", "models")


def test_new_models_go_to_the_chosen_folder_and_old_ones_go_on(loopback, shelf, tmp_path):
    shelf.fetch(NAME)
    until(lambda: "Tiny-Floe" in on_disk(shelf) and not works(shelf))
    disk = tmp_path / "other disk"
    assert shelf.keep_in(str(disk)) == shelf.shown()["folder"] == str(disk)
    shelf.fetch(NAME)  # is there already, in the old folder
    until(lambda: not works(shelf))
    assert on_disk(shelf)["Tiny-Floe"]["folder"] == str(tmp_path / "models" / "Tiny-Floe") and not list(disk.iterdir())
    assert shelf.remove("Tiny-Floe") > 10_000_000
    loopback.pause = 0.02
    shelf.fetch(NAME)
    until(lambda: works(shelf) and works(shelf)["Tiny-Floe"]["done"] > 500_000)
    shelf.pause("Tiny-Floe")
    shelf.keep_in("")  # what has been begun there is finished there
    loopback.pause = 0.0
    assert shelf.works.go_on("Tiny-Floe")
    until(lambda: not works(shelf))
    assert on_disk(shelf)["Tiny-Floe"]["folder"] == str(disk / "Tiny-Floe")
    assert shelf.plan("Tiny-Floe")["levels"]
    assert shelf.suggest(str(disk), "folder") == [str(disk) + os.sep]
    shelf.keep_in(str(disk))
    shutil.move(disk, tmp_path / "away")
    assert list(on_disk(shelf)) == ["demo"] and shelf.shown()["free_bytes"] is None
    shelf.fetch(NAME)
    until(lambda: works(shelf)["Tiny-Floe"]["state"] == "failed")
    assert "connect its disk" in works(shelf)["Tiny-Floe"]["text"]


def test_typing_a_path_brings_folders_and_gguf_files(shelf, tmp_path):
    (tmp_path / "models of mine").mkdir()
    for name in ("model.gguf", "model.txt", ".hidden.gguf"):
        (tmp_path / name).touch()
    found = [path.removeprefix(str(tmp_path) + os.sep) for path in shelf.suggest(f"{tmp_path}/mod")]
    assert found == ["model.gguf", "models of mine" + os.sep]
    assert shelf.suggest(f"{tmp_path}/model.", "text") == [str(tmp_path / "model.txt")]
    assert shelf.suggest(f"{tmp_path}/nothing/here") == []


@pytest.mark.parametrize("file", ["", "model.gguf", "/nowhere/model.gguf", "/etc/hostname"])
def test_a_path_that_is_no_gguf_file_is_refused(shelf, file):
    with pytest.raises(UserError, match="no GGUF file"):
        shelf.bring_in(file)


def test_a_checkpoint_is_compressed_beside_itself_with_a_pause_between(shelf, tmp_path, demo_checkpoint):
    from tests.support import small_model
    checkpoint, _ = small_model.make(tmp_path / "made", demo_checkpoint)
    assert list(on_disk(shelf)) == ["demo"]
    checkpoint.rename(tmp_path / "models" / "Small")
    assert on_disk(shelf)["Small"]["kind"] == "checkpoint"
    shelf.compress("Small")
    until(lambda: works(shelf).get("Small-floe", {"done": 1})["done"] or not works(shelf))
    shelf.pause("Small-floe")
    if works(shelf):  # two small layers: it may have been faster than the pause
        assert works(shelf)["Small-floe"]["state"] == "paused" and works(shelf)["Small-floe"]["total"] == 3
        shelf.works.go_on("Small-floe")
        until(lambda: not works(shelf))
    assert on_disk(shelf)["Small-floe"]["kind"] == "compressed"
    shelf.compress("Small")
    until(lambda: works(shelf)["Small-floe"]["state"] == "failed")
    assert "there already" in works(shelf)["Small-floe"]["text"]


@pytest.fixture
def unmeasured(tmp_path, demo_checkpoint):
    """A freshly compressed model called Small in the data folder, and a short text to measure it on."""
    from tests.support import small_model
    checkpoint, compressed = small_model.make(tmp_path / "made", demo_checkpoint)
    (tmp_path / "models").mkdir(exist_ok=True)
    compressed.rename(tmp_path / "models" / "Small")
    tale = "The boat went out to sea and came back with {n} fish. " * 8
    (tmp_path / "tales.txt").write_text("<|endoftext|>\n".join(tale.format(n=n) + "\n" for n in range(9)))
    return tmp_path / "models" / "Small", tmp_path / "tales.txt"


@pytest.mark.parametrize("kind", ["compress", "measure"])
def test_a_model_that_something_is_made_of_is_not_deleted_meanwhile(shelf, kept, kind):
    def works_until_told(report, stop):
        stop.wait()
        raise Stopped
    shelf.works.start("mine-floe", kind, {"name": "mine"}, works_until_told)
    assert on_disk(shelf)["mine"]["read_by"] == "mine-floe"
    with pytest.raises(UserError, match="mine is being read to make mine-floe of it"):
        shelf.remove("mine")
    shelf.pause("mine-floe")
    assert on_disk(shelf)["mine"]["read_by"] == "" and shelf.remove("mine") == 2
    assert "mine" not in on_disk(shelf)


def test_work_on_a_model_is_called_by_its_title(shelf):
    shelf.works.start("qwen3-30b-a3b", "download", {}, lambda report, stop: stop.wait())
    with pytest.raises(UserError, match="Qwen3 30B-A3B Instruct 2507 is being worked on"):
        shelf.fetch("qwen3-30b-a3b")
    assert works(shelf)["qwen3-30b-a3b"]["title"] == "Qwen3 30B-A3B Instruct 2507"
    shelf.pause("qwen3-30b-a3b")
    until(lambda: [done["title"] for done in shelf.works.finished] == ["Qwen3 30B-A3B Instruct 2507"])


def test_what_is_being_made_is_no_model_of_the_disk_as_well(shelf, kept, tmp_path):
    (tmp_path / "models" / "mine-floe.partial").mkdir()
    (tmp_path / "models" / "mine-floe.partial" / "floe.source.json").write_text("{}")
    assert on_disk(shelf)["mine-floe"]["kind"] == "unfinished"
    shelf.works.start("mine-floe", "compress", {"name": "mine"}, lambda report, stop: stop.wait())
    assert "mine-floe" not in on_disk(shelf) and "mine-floe" in works(shelf)
    assert shelf.cancel("mine-floe") > 0 and "mine-floe" not in on_disk(shelf)


def test_levels_are_measured_and_offered_then(shelf, unmeasured):
    folder, text = unmeasured
    assert on_disk(shelf)["Small"]["levels"] == ["exact"] == shelf.plan("Small")["levels"]
    said = set()
    shelf.works.on_change = lambda: said.update(work["text"] for work in shelf.works.shown())
    shelf.measure("Small", str(text))
    with pytest.raises(UserError, match="already"):
        shelf.measure("Small")
    until(lambda: not works(shelf) or works(shelf)["Small"]["state"] == "failed")
    assert works(shelf) == {} and shelf.works.finished == [{"name": "Small", "title": "Small", "kind": "measure"}]
    assert any(text.startswith("Measuring layer sensitivity") for text in said)
    assert not any("nats" in text or ":" in text for text in said), said  # figures are for a terminal
    levels = ["exact", "quality", "balanced", "fast", "floe"]
    assert on_disk(shelf)["Small"]["levels"] == levels and shelf.plan("Small")["levels"] == levels
    assert shelf.plan("Small", "fast")["level"] == "fast"


def test_measuring_that_is_stopped_has_changed_nothing_and_begins_anew(shelf, unmeasured):
    folder, _ = unmeasured
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shelf.measure("Small")  # on our own text: long enough to be stopped
    for _ in range(2):
        until(lambda: works(shelf)["Small"]["done"] > 0 and works(shelf)["Small"]["left"])
        assert works(shelf)["Small"]["done"] < works(shelf)["Small"]["total"]
        shelf.pause("Small")
        assert works(shelf)["Small"]["state"] == "paused"
        assert shelf.works.go_on("Small")
    assert shelf.cancel("Small") == 0 and works(shelf) == {}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_tokens_that_measuring_reads_are_no_more_than_was_said(unmeasured, tmp_path):
    seen = []
    calibrate_installed("Small", tmp_path, unmeasured[1], "cpu", seen.append)
    done = [progress.done_bytes for progress in seen]
    most = {progress.total_bytes for progress in seen[1:]}
    assert len(most) == 1 and done == sorted(done) and most.pop() / 4 < done[-1] <= seen[-1].total_bytes
    assert any("balanced" in progress.text for progress in seen)


@pytest.mark.parametrize("text", ["tales.txt", "/nowhere/tales.txt", "/etc/hostname"])
def test_what_levels_are_measured_on_must_be_a_text_file(shelf, unmeasured, text):
    with pytest.raises(UserError, match="no text file"):
        shelf.measure("Small", text)
    with pytest.raises(UserError, match="no model"):
        shelf.measure("Large")
    assert works(shelf) == {}


def test_a_text_that_is_too_short_is_said(shelf, unmeasured):
    unmeasured[1].write_text("One.\n")
    shelf.measure("Small", str(unmeasured[1]))
    until(lambda: works(shelf)["Small"]["state"] == "failed")
    assert "at least 3" in works(shelf)["Small"]["text"]


BAD = {"deep": ("floe.json", "[" * 100_000), "list": ("floe.json", '{"calibration": {"levels": [1]}}'),
       "pipe": ("floe.json", None), "configuration": ("config.json", '{"num_hidden_layers": 1000000000}'),
       "source": ("floe.source.json", '{"files": [{"path": 7, "bytes": "x"}]}'),
       "source pipe": ("floe.source.json", None),
       "source list": ("floe.source.json", '{"endpoint": 1, "repository": [1], "commit": 2, "kind": 3, "files": []}')}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes among files")
def test_one_bad_folder_hides_no_other(shelf, tmp_path, monkeypatch):
    """They are listed and planned beside it, the good one as if they were not there."""
    models = tmp_path / "models"
    shutil.copytree(demo_model(), models / "Good-floe")
    good, plan = on_disk(shelf)["Good-floe"], shelf.plan("Good-floe")
    for name, (file, text) in BAD.items():
        (models / f"Half {name}.partial").mkdir()
        for folder in (shutil.copytree(demo_model(), models / f"Bad {name}"), models / f"Half {name}.partial"):
            (folder / file).unlink(missing_ok=True)
            os.mkfifo(folder / file) if text is None else (folder / file).write_text(text)
    (models / "Loop").symlink_to("Loop")
    assert on_disk(shelf)["Good-floe"] == good and shelf.plan("Good-floe") == plan
    assert {"Bad deep", "Bad list", "Bad source", "Bad configuration", "Half source"} <= set(on_disk(shelf))
    for name in ("Bad deep", "Bad list", "Bad configuration"):
        with pytest.raises(UserError, match=r"(floe|config)\.json.*\.$"):
            shelf.plan(name)
    monkeypatch.setattr(model_library, "demo_model", lambda: models / "Bad deep")
    assert on_disk(shelf)["demo"]["levels"] == [] and on_disk(shelf)["Good-floe"] == good
