"""Policies by name: `predict=next:1,evict=hobbit,admit=third,route=near:0.1:1,fidelity=score:0.6:0.95`.

What is not named is the engine's own: the next router's guess, recency, the router's experts, the level's fidelity.
`free=layer` frees slots when a layer lacks them, instead of keeping some free for the token to come, which is what
fetching ahead needs. Numbers stand behind colons. Only `route` and `fidelity` change what is computed.
"""
from __future__ import annotations

from dataclasses import dataclass

from engine.core import UserError
from engine.policies.residency import RULES

# name -> its numbers' defaults; None: it has to be given
PREDICTORS = {"none": (), "next": (1,), "repeat": (), "popularity": (32.0,), "profile": (1,), "maps": (),
              "maps-semantic": (), "maps-trajectory": (), "learned": (), "sequence": ()}
ADMISSIONS = {"always": (), "third": ()}
FREES = {"token": (), "layer": ()}
ROUTES = {"exact": (), "near": (None, 1), "drop": (None,), "skip": (None,), "near-only": ()}
FIDELITIES = {"exact": (), "score": (None, None), "bits": (None,)}
KINDS = {"predict": PREDICTORS, "evict": dict.fromkeys(RULES, ()), "admit": ADMISSIONS, "free": FREES, "route": ROUTES,
         "fidelity": FIDELITIES}


@dataclass(frozen=True)
class Named:
    """A policy and its numbers."""

    name: str
    numbers: tuple[float, ...] = ()

    @property
    def parts(self) -> tuple[str, tuple[float, ...]]:
        return self.name, self.numbers

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{number:g}" for number in self.numbers)])


@dataclass(frozen=True)
class Choice:
    """One of each kind. text: as it was asked for."""

    predict: Named = Named("next", (1,))
    evict: Named = Named("recency")
    admit: Named = Named("always")
    free: Named = Named("token")
    route: Named = Named("exact")
    fidelity: Named = Named("exact")
    text: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether the output is the model's own, to the bit."""
        return self.route.name == self.fidelity.name == "exact"


def parse(text: str) -> Choice:
    """UserError in one sentence for what there is not."""
    found: dict[str, Named] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, is_there, rest = part.partition("=")
        if not is_there or kind not in KINDS:
            raise UserError(f"{part!r} is no policy; write KIND=NAME with one of {', '.join(KINDS)}.")
        found[kind] = _named(kind, rest)
    return Choice(**found, text=text)


def _named(kind: str, text: str) -> Named:
    name, *numbers = text.split(":")
    known = KINDS[kind]
    if name not in known:
        raise UserError(f"There is no {kind} policy {name!r}; choose one of {', '.join(known)}.")
    defaults = known[name]
    try:
        given = [float(number) for number in numbers]
    except ValueError:
        raise UserError(f"{text!r}: behind a colon stands a number.") from None
    if len(given) > len(defaults) or None in defaults[len(given):]:
        example = ":".join([name, *"N" * len(defaults)])
        raise UserError(f"{kind}={name} takes {len(defaults)} numbers, as {kind}={example}.")
    return Named(name, (*given, *defaults[len(given):]))
