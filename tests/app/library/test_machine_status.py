"""What the page says about the machine: whether its card is used and why not; how long opening a model still takes."""
from __future__ import annotations

import json
import threading
import time

import pytest

from app.library.load_progress import Opening
from app.library.machine_status import Surroundings
from app.library.open_model import Models
from engine import Engine, Options, UserError, demo_model, look_up, plan_for
from tests.support import fake_driver
from tests.support.fake_driver import RTX_3060

library, driver = fake_driver.library, fake_driver.driver
OLD_CARD = "NVIDIA GeForce GTX 1080 Ti|6.1|11264|11000|3|16|3|16|5505|352"


@pytest.fixture
def around(tmp_path):
    """Surroundings for what the user asked for with --device; closed afterwards."""
    made = []

    def make(device: str | None) -> Surroundings:
        made.append(Surroundings(tmp_path, device))
        made[-1].look()
        return made[-1]
    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("card, fault, device, running, used, said", [
    (RTX_3060, "", None, "cuda", True, "RTX 3060"),
    (RTX_3060, "", None, "cpu", False, "this installation cannot use it"),
    (RTX_3060, "", "cpu", "cpu", False, "--device cpu"),
    (OLD_CARD, "", None, "cpu", False, "compute capability 6.1"),
    ("", "", None, "cpu", False, "finds no card"),
    (RTX_3060, "init:9", None, "cpu", False, "not running"),
    (RTX_3060, "init:18", None, "cpu", False, "restart the computer"),
    (RTX_3060, "crash", None, "cpu", False, "Runs on the processor")])
def test_the_banner_says_whether_the_card_is_used_and_why_not(driver, around, card, fault, device, running, used, said):
    driver(*([card] if card else []), fault=fault)
    shown = around(device).graphics(running)
    assert shown["used"] is used and said in shown["text"] and shown["text"].endswith(".")


def test_nothing_is_said_before_anything_is_known(tmp_path):
    around = Surroundings(tmp_path, None)
    assert around.graphics("cpu") is None and around.card() is None and around.machine is None


def test_a_device_that_is_not_there_leaves_the_rest_of_the_page_alone(driver, around):
    driver()
    assert around("cuda").machine.device == "cpu"


def test_the_time_left_comes_from_the_last_time(tmp_path):
    memory = tmp_path / "openings.json"
    first = Opening("boat", 1000, memory)
    first.step("Reading")
    assert first.shown()["left"] is None  # nothing is known, nothing is promised
    time.sleep(0.05)
    first.step("Reading")
    first.step("Compiling")
    shown = [(row["name"], row["state"]) for row in first.shown()["steps"]]
    assert shown == [("Reading", "done"), ("Compiling", "now")]
    first.finish()
    seconds = json.loads(memory.read_text())["boat"]["seconds"]
    assert seconds >= 0.05
    assert 0 <= Opening("boat", 1000, memory).shown()["left"] <= round(seconds, 1)
    twice = Opening("ship", 10_000_000, memory).shown()["left"]  # never opened: by its size
    assert twice > seconds


@pytest.mark.parametrize("text", ["", "[]", '{"boat": 3}', '{"boat": {"seconds": "x", "bytes": 1}}'])
def test_a_damaged_memory_of_openings_promises_nothing(tmp_path, text):
    (tmp_path / "openings.json").write_text(text)
    assert Opening("boat", 1000, tmp_path / "openings.json").shown()["left"] is None


def test_switching_frees_the_old_model_before_the_next_one_is_read(around, monkeypatch):
    models = Models(demo_model(), Options(device="cpu"), around("cpu"))
    models.open()
    assert models.wait(threading.Event())
    old, opening, freed = models.engine, Engine.open, []

    def watched(*args, **options):
        with pytest.raises(UserError, match="closed"):
            old.count_tokens([{"role": "user", "content": "Hello!"}])
        freed.append(models.engine is None)
        return opening(*args, **options)
    monkeypatch.setattr(Engine, "open", watched)
    models.open(demo_model(), "fast", 256)
    assert models.wait(threading.Event()) and freed == [True] and models.engine is not old
    assert models.level == "fast" and models.info()["context"] == 256
    models.close()


def test_the_first_model_opens_at_the_level_of_its_plan(around):
    machine = around("cpu")
    models = Models(demo_model(), Options(level="fast", device="cpu"), machine, plan_level=True)
    try:
        models.open()
        assert models.wait(threading.Event())
        assert models.level == plan_for(look_up(str(demo_model())), machine.machine).level != "fast"
    finally:
        models.close()


def test_a_control_that_is_used_while_no_model_is_open_hears_so(around):
    models = Models(demo_model(), Options(device="cpu"), around("cpu"))
    with pytest.raises(UserError, match="being loaded"):
        models.configure(level="exact")
    models.state, models.step = "failed", "It cannot be opened."
    with pytest.raises(UserError, match="cannot be opened"):
        models.configure(level="exact")
