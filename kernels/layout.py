"""Where every byte of a compressed expert lies. Pure integers: the planner and the file format read it without torch.

One expert is one blob: all sketch rows, then all records. A neuron owns one row of each.

  sketch row   gate codes 2 bit | up codes 2 bit | gate scale,offset per group | up scale,offset per group (float16)
  record       down codes 4 bit | down scale,offset | gate and up scale,offset | gate refine | up refine | pad

A *prefix* of a record, up to and including the scales of down, is a valid lower fidelity (down row with the sketch's
values of gate and up). Records are multiples of 128 bytes, so one miss is a few whole cache lines.
Words are int32, little endian. Element e of a 16-element word of 2-bit codes sits at bit 8*(e % 4) + 2*(e // 4), so
that `(word >> 2*s) & 0x03030303` holds elements 4s..4s+3, one a byte: a four-way int8 dot product takes them as they
are. 4-bit words (8 elements) likewise: bit 8*(e % 4) + 4*(e // 4).
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

ALIGN = 128          # bytes; a record never shares a cache line with its neighbour
SECTOR = 32          # bytes; the least a card reads across PCIe, so a prefix need not end at a whole line
HIDDEN_MULTIPLE = 256


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def default_group_size(hidden: int) -> int:
    """128 where it divides the hidden size, else 64. ValueError when neither does."""
    for group in (128, 64):
        if hidden % group == 0:
            return group
    raise ValueError(f"hidden size {hidden} is not a multiple of 64; this model cannot be compressed.")


@dataclass(frozen=True)
class Layout:
    """Byte layout of one expert with `neurons` intermediate channels over `hidden`, quantised in groups of `group`."""

    hidden: int
    neurons: int
    group: int

    def __post_init__(self) -> None:
        if self.group not in (64, 128) or self.hidden % self.group:
            raise ValueError(f"group size {self.group} does not divide hidden size {self.hidden}; use 64 or 128.")
        assert self.neurons > 0, self.neurons

    @cached_property
    def padded(self) -> int:
        """Hidden size rounded up to a multiple of 256: codes of the padding are zero and meet a zero activation."""
        return _round_up(self.hidden, HIDDEN_MULTIPLE)

    @cached_property
    def groups(self) -> int:
        return self.padded // self.group

    @cached_property
    def plane2(self) -> int:
        """Bytes of one row of 2-bit codes."""
        return self.padded // 4

    @cached_property
    def plane4(self) -> int:
        """Bytes of one row of 4-bit codes."""
        return self.padded // 2

    @cached_property
    def scales(self) -> int:
        """Bytes of the float16 (scale, offset) pairs of one row."""
        return 4 * self.groups

    # --- sketch row -------------------------------------------------------------------------------------------
    @cached_property
    def sketch_row(self) -> int:
        return _round_up(2 * self.plane2 + 2 * self.scales, 16)

    @cached_property
    def sketch_scales_at(self) -> int:
        return 2 * self.plane2

    # --- record -----------------------------------------------------------------------------------------------
    @cached_property
    def record_scales_at(self) -> int:
        """Scales of down, gate, up in that order."""
        return self.plane4

    @cached_property
    def refine_at(self) -> int:
        """Refinement of gate, then of up. 16-byte aligned for wide loads."""
        return _round_up(self.plane4 + 3 * self.scales, 16)

    @cached_property
    def record(self) -> int:
        return _round_up(self.refine_at + 2 * self.plane2, ALIGN)

    @cached_property
    def prefix(self) -> int:
        return _round_up(self.plane4 + self.scales, SECTOR)

    # --- whole expert -----------------------------------------------------------------------------------------
    @cached_property
    def sketch_bytes(self) -> int:
        """All sketch rows of one expert, padded so that the records behind it stay aligned."""
        return _round_up(self.neurons * self.sketch_row, ALIGN)

    @cached_property
    def records_bytes(self) -> int:
        return self.neurons * self.record

    @cached_property
    def blob_bytes(self) -> int:
        return self.sketch_bytes + self.records_bytes
