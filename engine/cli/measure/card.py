"""`card fill|nodes|kernels|step`: what a graphics card does with our kernels, one row a case, appended to a table."""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from engine.cli import report
from engine.core import LEVELS
from engine.paths import typed
from engine.units import parse_bytes

FOLDER = Path("tests") / "bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("fill", "nodes", "kernels", "step"), help="bandwidth of fill, cost of a "
                        "graph's nodes, score and apply alone, capture and replay of a synthetic model's step")
    parser.add_argument("--total", metavar="SIZE", default="256MiB", help="fill: page-locked memory (256MiB to 24GiB)")
    parser.add_argument("--small-pages", action="store_true", help="fill: pages of 4 KiB")
    parser.add_argument("--model", default="qwen3.6-35b-a3b", help="kernels, step: a name of the catalogue")
    parser.add_argument("--layers", type=int, help="step: only its first layers")
    parser.add_argument("--level", choices=LEVELS[1:], default="fast", help="step")
    parser.add_argument("--near-bytes", metavar="SIZE", help="step: near memory")
    parser.add_argument("--vram", metavar="SIZE", help="step: occupy what the card has above this")
    parser.add_argument("--tokens", type=int, default=300, help="step: how many")
    parser.add_argument("--project", metavar="CARD", help="step: what a token would take on this card of the table")
    parser.add_argument("--folder", type=typed, default=FOLDER, help="where the table lies (default: tests/bench)")


def run(args: argparse.Namespace) -> dict:
    from engine.bench import gpu_kernels, step, step_profile, synthetic
    from engine.machine import errors
    total, vram = parse_bytes(args.total), None if args.vram is None else parse_bytes(args.vram)
    near = None if args.near_bytes is None else parse_bytes(args.near_bytes)
    gpu = None if args.project is None else step_profile.gpu_named(args.project)
    case = step.Case(args.model, args.layers, args.level, near, args.tokens, gpu)
    shape = synthetic.shape_named(case.name, case.layers) if args.what in ("kernels", "step") else None
    errors.check()
    speeds = gpu_kernels.speeds()
    held = gpu_kernels.reserve_vram(vram)
    rows = [gpu_kernels.bandwidth_row(speeds)]
    for row in _measured(args, total, case, shape, speeds, 0 if held is None else held.numel()):
        rows.append(row)
        report(gpu_kernels.row_text(row))
    return {"rows": rows, "table": str(gpu_kernels.save(rows, args.folder))}


def _measured(args: argparse.Namespace, total: int, case, shape, speeds, held_bytes: int) -> Iterator[dict]:
    from engine.bench import gpu_kernels, step
    from engine.machine.pinned_memory import CudaDriver
    if args.what == "fill":
        return gpu_kernels.fills(total, args.small_pages)
    if args.what == "nodes":
        return gpu_kernels.nodes()
    if args.what == "kernels":
        return gpu_kernels.single_kernels(shape)
    return step.steps(case, shape, CudaDriver(), speeds, report, held_bytes=held_bytes)
