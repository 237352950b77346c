"""How much near memory a model gets when it is opened: the plan of its level on this machine, as it was before.

The machine is looked at once, before the weights are read: later its free memory has already been spent on them.
No torch.
"""
from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from engine.core import Machine, ModelSpec, Options
from engine.machine import detect
from engine.planning.plan import Plan, Wishes
from engine.planning.planner import CUDA_CONTEXT_BYTES, plan


@dataclass(frozen=True)
class Room:
    """One open model, and the machine as it was before. trunk_bits, group_size: as stored; calibration: floe.json's."""

    spec: ModelSpec
    machine: Machine
    trunk_bits: int = 16
    group_size: int | None = None
    calibration: Mapping = field(default_factory=dict)

    def plan(self, level: str, options: Options | None = None) -> Plan:
        """UserError for a context that the model cannot read."""
        options = options or Options()
        wishes = Wishes(level, options.context, near_bytes=options.near_bytes, chunk=options.chunk,
                        trunk_bits=self.trunk_bits, group_size=self.group_size, on_disk=True)
        return plan(self.spec, self.machine, wishes, self.calibration or None)

    def near_bytes(self, level: str, options: Options | None = None) -> int:
        """What the user wishes, else what the plan gives the level."""
        if options is not None and options.near_bytes is not None:
            return options.near_bytes
        return self.plan(level, options).near_bytes


def own_bytes() -> int:
    """Memory that this process has for itself, without the files that are mapped into it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss


def own_vram_bytes() -> int:
    """Video memory that this process holds, the driver's context included."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return torch.cuda.memory_reserved() + CUDA_CONTEXT_BYTES


def return_freed() -> None:
    """Give system and card what has been freed: glibc keeps it (550 MB beside a trunk of 550 MB were seen), and so does
    torch's allocator with a card's, which the driver then calls used."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a card that was lost
            torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library, which decides for itself


def machine_for(device: str, folder: Path) -> Machine:
    """This machine for a model on `device` ("cpu" asks no driver). UserError without a usable card for "cuda"."""
    found = detect.survey(folder) if device == "cuda" else detect.without_cards(folder)
    return detect.machine(found, device)
