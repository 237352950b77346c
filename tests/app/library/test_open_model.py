"""The model that is open: wishes between answers, what the next start opens, which levels are called faster."""
from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from app.chat.chats import Chats
from app.library.machine_status import Surroundings
from app.library.open_model import Models
from app.page import _about_levels
from app.server import Parts
from app.strings import TEXT
from engine import PRESETS, Options, demo_model
from tests.support.waiting import until


@pytest.fixture
def noted():
    return []


@pytest.fixture
def models(tmp_path, noted):
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    around = Surroundings(tmp_path, "cpu")
    models = Models(demo_model(), Options("balanced", device="cpu"), around, remember=noted.append)
    models.open()
    assert models.wait(threading.Event())
    yield models
    models.close()
    around.close()


@pytest.mark.parametrize("wishes", [("fast", "exact"), ("exact", "fast", "quality"), ("fast", "balanced")])
def test_of_several_wishes_during_an_answer_the_last_counts_and_nobody_waits(models, noted, wishes):
    answer = models.engine.chat([{"role": "user", "content": "Tell me a long story."}])
    next(event for event in answer if event.kind == "answer")
    for level in wishes:
        models.configure(level=level)
    assert (models.level, models.options.level) == ("balanced", wishes[-1])  # not in the middle of an answer
    answer.close()  # stopped
    until(lambda: models.engine.options.level == wishes[-1] == models.level and models._applier is None)
    assert models.options == models.engine.options and noted[-1]["level"] == wishes[-1]


def test_near_memory_goes_back_to_what_the_plan_gives(models):
    planned = models.snapshot()["near_bytes"]
    models.configure(near_bytes=models.snapshot()["near_least_bytes"])
    until(lambda: models.snapshot()["near_bytes"] < planned)
    models.configure(near_bytes=None)
    until(lambda: models.snapshot()["near_bytes"] == planned)


def test_a_wish_that_cannot_be_is_said_and_the_page_shows_what_runs(models):
    before = models.options
    models.configure(near_bytes=1)
    until(lambda: models.refused)
    assert "near memory" in models.refused and models.options == before == models.engine.options
    models.configure(level="fast")
    assert models.refused == ""
    until(lambda: models.level == "fast")


def test_the_next_start_opens_what_was_open_and_not_what_took_the_program_down(models, noted):
    opened = {"folder": str(demo_model()), "level": "balanced", "context": None, "preset": "lossless"}
    assert noted == [{}, opened]  # a program that is killed while it opens a model leaves the first
    models.open(demo_model(), "fast", 512, preset="prefer_cached")
    assert models.wait(threading.Event())
    assert noted[2:] == [{}, opened | {"level": "fast", "context": 512, "preset": "prefer_cached"}]


def test_a_preset_that_cannot_be_here_does_not_keep_the_model_shut(models):
    models.options = replace(models.options, level="fast", policies=PRESETS["cached_only"])  # of a note by another hand
    models.open()
    assert models.wait(threading.Event()).options.policies == "" and models.level == "fast"


@pytest.mark.parametrize("asked, level, preset", [(None, "fast", "prefer_cached"), ("fast", "fast", "prefer_cached"),
                                                  ("exact", "exact", "lossless")])
def test_the_last_model_is_opened_again_at_its_level_context_and_preset(tmp_path, asked, level, preset):
    last, bare = tmp_path / "last", tmp_path / "data"
    last.mkdir()
    (last / "config.json").write_text("{}")
    bare.mkdir()
    chats = Chats(bare / "chats.db")
    noted = {"folder": str(last), "level": "fast", "context": 512}
    chats.set_preference("opened", noted | {"preset": "prefer_cached"})
    assert chosen(bare, asked) == (last, level, 512, PRESETS[preset])
    for other in ({}, {"preset": "of tomorrow"}, {"preset": ["x"]}):  # an older program's note, and a newer one's
        chats.set_preference("opened", noted | other)
        assert chosen(bare, asked) == (last, level, 512, "")
    chats.close()
    (last / "config.json").unlink()  # deleted meanwhile, or on a disk that is not there
    assert chosen(bare, asked)[0] == demo_model()


@pytest.mark.parametrize("opened", [{}, {"folder": 5, "level": "fast", "context": None}, {"level": "fast"}, [], "x",
                                    {"folder": ".", "level": "of tomorrow", "context": "many"}])
def test_a_note_that_says_nothing_opens_the_demo(tmp_path, opened):
    chats = Chats(tmp_path / "chats.db")
    chats.set_preference("opened", opened)
    chats.close()
    assert chosen(tmp_path, None)[0] == demo_model()


def chosen(data, level: str | None) -> tuple:
    """Folder, level, context and policies that a start would open without --model."""
    parts = Parts.make(data, None, Options(level or "balanced", device="cpu"), plan_level=level is None)
    options = parts.models.options
    try:
        return parts.models.folder, options.level, options.context, options.policies
    finally:
        parts.jobs.start()
        parts.close()


@pytest.mark.parametrize("expected, said", [
    ({"exact": 62.0, "quality": 14.0, "fast": 16.0}, "level_slower"), ({"exact": 6.0, "fast": 16.0}, "level_info"),
    ({"exact": 6.0, "quality": 5.0, "fast": 6.1}, "level_slower"), ({"exact": 6.0}, "level_unmeasured"),
    ({}, "level_info")])
def test_lower_levels_are_called_faster_where_they_are(expected, said):
    assert _about_levels(expected) == TEXT[said]
