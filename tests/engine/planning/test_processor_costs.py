"""What the plan says of a processor's functions is what the newest rows of tests/bench/cpu.csv say."""
from __future__ import annotations

import csv
from statistics import mean

import pytest

from engine.planning.cost_model import CPU_SHARES


def test_shares_are_those_of_the_rows(repository) -> None:
    """Of both kinds of instructions the last row of each function, over that of `dense`."""
    found: dict[str, dict[str, float]] = {}
    with (repository / "tests" / "bench" / "cpu.csv").open(newline="") as file:
        for line in csv.reader(file):
            row = dict(cell.partition("=")[::2] for cell in line)
            found.setdefault(row["instructions"], {})[row["name"]] = float(row["gb_per_second"])
    assert len(found) == 2
    for name, share in CPU_SHARES.items():
        assert share == pytest.approx(mean(rows[name] / rows["dense"] for rows in found.values()), abs=0.01), name
