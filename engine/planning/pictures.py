"""A plan as pictures: what goes into which bar. Numbers under names that the page has words for; sums are the plan's.

Knows no page: a bar is a sequence of (part, bytes or milliseconds), in the order in which it is drawn.
"""
from __future__ import annotations

from collections.abc import Mapping

from engine.core import PROMISES
from engine.planning.explain import binds, missing, programs
from engine.planning.plan import RESTING, Plan

# What the plan's own words for parts of memory come to in a picture; all others are workspace.
_MEMORY = {"trunk": "trunk", "context memory (KV)": "context", "recurrent and window state": "context",
           "side jobs' context memory": "context", RESTING: "context", "reserve": "reserve", "process": "program"}
_ORDER = ("trunk", "context", "workspace", "program", "sketches", "records", "experts", "reserve")

Bar = tuple[tuple[str, float], ...]


def plan_pictures(plan: Plan, calibration: Mapping | None = None) -> dict:
    """What the bars of a plan show, and the sentences beside them.

    video, main: {"parts", "needed", "free"} in bytes, video None without a card. token: parts in milliseconds, none
    where it does not fit. speeds: [{"level", "verdict", "tokens_per_second", "loss", "measured"}], loss of perplexity
    over `exact`, as a fraction: measured where the folder has it (calibration: floe.json's own), else the level's
    promise; None where nothing is promised. binds, missing, programs, advice: sentences, or parts of one.
    """
    near = _memory(plan)
    token = () if plan.verdict == "no" else tuple((name, 1e3 * seconds) for name, seconds in plan.token if seconds > 0)
    main = _main_beside_card(plan) if plan.device == "cuda" else near
    return {"video": _bar(near, plan.near_free_bytes) if plan.device == "cuda" else None,
            "main": _bar(main, plan.ram_free_bytes), "token": [list(part) for part in token],
            "speeds": [_level(*row, calibration or {}) for row in plan.levels], "binds": binds(plan),
            "missing": missing(plan), "programs": programs(plan), "advice": list(plan.advice)}


def _bar(parts: Bar, free: int) -> dict:
    return {"parts": [list(part) for part in parts], "needed": sum(n for _, n in parts), "free": free}


def _memory(plan: Plan) -> Bar:
    """The near side: video memory on a card, main memory without one."""
    sums = dict.fromkeys(_ORDER, 0)
    for name, n_bytes in plan.memory:
        sums[_MEMORY.get(name, "workspace")] += n_bytes
    near = plan.near
    if near.expert_bytes:
        sums["experts"] = near.expert_bytes
    else:
        sums["sketches"], sums["records"] = near.sketch_bytes, near.record_bytes
    return tuple((name, sums[name]) for name in _ORDER if sums[name])


def _main_beside_card(plan: Plan) -> Bar:
    parts = (("locked", plan.pinned_bytes), ("pageable", plan.pageable_bytes),
             ("program", plan.ram_bytes - plan.pinned_bytes - plan.pageable_bytes))
    return tuple(part for part in parts if part[1] > 0)


def _level(level: str, verdict: str, speed: float, calibration: Mapping) -> dict:
    rows = calibration.get("levels") or {}
    exact, own = (rows.get(name, {}).get("perplexity") for name in ("exact", level))
    measured = bool(exact and own)
    loss = own / exact - 1 if measured else 0.0 if level == "exact" else PROMISES.get(level)
    return {"level": level, "verdict": verdict, "tokens_per_second": speed, "loss": loss, "measured": measured}
