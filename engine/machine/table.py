"""Machines that are only described: rows of assets/machines.toml as the planner's Machine, and other sizes for any.

Here, too, is what the numbers of a card mean: what of its bandwidth is reached, what a PCIe lane carries.
"""
from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path

from engine.core import Machine, UserError

MIN_CAPABILITY = (7, 5)
GIB = 2**30
# Of the printed memory bandwidth a matrix-vector kernel reaches about this share (317 of 360 GB/s on an RTX 3060).
REACHED_BANDWIDTH = 0.88
# What crosses one PCIe lane in practice, bytes per second by generation (16 lanes: 12.4, 25.2 and 51 GB/s).
LANE_BYTES_PER_SECOND = {1: 0.2e9, 2: 0.39e9, 3: 0.775e9, 4: 1.575e9, 5: 3.19e9, 6: 6.3e9}
# 16-bit matrix operations per byte of memory bandwidth, where a card's own figure is not in the table (RTX 3060: 71).
FLOPS_PER_BYTE = 71
TABLE = Path(__file__).resolve().parents[2] / "assets" / "machines.toml"
DEFAULT_RAM = 32 * GIB
SYSTEM_RAM = 3 * GIB       # what an idle desktop keeps of a machine that is only described
SYSTEM_VRAM = GIB // 2     # and of its card


def capability_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")) if re.fullmatch(r"\d+\.\d+", text) else (0, 0)


@cache
def rows() -> dict[str, dict]:
    """The rows of assets/machines.toml by their short names."""
    with open(TABLE, "rb") as file:
        return tomllib.load(file)


def described(name: str, ram: int | None = None, vram: int | None = None, link: float | None = None,
              disk_free: int | None = None) -> Machine:
    """A machine of the table, for instance "rtx-3060-12gb", with 32 GiB of RAM unless said otherwise. UserError."""
    row = rows().get(name.lower())
    if row is None:
        near = [known for known in rows() if name.lower() in known] or difflib.get_close_matches(name.lower(), rows())
        raise UserError(f"There is no machine {name!r} in the table; choose one of {', '.join(near or rows())}.")
    common = {**_of_ram(DEFAULT_RAM), "disk_free_bytes": 10**12 if disk_free is None else disk_free}
    old = capability_of(row.get("compute_capability", "")) < MIN_CAPABILITY
    return overridden(_without_card(row, common) if old else _with_card(row, common), ram, vram, link)


def _of_ram(total: int) -> dict[str, int]:
    return {"ram_total_bytes": total, "ram_free_bytes": max(0, total - SYSTEM_RAM),
            "pinned_limit_bytes": max(0, total - 2 * GIB)}


def _with_card(row: dict, common: dict) -> Machine:
    total, lane = int(row["vram_gib"] * GIB), LANE_BYTES_PER_SECOND[row["pcie_generation"]]
    return Machine(name=row["name"], device="cuda", **common, vram_total_bytes=total,
                   vram_free_bytes=max(0, total - SYSTEM_VRAM),
                   vram_bytes_per_second=REACHED_BANDWIDTH * row["memory_gb_per_second"] * 1e9,
                   link_bytes_per_second=lane * row["pcie_width"], compute_capability=row["compute_capability"],
                   flops_per_second=row["tflops"] * 1e12)


def _without_card(row: dict, common: dict) -> Machine:
    """A row of the table that runs on its processor; beside a card that is too old, an ordinary one."""
    name, speeds, capability = row["name"], row, row.get("compute_capability", "")
    if capability:
        name, speeds = f"{name} (not used: compute capability {capability}, and 7.5 is the least)", rows()["cpu-ddr4"]
    return Machine(name=name, **common, copy_bytes_per_second=speeds["copy_gb_per_second"] * 1e9,
                   gemv_bytes_per_second=speeds["gemv_gb_per_second"] * 1e9,
                   operation_seconds=speeds["operation_microseconds"] * 1e-6,
                   packed_bytes_per_second=speeds["packed_gb_per_second"] * 1e9,
                   expert_flops_per_second=speeds["expert_tflops"] * 1e12,
                   flops_per_second=speeds["tflops"] * 1e12, compute_capability=capability)


def overridden(base: Machine, ram: int | None = None, vram: int | None = None, link: float | None = None) -> Machine:
    """The same machine with other sizes: what `--ram`, `--vram` and `--link` ask for. UserError where that cannot
    be."""
    if base.device == "cpu" and (vram, link) != (None, None):
        raise UserError(f"{base.name} is planned without a card; leave out the size of its memory and its link.")
    if link is not None and link <= 0:
        raise UserError("The link between memory and card must be more than nothing; write it like 12.4GB/s.")
    changes: dict = {} if ram is None else _of_ram(ram)
    if vram is not None:
        changes |= {"vram_total_bytes": vram, "vram_free_bytes": max(0, vram - SYSTEM_VRAM)}
    if link is not None:
        changes["link_bytes_per_second"] = float(link)
    return replace(base, **changes)
