"""What a token that was measured on one card would take on another: pure arithmetic, no torch.

The bytes that the token needs go over the other card's bandwidths; what the measured time has left beside its own
bytes (launches, arithmetic, waiting) is taken over as it is. Nothing overlaps: that is how a step runs today.
"""
from __future__ import annotations

from dataclasses import dataclass

from engine.core import Machine, UserError
from engine.machine import detect

Row = dict[str, object]


@dataclass(frozen=True)
class Speeds:
    """Bytes per second that a card reaches: of its own memory, and of a copy from page-locked memory."""

    vram: float
    link: float

    def __post_init__(self) -> None:
        assert self.vram > 0 and self.link > 0, self


@dataclass(frozen=True)
class Needs:
    """Of one token: bytes of the card's own memory, bytes over the link, seconds that it took."""

    vram_bytes: float
    link_bytes: float
    seconds: float

    def memory_seconds(self, speeds: Speeds) -> float:
        """The least that the bytes alone take, one after the other."""
        return self.vram_bytes / speeds.vram + self.link_bytes / speeds.link

    def outside_seconds(self, here: Speeds) -> float:
        """What was measured beside the bytes; none where the bytes, some of them cached, took less than they should."""
        return max(0.0, self.seconds - self.memory_seconds(here))


def card(name: str) -> Machine:
    """The card of assets/machines.toml. UserError for a name that is not there, or is no card that could run this."""
    found = detect.described(name)
    if found.device != "cuda":
        raise UserError(f"{found.name} is no card that runs this; choose another name, such as rtx-3060-12gb.")
    return found


def projected(needs: Needs, here: Speeds, there: Machine) -> Row:
    """The token on the card `there`, measured `here`. bound: its bytes alone."""
    speeds = Speeds(there.vram_bytes_per_second, there.link_bytes_per_second)
    memory, outside = needs.memory_seconds(speeds), needs.outside_seconds(here)
    return {"measured": "projection", "card": there.name, "vram_bytes": int(needs.vram_bytes),
            "link_bytes": int(needs.link_bytes), "vram_ms": 1e3 * needs.vram_bytes / speeds.vram,
            "link_ms": 1e3 * needs.link_bytes / speeds.link, "outside_ms": 1e3 * outside,
            "tokens_per_second": 1 / (memory + outside), "bound_tokens_per_second": 1 / memory}
