"""Policies by name: `predict=next:1,evict=hobbit,admit=third,route=near:0.1:1,fidelity=score:0.6:0.95`.

What is not named is the engine's own: the next router's guess, recency, the router's experts, the level's fidelity.
`free=layer` frees slots when a layer lacks them, instead of keeping some free for the token to come, which is what
fetching ahead needs. `miss=place` computes what is not admitted where far memory has it, instead of copying it, on a
processor (DAOP); `miss=beside` lets the processor compute part of what a graphics card lacks, whole experts or single
neurons, as much as measured rates say (DAOP, APTMoE). Numbers stand behind colons. Only `route` and `fidelity` change
what is computed; `miss=beside` changes its last bits.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import inf

from engine.core import SPARSE_LEVELS, UserError
from engine.policies.residency import RULES


@dataclass(frozen=True)
class Number:
    """What may stand behind a colon, from `least` to `most`. usual None: it has to be given."""

    usual: float | None = None
    least: float = 0.0
    most: float = 1.0
    whole: bool = False


SHARE = Number()
PREDICTORS = {"none": (), "next": (Number(1, 0, 3, True),), "repeat": (), "popularity": (Number(32.0, 0, 1e6),),
              "profile": (Number(1, 1, 1e6, True),), "maps": (), "maps-semantic": (), "maps-trajectory": (),
              "learned": (), "sequence": ()}
ADMISSIONS = {"always": (), "third": ()}
FREES = {"token": (), "layer": ()}
MISSES = {"copy": (), "place": (), "beside": ()}
ROUTES = {"exact": (), "near": (Number(most=inf), Number(1, 0, 1e6, True)), "drop": (SHARE,), "skip": (SHARE,),
          "near-only": ()}
FIDELITIES = {"exact": (), "score": (SHARE, SHARE), "bits": (Number(most=32),), "base": ()}
GROWS = "keeps a table that grows with what it has seen, which a graphics card's recorded step cannot hold"
ON_HOST = {  # what acts on the processor only, and why
    **{f"predict={name}": f"predict={name} {GROWS}" for name in PREDICTORS if name.startswith("maps")},
    "predict=sequence": "predict=sequence looks back over a text that grows, which a graphics card's recorded step "
                        "cannot hold",
    "miss=place": "miss=place computes experts where the file's map has them, which a graphics card cannot read "
                  "(miss=beside is its like there)"}
KINDS: dict[str, dict[str, tuple[Number, ...]]] = {
    "predict": PREDICTORS, "evict": dict.fromkeys(RULES, ()), "admit": ADMISSIONS, "free": FREES, "miss": MISSES,
    "route": ROUTES, "fidelity": FIDELITIES}


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
    miss: Named = Named("copy")
    route: Named = Named("exact")
    fidelity: Named = Named("exact")
    text: str = ""

    def __post_init__(self) -> None:
        if self.evict.name == "finemoe" and not self.predict.name.startswith("maps"):
            raise UserError("evict=finemoe orders by the probability that expert maps give; add predict=maps.")
        if self.miss.name == "place" and self.free.name != "layer":
            raise UserError("miss=place copies only what is admitted, for which a layer makes room; add free=layer.")

    @property
    def is_exact(self) -> bool:
        """Whether the output is the model's own, to the bit."""
        return self.route.name == self.fidelity.name == "exact"


def refusal(choice: Choice, level: str, device: str) -> str:
    """Why a model cannot run under a choice, in a sentence; "" where it can."""
    if not choice.text:
        return ""
    why = ON_HOST.get(f"predict={choice.predict.name}") or ON_HOST.get(f"miss={choice.miss.name}")
    if why and device != "cpu":
        return f"{why}; choose another, or --device cpu."
    if level == "full":
        return "An uncompressed checkpoint takes no policies; compress it first."
    if choice.route.name == "near-only" and level in SPARSE_LEVELS:
        return f"Where only what is cached may be used the level has to be exact, not {level}; choose exact."
    if choice.miss.name == "beside" and device == "cpu":
        return "miss=beside lets the processor help a graphics card; where there is none choose miss=place."
    if choice.miss.name == "place" and level in SPARSE_LEVELS:
        return f"Where whole experts are computed in place the level has to be exact, not {level}; choose exact."
    if choice.fidelity.name == "base" and level in SPARSE_LEVELS:
        return f"A base expert stands in for whole ones, so the level has to be exact, not {level}; choose exact."
    return ""


def parse(text: str) -> Choice:
    """UserError in one sentence for what there is not."""
    found: dict[str, Named] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, is_there, rest = part.partition("=")
        if not is_there or kind not in KINDS:
            raise UserError(f"{part!r} is no policy; write KIND=NAME with one of {', '.join(KINDS)}.")
        if kind in found:
            raise UserError(f"{kind} is chosen twice; name one.")
        found[kind] = _named(kind, rest)
    return Choice(**found, text=text)


def _named(kind: str, text: str) -> Named:
    name, *numbers = text.split(":")
    known = KINDS[kind]
    if name not in known:
        raise UserError(f"There is no {kind} policy {name!r}; choose one of {', '.join(known)}.")
    wanted = known[name]
    try:
        given = [float(number) for number in numbers]
    except ValueError:
        raise UserError(f"{text!r}: behind a colon stands a number.") from None
    rest = tuple(number.usual for number in wanted[len(given):])
    if len(given) > len(wanted) or None in rest:
        example = ":".join([name, *"N" * len(wanted)])
        raise UserError(f"{kind}={name} takes {len(wanted)} numbers, as {kind}={example}.")
    for value, number in zip(given, wanted, strict=False):
        if not number.least <= value <= number.most or number.whole and value % 1:
            raise UserError(f"{kind}={text}: {value:g} is not {'a whole number ' if number.whole else ''}from "
                            f"{number.least:g} to {number.most:g}.")
    return Named(name, (*given, *rest))
