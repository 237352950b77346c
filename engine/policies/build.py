"""Policies made from their names, for a model's numbers: the same for a replayed trace and a running model."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.core import UserError
from engine.policies.choice import Choice
from engine.policies.predict import ExpertMaps, Guesses, NextRouter, Popularity, Predictor, Profile, Repeat
from engine.policies.residency import RULES, Admitted, Residency

LEARNED = ("learned", "sequence")


def guesses_of(choice: Choice, layers: int, experts: int, top_k: int, hidden: int,
               learned: Mapping[str, Predictor] | None = None) -> Guesses | None:
    """None: nothing is fetched ahead. learned: what was trained on traces, by name. UserError where it is missing."""
    named = choice.predict
    if named.name == "none" or choice.route.name == "near-only":
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


def rules_of(choice: Choice, pools: Sequence[tuple[int, str | torch.device]], layers: int, guesses: Guesses | None,
             chosen: Tensor | None = None, shares: Tensor | None = None) -> list[Residency | None]:
    """A rule for each pool (how many objects, on which device): of experts, then of records. None: recency, as the
    engine keeps it by itself. chosen, shares: what `pinned` and `divided` were taught (engine/policies/residency.py);
    both speak of experts, records go by recency then. UserError where one is missing."""
    name = choice.evict.name
    taught = {"pinned": {"chosen": chosen}, "divided": {"shares": shares}}.get(name, {})
    if None in taught.values():
        raise UserError(f"evict={name} needs what another trace teaches; replay it with `simulate --train TRACE`, a "
                        "chat has none.")
    given = {"expected": guesses.predictor.expected} if name == "finemoe" else taught
    rules = [(name, given), ("recency", {}) if taught else (name, given)]
    return [_rule(choice, which, objects, layers, device, known)
            for (objects, device), (which, known) in zip(pools, rules, strict=False)]


def _rule(choice: Choice, name: str, objects: int, layers: int, device: str | torch.device, given: dict,
          ) -> Residency | None:
    if name == "recency" and choice.admit.name == "always":
        return None
    rule = RULES[name](objects, layers, device, **given)
    return Admitted(rule) if choice.admit.name == "third" else rule
