"""How a model would run on this computer: the plan's words, its pictures and the verdict, for the page."""
from __future__ import annotations

from dataclasses import asdict

from app.library.machine_status import Surroundings
from engine import (
    LEVELS,
    PRESETS,
    ModelInfo,
    UserError,
    measured_costs,
    plan_for,
    plan_pictures,
    plan_text,
    verdict_of,
    why_not,
)

EXPERT_BYTES = 4.5 / 8  # of a weight as it is stored


def planned(known: ModelInfo, around: Surroundings, level: str | None = None, context: int | None = None,
            near_bytes: int | None = None) -> dict:
    """At this level, context and near memory, None for the plan's own choice; verdict "no" and the reason in words
    where it would not run. UserError for what is no model that could."""
    levels = [row for row in (levels_of(known) or LEVELS) if row in LEVELS]
    shown = {"levels": levels, "longest": known.spec.context, "level": level, "context": context}
    machine = around.look()[0]
    try:
        made = plan_for(known, machine, level, context, near_bytes)
    except UserError as error:
        return shown | {"text": str(error), "verdict": "no", "missing": str(error)}
    return shown | {"text": plan_text(made), "verdict": verdict_of(made), "level": made.level, "context": made.context,
                    "tokens_per_second": made.decode_tokens_per_second, "near_bytes": made.near_bytes,
                    "disk_bytes": made.disk_bytes, "presets": _presets(known, made, machine.device),
                    } | plan_pictures(made, known.calibration)


def _presets(known: ModelInfo, made, device: str) -> list[dict]:
    """Every way to treat experts that are not near: {"name", "why_not", "cost"}, None where unmeasured."""
    near_share = made.near_bytes / (EXPERT_BYTES * known.spec.n_experts_total * known.spec.expert_params)
    costs = measured_costs(known.spec.name, near_share) if made.level == "exact" else {}
    return [{"name": name, "why_not": why_not(name, made.level, device),
             "cost": asdict(costs[name]) if name in costs else None} for name in PRESETS]


def levels_of(known: ModelInfo) -> tuple[str, ...]:
    """The levels that a folder offers; none for a model that is not here."""
    if known.folder is None:
        return ()
    measured = (level for level in known.calibration.get("levels", {}) if level != "exact")
    return ("exact", *measured) if known.compressed else ("full",)
