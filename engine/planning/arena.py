"""How the bytes of near memory are divided: one function, which the plan counts with and the engine's caches are made
by (engine/experts/cache.py). Pure numbers: no torch.

An arena holds rows of sketches and rows of records, or rows of whole experts alone. Some rows of either serve what
finds no slot in a step, the bounce rows; the rest are slots. Three quarters go to sketches until all of them fit; then
they stay, and what is left is for records. Experts that a card cannot fetch by itself have slots for ever, where they
fit.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """rows: of sketches, or of whole experts, `slots` of them slots; the same of records. kept: experts whose every
    part has a slot for ever."""

    rows: int
    slots: int
    record_rows: int = 0
    record_slots: int = 0
    kept: int = 0


@dataclass(frozen=True)
class ArenaSizes:
    """What is to be divided. row_bytes: of a sketch, or of a whole expert. neurons: records of an expert, 0 where whole
    experts are near. bounce, bounce_records: what a step may need at once. kept: experts that should stay for ever."""

    n_experts: int
    row_bytes: int
    bounce: int
    neurons: int = 0
    record_bytes: int = 0
    bounce_records: int = 0
    kept: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.kept <= self.n_experts and 0 < self.row_bytes, self

    @property
    def least_bytes(self) -> int:
        """The least that a step runs in."""
        return self.bounce * self.row_bytes + self.bounce_records * self.record_bytes

    @property
    def keeping_bytes(self) -> int:
        """From here on what should stay does."""
        return self.least_bytes + self.kept * (self.row_bytes + self.neurons * self.record_bytes)

    def resident_bytes(self, kept: int) -> int:
        """From here on every row has a slot."""
        return self.n_experts * self.row_bytes + (self.bounce_records + kept * self.neurons) * self.record_bytes

    def divided(self, near_bytes: int) -> Split:
        """near_bytes: at least `least_bytes`."""
        assert near_bytes >= self.least_bytes, (near_bytes, self.least_bytes)
        kept = self.kept if near_bytes >= self.keeping_bytes else 0
        kept_records = kept * self.neurons
        free = near_bytes - (self.bounce_records + kept_records) * self.record_bytes  # for rows, then for records
        if near_bytes >= self.resident_bytes(kept):
            rows, slots = self.n_experts, self.n_experts
        else:
            free_rows = free // self.row_bytes - kept
            wanted = 3 * (free - kept * self.row_bytes) // 4 // self.row_bytes if self.neurons else free_rows
            rows = kept + max(self.bounce, wanted)
            slots = rows - self.bounce
        if not self.neurons:
            return Split(rows, slots, kept=kept)
        records = min((self.n_experts - kept) * self.neurons, (free - rows * self.row_bytes) // self.record_bytes)
        return Split(rows, slots, records + kept_records + self.bounce_records, records + kept_records, kept)

    def bytes_of(self, split: Split) -> int:
        return split.rows * self.row_bytes + split.record_rows * self.record_bytes

    def sizes_worth_trying(self, most: int) -> list[int]:
        """`most`, and where just less than something else would be kept may miss less, that."""
        steps = {self.keeping_bytes, self.resident_bytes(0), self.resident_bytes(self.kept)}
        return [most, *(step - 1 for step in sorted(steps) if self.least_bytes < step <= most)]
