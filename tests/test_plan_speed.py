"""The plan's decode speed against `bench`, on this machine: from its measured rates and the stored miss curves alone.

Rates and bench are read one after the other, and the closest of three rounds counts: another program may take the core
in between, which neither can know.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import rates
from engine.bench import Bench, Sizes
from engine.hf import Loaded, load
from engine.spec import Options

pytestmark = pytest.mark.slow
ROUNDS, APART = 3, 0.2


@pytest.fixture(scope="module")
def demo(repository: Path) -> Loaded:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load(repository / "assets" / "demo", Options(level="exact", device="cpu"))
    torch.set_num_threads(threads)


def round_of(demo: Loaded, level: str, near_bytes: int) -> tuple[float, float]:
    """(predicted, measured) tokens per second."""
    room = replace(demo.room, machine=rates.apply(demo.room.machine, rates.measure("cpu")))
    made = room.plan(level, Options(level=level, near_bytes=near_bytes, context=224, device="cpu"))
    demo.runtime.set_level(level, made.near_bytes)
    measured = Bench(demo, sizes=Sizes(128, 96)).document()
    return made.decode_tokens_per_second, measured["decode_tokens_per_second"]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("level", ["exact", "balanced"])
def test_predicted_within_a_fifth_of_bench(demo: Loaded, level: str, share: float) -> None:
    demo.runtime.set_level(level)
    least, most = demo.runtime.smallest_bytes(), demo.runtime.everything_bytes()
    seen = []
    while not any(abs(predicted / measured - 1) <= APART for predicted, measured in seen):
        assert len(seen) < ROUNDS, f"predicted and measured, tokens per second: {seen}"
        seen.append(round_of(demo, level, int(least + share * (most - least))))
