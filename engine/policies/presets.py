"""Three ways to treat experts that are not near, by the names that a person chooses between, and what the evidence
(`python -m engine evidence`) found that they cost."""
from __future__ import annotations

import json
from dataclasses import dataclass

from engine.paths import demo_model
from engine.policies.choice import parse, refusal

PRESETS = {"lossless": "", "prefer_cached": "route=near:0.2:1", "cached_only": "route=near-only"}
COSTS = demo_model().parent / "docs" / "policies.json"  # which `evidence` writes beside its page


@dataclass(frozen=True)
class Cost:
    """Against the exact model with as much near memory. near_share: of all whole experts; perplexity: change as a
    fraction; kl: nats a token; moved: fetched bytes as a fraction."""

    near_share: float
    perplexity: float
    kl: float
    moved: float


def preset_of(policies: str) -> str:
    """The name of a choice, itself where it has none."""
    return next((name for name, text in PRESETS.items() if text == policies), policies)


def why_not(preset: str, level: str, device: str) -> str:
    """A sentence where a model at this level, on this device ("cpu", "cuda"), cannot run so; else ""."""
    return refusal(parse(PRESETS[preset]), level, device)


def measured_costs(model: str, near_share: float) -> dict[str, Cost]:
    """What each lossy preset costs a model at the size of near memory next to the wished one; empty where it was not
    measured. model: the name of its numbers."""
    stored = json.loads(COSTS.read_text(encoding="utf-8"))
    if stored["model"] != model:
        return {}
    found = {}
    for name, rows in stored["presets"].items():
        costs = [Cost(**row) for row in rows]
        found[name] = min(costs, key=lambda cost: abs(cost.near_share - near_share))
    return found
