"""plan MODEL: does it fit, at which level, how fast. For a folder, a catalogue name (no network), a Hub id or
address."""
from __future__ import annotations

import argparse

from engine.cli import report
from engine.core import LEVELS, Machine
from engine.library import catalogue
from engine.library.recommend import this_machine, with_benchmarks
from engine.machine import table
from engine.planning import explain
from engine.planning.plan import PlanRequest
from engine.planning.planner import plan
from engine.units import parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL",
                        help="a folder, a name of the catalogue, or a Hub id (owner/name) or address")
    parser.add_argument("--machine", metavar="M", help="a machine of the table, e.g. rtx-3060-12gb (default: this one)")
    parser.add_argument("--ram", type=parse_bytes, metavar="SIZE", help="main memory (32GiB with --machine)")
    parser.add_argument("--vram", type=parse_bytes, metavar="SIZE", help="video memory, e.g. 11GiB")
    parser.add_argument("--link", type=parse_bytes, metavar="SPEED", help="memory to card, e.g. 12.4GB/s")
    parser.add_argument("--context", type=int, metavar="N", help="tokens (default 8192 or the model's, if less)")
    parser.add_argument("--speed", type=float, default=10.0, metavar="TOK/S", help="wished tokens per second (10)")
    parser.add_argument("--level", choices=LEVELS, help="default: the best that reaches the speed")


def run(args: argparse.Namespace) -> dict:
    known = catalogue.look_up(args.model, args.data)
    wishes = PlanRequest(level=args.level, context=args.context, speed=args.speed, trunk_bits=known.trunk_bits,
                    group_size=known.group_size, on_disk=known.compressed and known.folder is not None)
    made = plan(known.spec, _machine(args), wishes, known.calibration)
    report(explain.plan_text(made))
    return explain.document(made)


def _machine(args: argparse.Namespace) -> Machine:
    sizes = {"ram": args.ram, "vram": args.vram, "link": args.link}
    if args.machine:
        return table.described(args.machine, **sizes)
    machine, found = this_machine(args.data, args.device)
    for note in found.notes:
        report(note)
    return table.overridden(with_benchmarks(machine, args.data), **sizes)
