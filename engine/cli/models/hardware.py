"""hardware [--json]: the cards, the memory and how fast bytes move here."""
from __future__ import annotations

import argparse

from engine.cli import report
from engine.machine import benchmark, detect
from engine.paths import data_dir, models_dirs
from engine.units import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refresh", action="store_true", help="measure again instead of using the cached speeds")


def run(args: argparse.Namespace) -> dict:
    data = data_dir(args.data)
    found = detect.survey(models_dirs(data)[0])
    machine = benchmark.with_rates(detect.machine(found, args.device), data / "cache", args.refresh)
    for line in _tell(found, machine):
        report(line)
    return found.document(machine.copy_bytes_per_second)


def _tell(found: detect.Hardware, machine) -> list[str]:
    lines = [f"{g.name}: compute capability {g.compute_capability}, {size(g.vram_free_bytes)} of "
             f"{size(g.vram_total_bytes)} free, PCIe {g.pcie_generation} x{g.pcie_width} now, {g.pcie_generation_max} "
             f"x{g.pcie_width_max} at most, driver {g.driver}" for g in found.gpus]
    lines.append(f"Memory: {size(found.ram_free_bytes)} of {size(found.ram_total_bytes)} free, "
                 f"{size(found.pinned_limit_bytes)} may be page-locked. Disk: {size(found.disk_free_bytes)} free.")
    where = "to the card" if machine.device == "cuda" else "within memory"
    if machine.copy_bytes_per_second:
        lines.append(f"Measured copy {where}: {size(machine.copy_bytes_per_second)}/s.")
    return lines + list(found.notes)
