"""What a person could run on this machine: every model of the catalogue with its plan, and why the card is (not) used.

Numbers only and no network; the survey of the machine takes a moment, so callers keep what they get. Speeds count as
measured once `measured` has run on this machine; it alone loads torch.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from engine.core import Machine, UserError
from engine.library import catalogue
from engine.machine import benchmark, detect
from engine.machine.process_memory import own_bytes, own_vram_bytes
from engine.paths import data_dir, models_dirs
from engine.planning import explain
from engine.planning.plan import Plan, PlanRequest
from engine.planning.planner import plan

PRACTICAL = 1.0  # tokens a second; what is slower answers nobody
VERDICTS = ("fits", "slow", "impractical", "no")  # best to worst


@dataclass(frozen=True)
class Recommendation:
    """One model on this machine. verdict: one of VERDICTS; recommended: the one to begin with; missing: what
    a machine lacks that cannot run it, in words, and what would help."""

    name: str
    title: str
    about: str
    licence: str
    good_for: tuple[str, ...]
    repository: str
    download_bytes: int
    disk_bytes: int
    verdict: str
    tokens_per_second: float
    missing: str = ""
    recommended: bool = False


def this_machine(data: str | Path | None = None, device: str | None = None) -> tuple[Machine, detect.Hardware]:
    """This machine for the planner, and what was found on it with the sentences about it (`notes`)."""
    # What is open in this process is closed before anything else is opened.
    found = detect.survey(models_dirs(data)[0], own_bytes=own_bytes(), own_vram_bytes=own_vram_bytes())
    detect.choose_card(found)
    return benchmark.with_cached(detect.machine(found, device), data_dir(data) / "cache"), found


def with_benchmarks(machine: Machine, data: str | Path | None = None) -> Machine:
    """The machine with its speeds: half a second the first time, then from the cache."""
    return benchmark.with_rates(machine, data_dir(data) / "cache")


def verdict_of(made: Plan) -> str:
    """One of VERDICTS: of what runs, `impractical` is what writes less than a token a second."""
    slow = made.verdict == "slow" and made.decode_tokens_per_second < PRACTICAL
    return "impractical" if slow else made.verdict


def plan_for(known: catalogue.ModelInfo, machine: Machine, level: str | None = None, context: int | None = None,
             near_bytes: int | None = None) -> Plan:
    """The plan of one model at what a person chooses; None lets the plan decide. UserError where that cannot be.

    A checkpoint on the disk runs as it is, at `full`. near_bytes: a ceiling for near memory.
    """
    if known.folder is not None and not known.compressed:
        level = "full"
    wishes = PlanRequest(level=level, context=context, near_bytes=near_bytes, trunk_bits=known.trunk_bits,
                         group_size=known.group_size, on_disk=known.folder is not None)
    return plan(known.spec, machine, wishes, known.calibration)


def recommendations(machine: Machine) -> list[Recommendation]:
    """The catalogue on this machine. The first is recommended, unless none is practical: the best known that fits, else
    the fastest. Then what fits, then by expected speed."""
    known = [_outlook(entry, machine) for entry in catalogue.entries().values()]
    rows = sorted(known, key=lambda row: (VERDICTS.index(row.verdict), -row.tokens_per_second))
    first = next((row for row in known if row.verdict == "fits"), rows[0] if rows else None)
    good = first is not None and first.verdict in ("fits", "slow")
    rows.sort(key=lambda row: row is not first)
    return [replace(row, recommended=good and row is first) for row in rows]


def _outlook(entry: catalogue.Entry, machine: Machine) -> Recommendation:
    missing = ""
    try:
        made = plan(entry.spec, machine)
        numbers = verdict_of(made), made.decode_tokens_per_second, made.disk_bytes
        missing = explain.missing(made)
    except UserError as error:
        numbers = "no", 0.0, 0
        missing = str(error)
    verdict, speed, disk_bytes = numbers
    return Recommendation(entry.name, entry.title, entry.about, entry.licence, entry.good_for, entry.repository,
                          entry.original_bytes, disk_bytes, verdict, speed, missing)
