"""What is run at first light, in order, and how long each may take. Standard library alone: nothing here can crash.

A step is one or several processes. `together`: they run beside each other; else they share the time one after another.
The first step says which card it is; without it nothing goes on.
"""
from __future__ import annotations

from dataclasses import dataclass

from engine.core import UserError

REST = 0  # seconds: whatever is left
LEAST_REST = 20
FIRST = 0


@dataclass(frozen=True)
class Step:
    """seconds: for all of its parts. parts: what the child is asked for (engine/bench/first_light/child.py)."""

    number: int
    seconds: float
    title: str
    parts: tuple[str, ...]
    together: bool = False

    def __post_init__(self) -> None:
        assert self.parts and self.seconds >= 0, self

    @property
    def least_seconds(self) -> float:
        return self.seconds or LEAST_REST


STEPS = (
    Step(FIRST, 25, "versions, driver, link, memory, compiler; every module of the engine", ("machine",)),
    Step(1, 25, "self-check; page-locked memory read by a kernel", ("locked",)),
    Step(2, 90, "every kernel against its reference at the shapes of real models",
         ("kernels", "more-kernels", "tables"), together=True),
    Step(3, 80, "four layers of Qwen3.6 recorded, replayed, broken off; of Qwen3, whose step is fused",
         ("recorded", "fused")),
    Step(4, 40, "the embedded model's chat as on the processor", ("chat",)),
    Step(5, 20, "cost of a node and of a fork", ("nodes",)),
    Step(6, 50, "bandwidth of fill by size, burst and blocks", ("fill",)),
    Step(7, 110, "the whole Qwen3.6-35B under 11 GiB", ("whole",)),
    Step(8, 60, "four layers of gpt-oss past their window", ("gpt-oss",)),
    Step(9, 40, "six layers of Gemma past their window", ("gemma",)),
    Step(10, REST, "the tests for a card; 28 multiprocessors alone", ("tests", "small-chip")),
)
# `--fake`: the same parent, children that do what children do on a bad day (engine/bench/first_light/bad_day.py).
FAKES = (
    Step(FIRST, 60, "says which card it is", ("card",)),
    Step(1, 60, "fails", ("fail",)),
    Step(2, 5, "hangs", ("hang",)),
    Step(3, 60, "crashes", ("crash",)),
    Step(4, 60, "prints garbage", ("garbage",)),
    Step(5, 60, "prints without end", ("endless", "endless-errors"), together=True),
    Step(6, 60, "says nothing", ("nothing",)),
    Step(7, 60, "leaves a process behind", ("orphan",)),
    Step(8, 10**6, "does not fit", ("work",)),
    Step(9, REST, "works", ("work",)),
)


def chosen(steps: tuple[Step, ...], numbers: list[int] | None) -> list[Step]:
    """In their order. UserError for a number that is none of theirs."""
    if numbers is None:
        return list(steps)
    known = {step.number for step in steps}
    if wrong := sorted(set(numbers) - known):
        raise UserError(f"There is no step {wrong[0]}; choose from 0 to {max(known)}, such as --steps 2,3.")
    return [step for step in steps if step.number in numbers]
