"""Policies made from their names, for a model's numbers: the same for a replayed trace and a running model."""
from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.core import UserError
from engine.policies.choice import Choice, Named
from engine.policies.predict import ExpertMaps, Guesses, NextRouter, Popularity, Predictor, Profile, Repeat
from engine.policies.residency import RULES, Admitted, Residency

LEARNED = ("learned", "sequence")


def guesses_of(named: Named, layers: int, experts: int, top_k: int, hidden: int,
               learned: Mapping[str, Predictor] | None = None) -> Guesses | None:
    """None: nothing is fetched ahead. learned: what was trained on traces, by name. UserError where it is missing."""
    if named.name == "none":
        return None
    if named.name in LEARNED:
        if not learned or named.name not in learned:
            raise UserError(f"The predictor {named.name!r} has to be trained first: python -m engine fit-predictor "
                            "FOLDER TRACE --out FILE, then --learned FILE.")
        return Guesses(learned[named.name], layers, experts, top_k)
    makers = {"next": lambda horizon: NextRouter(layers, int(horizon)),
              "repeat": lambda: Repeat(layers, experts),
              "popularity": lambda half_life: Popularity(layers, experts, half_life),
              "profile": lambda turns: Profile(layers, experts, int(turns)),
              "maps": lambda: ExpertMaps(layers, experts, hidden),
              "maps-semantic": lambda: ExpertMaps(layers, experts, hidden, trajectory=False),
              "maps-trajectory": lambda: ExpertMaps(layers, experts, hidden, semantic=False)}
    return Guesses(makers[named.name](*named.numbers), layers, experts, top_k)


def rule_of(choice: Choice, objects: int, layers: int, device: str | torch.device = "cpu", **given) -> Residency | None:
    """None: recency, as the engine keeps it by itself. given: what the rule takes besides (`chosen`, `shares`)."""
    if choice.evict.name == "recency" and choice.admit.name == "always":
        return None
    rule = RULES[choice.evict.name](objects, layers, device, **given)
    return Admitted(rule) if choice.admit.name == "third" else rule
