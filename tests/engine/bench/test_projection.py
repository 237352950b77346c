"""A token from one card to another: the arithmetic, and which cards it is for."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bench.projection import Needs, Speeds, card, projected
from engine.core import UserError
from engine.machine import detect

POSITIVE = st.floats(1.0, 1e12)


def test_bytes_go_over_the_other_cards_bandwidths_and_the_rest_stays():
    here, there = Speeds(vram=400e9, link=20e9), detect.described("rtx-3060-12gb")
    needs = Needs(vram_bytes=2e9, link_bytes=40e6, seconds=0.010)  # 5 ms + 2 ms here, so 3 ms are something else
    assert needs.outside_seconds(here) == pytest.approx(0.003)
    row = projected(needs, here, there)
    assert row["vram_ms"] == pytest.approx(2e9 / (0.88 * 360e9) * 1e3)
    assert row["link_ms"] == pytest.approx(40e6 / (16 * 1.575e9) * 1e3)
    assert row["outside_ms"] == pytest.approx(3)
    assert row["tokens_per_second"] == pytest.approx(1e3 / (row["vram_ms"] + row["link_ms"] + 3))
    assert row["bound_tokens_per_second"] == pytest.approx(1e3 / (row["vram_ms"] + row["link_ms"]))


@given(POSITIVE, POSITIVE, st.floats(1e-6, 1e3), POSITIVE, POSITIVE)
def test_onto_itself_a_card_is_what_was_measured(vram_bytes, link_bytes, seconds, vram, link):
    """Or its bound, where the bytes alone should have taken longer than was measured."""
    here, needs = Speeds(vram, link), Needs(vram_bytes, link_bytes, seconds)
    itself = detect.Machine("itself", 1, 1, 1, 1, vram_bytes_per_second=vram, link_bytes_per_second=link)
    expected = 1 / max(seconds, needs.memory_seconds(here))
    assert projected(needs, here, itself)["tokens_per_second"] == pytest.approx(expected)


def test_only_cards_that_could_run_it():
    assert card("rtx-4070-12gb").name == "GeForce RTX 4070"
    with pytest.raises(UserError, match="no card that runs this"):
        card("gtx-1080-ti-11gb")
    with pytest.raises(UserError, match="no card that runs this"):
        card("cpu-ddr4")
    with pytest.raises(UserError, match="choose one of"):
        card("voodoo")
