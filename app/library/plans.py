"""How a model would run on this computer: the plan's words, its pictures and the verdict, for the page."""
from __future__ import annotations

from app.library.machine_status import Surroundings
from engine import LEVELS, ModelInfo, UserError, plan_for, plan_pictures, plan_text, verdict_of


def planned(known: ModelInfo, around: Surroundings, level: str | None = None, context: int | None = None,
            near_bytes: int | None = None) -> dict:
    """At this level, context and near memory, None for the plan's own choice; verdict "no" and the reason in words
    where it would not run. UserError for what is no model that could."""
    levels = [row for row in (levels_of(known) or LEVELS) if row in LEVELS]
    shown = {"levels": levels, "longest": known.spec.context, "level": level, "context": context}
    try:
        made = plan_for(known, around.look()[0], level, context, near_bytes)
    except UserError as error:
        return shown | {"text": str(error), "verdict": "no", "missing": str(error)}
    return shown | {"text": plan_text(made), "verdict": verdict_of(made), "level": made.level, "context": made.context,
                    "tokens_per_second": made.decode_tokens_per_second, "near_bytes": made.near_bytes,
                    "disk_bytes": made.disk_bytes} | plan_pictures(made, known.calibration)


def levels_of(known: ModelInfo) -> tuple[str, ...]:
    """The levels that a folder offers; none for a model that is not here."""
    if known.folder is None:
        return ()
    measured = (level for level in known.calibration.get("levels", {}) if level != "exact")
    return ("exact", *measured) if known.compressed else ("full",)
