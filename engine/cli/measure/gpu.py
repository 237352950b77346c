"""`gpu first-light|fill|nodes|kernels|step`: what a graphics card does with our kernels, row by row as it is found.

`first-light` is everything at once, in nine minutes, and survives whatever the card does; the others are one
measurement each, appended to a table. `gpu kernels --device cpu` measures the processor's functions.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from engine.cli import report
from engine.core import LEVELS, UserError
from engine.disk import write_text_atomically
from engine.paths import FIRST_LIGHT, data_path, typed
from engine.units import parse_bytes

TABLE = Path("tests") / "bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("first-light", "fill", "nodes", "kernels", "step"), help="everything; or "
                        "bandwidth of fill, cost of a graph's nodes, score and apply alone, capture and replay of a "
                        "synthetic model's step")
    parser.add_argument("--out", type=typed, metavar="DIR", help="first-light: folder for its rows, log and table")
    parser.add_argument("--seconds", type=float, default=540, help="first-light: what does not fit is skipped (540)")
    parser.add_argument("--steps", metavar="N,N", help="first-light: only these, such as 2,3")
    parser.add_argument("--fake", action="store_true", help="first-light: children that fail in every way, no card")
    parser.add_argument("--total", metavar="SIZE", default="256MiB", help="fill: page-locked memory (256MiB to 24GiB)")
    parser.add_argument("--small-pages", action="store_true", help="fill: pages of 4 KiB")
    parser.add_argument("--model", default="qwen3.6-35b-a3b", help="kernels, step: a name of the catalogue")
    parser.add_argument("--layers", type=int, help="step: only its first layers")
    parser.add_argument("--level", choices=LEVELS[1:], default="fast", help="step")
    parser.add_argument("--near-bytes", metavar="SIZE", help="step: near memory")
    parser.add_argument("--vram", metavar="SIZE", help="step: occupy what the card has above this")
    parser.add_argument("--tokens", type=int, default=300, help="step: how many")
    parser.add_argument("--project", metavar="CARD", help="step: what a token would take on this card of the table")
    parser.add_argument("--table", type=typed, metavar="DIR", help="append the rows to DIR/<card>.csv (default: "
                        "tests/bench; first-light: none)")


def run(args: argparse.Namespace) -> dict:
    if args.what == "kernels" and args.device == "cpu":
        return _on_processor(args)
    return _first_light(args) if args.what == "first-light" else _measurement(args)


def _first_light(args: argparse.Namespace) -> dict:
    """Loads no torch: what may crash is in the children."""
    from engine.bench.first_light import parent, steps
    if args.out is None:
        raise UserError("Say with --out DIR where the rows may go.")
    every = steps.FAKES if args.fake else steps.STEPS
    try:
        numbers = [int(word) for word in args.steps.split(",")] if args.steps else None
    except ValueError as error:
        raise UserError(f"--steps takes numbers with commas between them, such as 2,3, not {args.steps!r}.") from error
    wanted = parent.Run(args.out, args.seconds, steps.chosen(every, numbers), args.table)
    lines = parent.run(wanted, every, report)
    report("\n" + "\n".join(lines))
    if (cache := data_path(args.data) / "cache").is_dir():  # the application puts the rows among its diagnostics
        write_text_atomically(cache / FIRST_LIGHT, str(args.out.absolute()))
    return {"folder": str(args.out), "table": lines}


def _on_processor(args: argparse.Namespace) -> dict:
    from engine.bench import cpu_kernels, rows, synthetic
    shape = synthetic.shape_named(args.model)
    table, found = cpu_kernels.processor_table(args.table or TABLE), []
    for row in cpu_kernels.measured(shape):
        table.add(row)
        found.append(row)
        report(rows.text(row))
    return {"rows": found, "table": str(table.path)}


def _measurement(args: argparse.Namespace) -> dict:
    from engine.bench import gpu_kernels, rows, step, step_profile, synthetic
    from engine.machine import errors
    total, vram = parse_bytes(args.total), None if args.vram is None else parse_bytes(args.vram)
    near = None if args.near_bytes is None else parse_bytes(args.near_bytes)
    gpu = None if args.project is None else step_profile.gpu_named(args.project)
    case = step.Case(args.model, args.layers, args.level, near, args.tokens, gpu)
    shape = synthetic.shape_named(case.name, case.layers) if args.what in ("kernels", "step") else None
    errors.check()
    speeds = gpu_kernels.speeds()
    held = gpu_kernels.reserve_vram(vram)
    table, found = gpu_kernels.card_table(args.table or TABLE), []
    for row in _measured(args, total, case, shape, speeds, 0 if held is None else held.numel()):
        table.add(row)
        found.append(row)
        report(rows.text(row))
    return {"rows": found, "table": str(table.path)}


def _measured(args: argparse.Namespace, total: int, case, shape, speeds, held_bytes: int) -> Iterator[dict]:
    from engine.bench import gpu_kernels, single_kernels, step
    from engine.machine.pinned_memory import CudaDriver
    yield gpu_kernels.bandwidth_row(speeds)
    if args.what == "fill":
        yield from gpu_kernels.fills(total, args.small_pages)
    elif args.what == "nodes":
        yield from gpu_kernels.nodes()
    elif args.what == "kernels":
        yield from single_kernels.measured(shape)
    else:
        yield from step.steps(case, shape, CudaDriver(), speeds, report, held_bytes=held_bytes)
