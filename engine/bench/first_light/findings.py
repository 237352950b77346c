"""What a check found, as a row, and the table of all of them in words: works, slow, wrong, not run. No torch."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.bench.first_light.steps import FIRST, Step
from engine.bench.rows import Row

WIDTH = 62  # characters of what was looked at


@dataclass(frozen=True)
class Finding:
    """what: was looked at; case: with which shapes. at_least, at_most: outside them the figure is too slow."""

    what: str
    works: bool
    figure: float | None = None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    case: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        assert self.what and isinstance(self.works, bool), self

    @property
    def verdict(self) -> str:
        if not self.works:
            return "wrong"
        low, high = self.at_least, self.at_most
        known = self.figure is not None
        return "slow" if known and (low and self.figure < low or high and self.figure > high) else "works"

    def row(self) -> Row:
        """A figure that is no number is none, and said: JSON has no word for it."""
        figure = self.figure if self.figure is None or math.isfinite(self.figure) else None
        note = self.note if figure is self.figure else f"{self.figure} {self.note}".strip()
        wanted = [f"{word} {bound:.4g}" for word, bound in (("at least", self.at_least), ("at most", self.at_most))
                  if bound is not None]
        return {"finding": self.what, "verdict": self.verdict, "figure": figure, "unit": self.unit, "case": self.case,
                "wanted": " and ".join(wanted), "note": note}


def newest(rows: list[Row]) -> list[Row]:
    """Of each step the rows of its last run."""
    last = {row.get("step"): row.get("run") for row in rows}
    return [row for row in rows if row.get("run") == last[row.get("step")]]


def gpu_of(rows: Iterable[Row]) -> Row | None:
    """The newest row that says which card it is."""
    return next((row for row in reversed(list(rows)) if row.get("measured") == "machine" and row.get("gpu")), None)


def table(rows: list[Row], steps: Iterable[Step]) -> list[str]:
    """Lines for people: a verdict, a step, what was looked at, its figure. Rows of `newest`."""
    lines, card = [], gpu_of(rows)
    if card:
        lines.append(f"First light on {card['gpu']}")
    for step in steps:
        mine = [row for row in rows if row.get("step") == step.number]
        for verdict, what, figure in _lines_of(step, mine):
            lines.append(f"{verdict:8} {step.number:>2}  {what:{WIDTH}} {figure}".rstrip())
    return lines


def _lines_of(step: Step, rows: list[Row]) -> Iterator[tuple[str, str, str]]:
    for row in rows:
        if row.get("outcome") == "skipped":
            yield "not run", step.title, str(row["note"])
        elif row.get("outcome") not in (None, "ended"):
            yield "wrong", f"{step.title}: {row['part']}", _ended(row)
    found = [row for row in rows if "verdict" in row]
    for row in found:
        if row["verdict"] != "works":
            yield str(row["verdict"]), _named(row), _figure(row)
    working = [row for row in found if row["verdict"] == "works"]
    for what in dict.fromkeys(row.get("finding") for row in working):
        alike = [row for row in working if row.get("finding") == what]
        yield ("works", _named(alike[0]), _figure(alike[0])) if len(alike) == 1 else (
            "works", f"{what} ({len(alike)} cases)", _range(alike))


def _named(row: Row) -> str:
    return f"{row.get('finding')}, {row['case']}" if row.get("case") else str(row.get("finding"))


def _figure(row: Row) -> str:
    figure = "" if row.get("figure") is None else f"{row['figure']:.4g} {row.get('unit', '')}"
    wanted = f"wanted {row['wanted']}" if row.get("wanted") else ""
    return ", ".join(filter(None, (figure.strip(), wanted, row.get("note"))))


def _range(rows: list[Row]) -> str:
    figures = [row["figure"] for row in rows if row.get("figure") is not None]
    if not figures:
        return ""
    return f"{min(figures):.4g} to {max(figures):.4g} {rows[0].get('unit', '')}".strip()


def _ended(row: Row) -> str:
    why = f" ({row['signal']})" if row.get("signal") else f" (exit {row['exit']})" if row.get("exit") else ""
    return f"{row['outcome']}{why} after {row['seconds']} s of {row['limit']:g}" + (
        f", {row['note']}" if row.get("note") else "")


def no_card(rows: Iterable[Row]) -> str:
    """The sentence with which the first step said that no card can be used, "" where it said nothing of the kind."""
    return next((str(row["no_card"]) for row in rows if row.get("step") == FIRST and row.get("no_card")), "")
