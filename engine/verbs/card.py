"""`card fill|nodes|step`: what a graphics card does with our kernels, one row a case, appended to a table."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.spec import LEVELS
from engine.units import parse_bytes

FOLDER = Path("tests") / "bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("fill", "nodes", "step"), help="bandwidth of fill, cost of a graph's nodes, "
                        "capture and replay of a synthetic model's step")
    parser.add_argument("--total", metavar="SIZE", default="256MiB", help="fill: page-locked memory (256MiB to 24GiB)")
    parser.add_argument("--model", default="qwen3.6-35b-a3b", help="step: a name of the catalogue")
    parser.add_argument("--layers", type=int, help="step: only its first layers")
    parser.add_argument("--level", choices=LEVELS[1:], default="fast", help="step")
    parser.add_argument("--near-bytes", metavar="SIZE", help="step: near memory")
    parser.add_argument("--vram", metavar="SIZE", help="step: occupy what the card has above this")
    parser.add_argument("--tokens", type=int, default=300, help="step: how many")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the table lies (default: tests/bench)")


def run(args: argparse.Namespace) -> dict:
    from engine import card_bench, card_errors, card_step
    from engine.host_memory import CudaDriver
    total = parse_bytes(args.total)
    near = None if args.near_bytes is None else parse_bytes(args.near_bytes)
    case = card_step.Case(args.model, args.layers, args.level, near, args.tokens)
    shape = case.shape() if args.what == "step" else None
    vram = None if args.vram is None else parse_bytes(args.vram)
    card_errors.check()
    held = card_bench.occupied(vram)
    if args.what == "fill":
        found = card_bench.fills(total)
    else:
        found = card_bench.nodes() if args.what == "nodes" else card_step.steps(case, shape, CudaDriver(), _say)
    rows = []
    for row in found:
        rows.append(row)
        _say("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                       for key, value in row.items()))
    del held
    return {"rows": rows, "table": str(card_bench.save(rows, args.folder))}


def _say(text: str, share: float = 1.0) -> None:
    print(text, file=sys.stderr)
