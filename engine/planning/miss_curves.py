"""How sparse a model may run and how often what it needs is near: budgets per level, miss rates by near size.

Numbers come from a folder's calibration (floe.json) where there is one, and otherwise from what was measured on the
embedded model, which is said wherever they are used. Every miss curve only falls as
slots are added, whatever noise was in the measurement: the planner rests on that. Pure numbers, no torch.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from engine.core import ModelSpec, UserError
from kernels.layout import Layout

# Bytes of records taken from a layer's k*I neurons, as a share of all of them in full (one byte budget, half of it
# spent on refined neurons, half on twice as many that get only their down row). `floe` refines all it keeps.
ASSUMED_SHARES = {"quality": 0.50, "balanced": 0.40, "fast": 0.25, "floe": 0.40}
# Share of objects near -> miss rate, one global LRU, the small model's own generations.
ASSUMED_EXPERT_CURVE = ((0.0, 1.0), (0.125, 0.62), (0.25, 0.39), (0.5, 0.11), (0.75, 0.02), (1.0, 0.0))
ASSUMED_RECORD_CURVE = ((0.0, 1.0), (0.125, 0.49), (0.25, 0.19), (0.5, 0.04), (0.75, 0.01), (1.0, 0.0))


@dataclass(frozen=True)
class MissCurve:
    """Miss rate 0..1 by number of slots, linear between the points and never rising."""

    points: tuple[tuple[float, float], ...]

    @staticmethod
    def of(points: Iterable[Iterable[float]]) -> MissCurve:
        """From measured [[slots, miss rate], ...] in any order; UserError when that is not what they are."""
        try:
            pairs = sorted((float(slots), float(rate)) for slots, rate in points)
        except (TypeError, ValueError) as error:
            raise UserError("The calibration holds a damaged miss curve; run calibrate again.") from error
        falling, lowest = [(0.0, 1.0)], 1.0
        for slots, rate in pairs:
            lowest = min(lowest, max(0.0, rate))
            falling.append((slots, lowest))
        return MissCurve(tuple(falling))

    def scaled(self, total: int) -> MissCurve:
        """The same curve with shares of `total` objects turned into slots."""
        return MissCurve(tuple((share * total, rate) for share, rate in self.points))

    def __call__(self, slots: float) -> float:
        at = bisect_left(self._slots, slots)
        if at == 0:
            return self.points[0][1]
        if at == len(self.points):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[at - 1], self.points[at]
        return y0 if x1 == x0 else y0 + (y1 - y0) * (slots - x0) / (x1 - x0)

    @cached_property
    def _slots(self) -> tuple[float, ...]:
        return tuple(slots for slots, _ in self.points)


@dataclass(frozen=True)
class Budget:
    """Neurons per token over all layers: refined ones, and those that get their down row only. layer_most: of both
    together, the most that one layer asks for."""

    refined: float
    down_only: float
    layer_most: float


@dataclass(frozen=True)
class Sparsity:
    """Budgets and miss curves of one model. layer_most: as a budget's, of all levels that share a card's near memory,
    which are all but `floe`. measured: they come from its own calibration."""

    budgets: Mapping[str, Budget]
    curves: Mapping[str, MissCurve]
    layer_most: int
    measured: bool = False

    def miss_rate(self, kind: str, level: str, slots: float) -> float:
        """kind: "blob", "sketch" or "record"."""
        name = f"record:{level}" if kind == "record" else kind
        curve = self.curves.get(name) or self.curves.get("record") or self.curves["blob"]
        return curve(slots)


def assumed(spec: ModelSpec, layout: Layout) -> Sparsity:
    """Budgets and curves for a model that has not been calibrated."""
    experts = MissCurve(ASSUMED_EXPERT_CURVE).scaled(spec.n_experts_total)
    records = MissCurve(ASSUMED_RECORD_CURVE).scaled(spec.n_experts_total * spec.neurons)
    budgets = {level: _assumed_budget(spec, layout, level, share) for level, share in ASSUMED_SHARES.items()}
    most = max(budget.layer_most for level, budget in budgets.items() if level != "floe")
    return Sparsity(budgets, {"blob": experts, "sketch": experts, "record": records}, ceil(most))


def _assumed_budget(spec: ModelSpec, layout: Layout, level: str, share: float) -> Budget:
    neurons = spec.picks * spec.neurons
    refined = share * neurons * (1.0 if level == "floe" else 0.5)
    as_many = 0.5 * share * neurons * layout.record / layout.prefix
    down_only = 0.0 if level == "floe" else min(neurons - refined, as_many)
    return Budget(spec.layers * refined, spec.layers * down_only, refined + down_only)


def calibrated(calibration: Mapping, spec: ModelSpec, layout: Layout) -> Sparsity:
    """From floe.json's "calibration": {"levels": {level: {"budgets": [[refined, down_only], per layer]}},
    "miss_curves": {"blob" | "sketch" | "record:<level>": [[slots, miss rate], ...]}}. What is missing is assumed."""
    base = assumed(spec, layout)
    budgets, most = dict(base.budgets), []
    for level, entry in (calibration.get("levels") or {}).items():
        pairs = entry.get("budgets") if isinstance(entry, Mapping) else None
        if pairs:
            budgets[level] = Budget(sum(p[0] for p in pairs), sum(p[1] for p in pairs), max(map(sum, pairs)))
            most.append(budgets[level].layer_most)
    curves = dict(base.curves)
    for name, points in (calibration.get("miss_curves") or {}).items():
        if points:
            curves[name] = MissCurve.of(points)
    return Sparsity(budgets, curves, max(most, default=base.layer_most), measured=bool(calibration.get("levels")))
