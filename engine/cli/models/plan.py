"""plan MODEL: does it fit, at which level, how fast. For a folder, a catalogue name (no network) or a Hub id."""
from __future__ import annotations

import argparse
import sys

from engine.core import LEVELS, Machine
from engine.library import catalogue
from engine.machine import benchmark, detect, table
from engine.paths import data_dir, models_dirs
from engine.planning import explain
from engine.planning.plan import PlanRequest
from engine.planning.planner import plan
from engine.units import parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a name of the catalogue, or a Hub id (owner/name)")
    parser.add_argument("--machine", metavar="M", help="a machine of the table, e.g. rtx-3060-12gb (default: this one)")
    parser.add_argument("--ram", metavar="SIZE", help="main memory, e.g. 32GiB (the default with --machine)")
    parser.add_argument("--vram", metavar="SIZE", help="video memory, e.g. 11GiB")
    parser.add_argument("--link", metavar="SPEED", help="memory to card, e.g. 12.4GB/s")
    parser.add_argument("--context", type=int, metavar="N", help="tokens (default 8192 or the model's, if less)")
    parser.add_argument("--speed", type=float, default=10.0, metavar="TOK/S", help="wished tokens per second (10)")
    parser.add_argument("--level", choices=LEVELS, help="default: the best that reaches the speed")


def run(args: argparse.Namespace) -> dict:
    known = catalogue.look_up(args.model, args.data)
    wishes = PlanRequest(level=args.level, context=args.context, speed=args.speed, trunk_bits=known.trunk_bits,
                    group_size=known.group_size, on_disk=known.compressed and known.folder is not None)
    made = plan(known.spec, _machine(args), wishes, known.calibration)
    print(explain.plan_text(made), file=sys.stderr)
    return explain.document(made)


def _machine(args: argparse.Namespace) -> Machine:
    sizes = {name: None if getattr(args, name) is None else parse_bytes(getattr(args, name))
             for name in ("ram", "vram", "link")}
    if args.machine:
        return table.described(args.machine, **sizes)
    data = data_dir(args.data)
    found = detect.survey(models_dirs(data)[0])
    for note in found.notes:
        print(note, file=sys.stderr)
    here = benchmark.with_rates(detect.machine(found, args.device), data / "cache")
    return table.overridden(here, **sizes)
