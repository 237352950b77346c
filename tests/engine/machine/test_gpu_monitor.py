"""The card's live numbers through the stand-in driver: counted, not counted, hanging, not there; no made-up zero."""
from __future__ import annotations

from functools import partial

import pytest

from engine.machine import detect, gpu_monitor
from engine.machine.gpu_monitor import CardMeter
from tests.support import fake_driver, waiting
from tests.support.fake_driver import RTX_3060

library, driver = fake_driver.library, fake_driver.driver
until = partial(waiting.until, seconds=30)


@pytest.fixture
def meter():
    """Start a meter on what the survey sees; it is closed afterwards."""
    made = []

    def start() -> CardMeter:
        made.append(CardMeter(detect.survey()))
        return made[-1]
    yield start
    for each in made:
        each.close()


def test_a_card_that_counts(driver, meter):
    driver(RTX_3060, link="12000000,250")
    watched = meter()
    until(lambda: watched.now().to_card is not None)
    now = watched.now()
    assert (now.to_card, now.from_card, now.busy) == (12 * 10**9, 250_000, 0.42)
    assert (now.vram_used_bytes, now.vram_total_bytes) == (388 * 2**20, 12288 * 2**20)
    assert now.name.endswith("3060") and now.reason == ""


def test_a_measured_zero_is_a_zero(driver, meter):
    driver(RTX_3060, link="0,0")
    watched = meter()
    until(lambda: watched.now().to_card is not None)
    assert watched.now().to_card == 0 and watched.now().reason == ""


def test_a_card_without_a_counter_says_so(driver, meter):
    driver(RTX_3060)
    watched = meter()
    until(lambda: watched.now().vram_total_bytes is not None)
    assert watched.now().to_card is None and "no counter" in watched.now().reason


def test_a_driver_that_stops_answering_is_noticed(driver, meter, monkeypatch):
    monkeypatch.setattr(gpu_monitor, "SILENT_SECONDS", 0.5)
    driver(RTX_3060, fault="link-hang")
    watched = meter()
    until(lambda: watched.now().reason)
    assert watched.now().to_card is None and watched.now().reason.endswith("the engine's own.")


def test_no_card_is_said_in_words(driver, meter):
    driver(RTX_3060, fault="init:9")
    now = meter().now()
    assert now.to_card is None and "not running" in now.reason


def test_the_process_ends_with_the_meter(driver, meter):
    driver(RTX_3060, link="1,1")
    watched = meter()
    child = watched._child
    until(lambda: watched.now().to_card is not None)
    watched.close()
    until(lambda: child.poll() is not None)
