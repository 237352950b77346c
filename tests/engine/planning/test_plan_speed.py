"""The plan's decode speed against `bench`, on this machine: from its measured rates and the stored miss curves alone.

Rates are measured anew beside every bench. A round counts only if this thread had its core for nearly all of it:
otherwise it has measured the neighbours, whom neither a plan nor a bench can know. Where quiet never comes the test is
skipped and says so; where it does, the first round decides, and if that is off the median of three, then of five.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pytest
import torch

from engine.bench.throughput import Bench, Sizes
from engine.core import Options
from engine.machine import benchmark
from engine.model.load import Loaded, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
APART = 0.2
QUIET = 0.9                     # share of the time that this thread has the core
COUNTED, MOST_ROUNDS = 5, 10    # rounds that count, rounds at all
PATIENCE_SECONDS = 60           # for the quiet to come


@dataclass(frozen=True)
class Round:
    """Tokens per second, and the share of the time in which this thread had the core."""

    predicted: float
    measured: float
    share: float

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted


@pytest.fixture(scope="module")
def demo(repository: Path) -> Loaded:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load(repository / "assets" / "demo", Options(level="exact", device="cpu"))
    torch.set_num_threads(threads)


def core_now() -> float:
    """Share of a fifth of a second in which this thread has the core, by its own clock: a host that takes the core away
    from the whole computer is seen as well."""
    began, own = time.perf_counter(), time.thread_time()
    while time.perf_counter() - began < 0.2:
        pass
    return (time.thread_time() - own) / (time.perf_counter() - began)


def core_during(work: Callable[[], object]) -> float:
    """Of the time in which this thread could have run, how much it ran; what it waits for by itself does not count.
    1 where the system does not say."""
    def ran_and_waited() -> list[int]:
        counts = Path("/proc/thread-self/schedstat")
        return [int(number) for number in counts.read_text().split()[:2]] if counts.exists() else [1, 0]
    before = ran_and_waited()
    work()
    ran, waited = (now - then for now, then in zip(ran_and_waited(), before, strict=True))
    return ran / (ran + waited) if ran else 1.0


def wait_for_quiet() -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while core_now() < QUIET:
        if time.monotonic() > end:
            pytest.skip(f"other programs have kept this core busy for {PATIENCE_SECONDS} s: no speed can be measured")
        time.sleep(1)


def round_of(demo: Loaded, level: str, near_bytes: int) -> Round:
    speeds: list[float] = []

    def work() -> None:
        room = replace(demo.room, machine=benchmark.apply(demo.room.machine, benchmark.measure("cpu")))
        made = room.plan(level, Options(level=level, near_bytes=near_bytes, context=224, device="cpu"))
        demo.runtime.set_level(level, made.near_bytes)
        speeds.append(made.decode_tokens_per_second)
        speeds.append(Bench(demo, sizes=Sizes(128, 96)).document()["decode_tokens_per_second"])
    during = core_during(work)
    return Round(*speeds, min(during, core_now()))


def settled(counted: list[Round]) -> bool:
    """An odd number of rounds whose median agrees, or as many as are asked for at most."""
    close = len(counted) % 2 and abs(median(each.ratio for each in counted) - 1) <= APART
    return bool(close) or len(counted) == COUNTED


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("level", ["exact", "balanced"])
def test_predicted_within_a_fifth_of_bench(demo: Loaded, level: str, share: float) -> None:
    demo.runtime.set_level(level)
    least, most = demo.runtime.smallest_bytes(), demo.runtime.everything_bytes()
    rounds: list[Round] = []
    while not settled(counted := [each for each in rounds if each.share >= QUIET]):
        if len(rounds) == MOST_ROUNDS:
            pytest.skip(f"other programs took this core in between, again and again: {rounds}")
        wait_for_quiet()
        rounds.append(round_of(demo, level, int(least + share * (most - least))))
    print(rounds)
    assert abs(median(each.ratio for each in counted) - 1) <= APART, rounds
