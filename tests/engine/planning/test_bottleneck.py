"""Why is it slow: the name of what binds follows the numbers, for every name there is."""
from __future__ import annotations

from dataclasses import replace

import pytest

from engine.library import catalogue
from engine.machine import table
from engine.paths import demo_model
from engine.planning.bottleneck import BOUNDS, what_binds
from kernels.layout import Layout

MODEL = catalogue.entries()["qwen3.6-35b-a3b"].spec
CARD = table.described("rtx-3060-12gb")
CPU = table.described("cpu-ddr4")
NEEDED = MODEL.layers * MODEL.top_k * Layout(2048, 512, 128).blob_bytes  # of one token at `exact`


def snapshot(seconds, *, hit=1.0, read=0.0, context=1000, tokens=100, level="exact"):
    """An answer of `tokens` tokens, `seconds` each, `hit` of it near, after `read` seconds of prefill."""
    far = int((1 - hit) * NEEDED) * tokens
    answer = {"tokens": tokens, "seconds": seconds * tokens, "needed_bytes": NEEDED * tokens, "far_bytes": far}
    return {"answer": answer, "prompt": {"tokens": 700, "seconds": read}, "level": level, "context_used": context,
            "context": context, "trunk_bits": 4}


@pytest.mark.parametrize("bound, words, machine, shown", [
    ("link", ("25.2 GB/s", "30 % was near"), CARD, snapshot(0.025, hit=0.3)),
    ("trunk", ("reads whole",), replace(CARD, vram_bytes_per_second=20e9),
     snapshot(0.090, level="balanced", context=1)),
    ("vram", ("attention",), CARD, snapshot(0.030, context=200_000)),
    ("cpu", ("waiting for the program",), CARD, snapshot(0.200)),
    ("cpu", ("ms a token", "%"), CPU, snapshot(0.500)),
    ("prefill", ("700 tokens", "3.0 of 5.0 s"), CARD, snapshot(0.020, read=3.0))])
def test_what_binds_is_named(bound, words, machine, shown):
    found = what_binds(MODEL, {}, machine, shown)
    assert found.bound == bound in BOUNDS, found
    assert all(word in found.text for word in words) and found.text.endswith("."), found.text


def test_nothing_is_said_before_the_first_token():
    assert what_binds(MODEL, {}, CARD, snapshot(0.0, tokens=0)) is None


def test_a_wider_link_stops_binding():
    slow = what_binds(MODEL, {}, CARD, snapshot(0.025, hit=0.3))
    fast = what_binds(MODEL, {}, replace(CARD, link_bytes_per_second=1e12), snapshot(0.025, hit=0.3))
    assert slow.bound == "link" != fast.bound


def test_the_embedded_model_on_a_processor():
    known = catalogue.look_up("demo")
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    shown = snapshot(0.010, level="balanced", context=50)
    found = what_binds(known.spec, known.calibration, CPU, shown)
    assert found.bound == "cpu" and sum(seconds for _, seconds in found.parts) < 0.1
