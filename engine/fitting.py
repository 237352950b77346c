"""What a person could run on this machine: every model of the catalogue with its plan, and why the card is (not) used.

Numbers only, no network and no torch; the survey of the machine takes a moment, so callers keep what they get.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine import catalogue, hardware
from engine.paths import data_dir
from engine.plan import Wishes, plan
from engine.spec import Machine, UserError


@dataclass(frozen=True)
class Outlook:
    """One model on this machine. verdict: fits, slow or no; text: the plan in words."""

    name: str
    title: str
    about: str
    licence: str
    good_for: tuple[str, ...]
    repository: str
    download_bytes: int
    disk_bytes: int
    verdict: str
    level: str
    tokens_per_second: float
    text: str


def here(data: str | Path | None = None, device: str | None = None) -> tuple[Machine, tuple[str, ...]]:
    """This machine for the planner, and the sentences about what was found."""
    found = hardware.survey(data_dir(data) / "models")
    return hardware.machine(found, device), found.notes


def outlooks(machine: Machine, wishes: Wishes | None = None) -> list[Outlook]:
    """The catalogue on this machine: what fits first, then by expected speed."""
    rows = [_outlook(entry, machine, wishes) for entry in catalogue.entries().values()]
    order = {"fits": 0, "slow": 1, "no": 2}
    return sorted(rows, key=lambda row: (order[row.verdict], -row.tokens_per_second))


def _outlook(entry: catalogue.Entry, machine: Machine, wishes: Wishes | None) -> Outlook:
    try:
        made = plan(entry.spec, machine, wishes)
        numbers = made.verdict, made.level, made.decode_tokens_per_second, str(made), made.disk_bytes
    except UserError as error:
        numbers = "no", "", 0.0, str(error), 0
    verdict, level, speed, text, disk_bytes = numbers
    return Outlook(entry.name, entry.title, entry.about, entry.licence, entry.good_for, entry.repository,
                   entry.original_bytes, disk_bytes, verdict, level, speed, text)
