"""`evidence FOLDER`: every policy on one model at three sizes of near memory, as a page with plots."""
from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from engine.cli import check_out, on_processor, report
from engine.core import Options, UserError
from engine.paths import typed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=typed, metavar="FOLDER", help="a compressed chat model")
    parser.add_argument("--out", type=typed, required=True, metavar="FILE", help="the .md file; plots lie beside it")
    parser.add_argument("--train", type=int, default=5000, metavar="N", help="tokens to learn from (5000)")
    parser.add_argument("--test", type=int, default=1200, metavar="N", help="tokens to measure on (1200)")
    parser.add_argument("--live", type=int, default=400, metavar="N", help="tokens with each policy live (400)")


def run(args: argparse.Namespace) -> dict:
    if args.train < 64 or min(args.test, args.live) < 16:
        raise UserError("--train must be at least 64, --test and --live at least 16.")
    device, out = on_processor(args.device, "evidence"), check_out(Path(args.out))
    from engine.files.manifest import Manifest
    from engine.model import load
    from engine.quality.evidence.gather import gather
    from engine.quality.evidence.report import bars, costs, page, scatter

    Manifest.load(Path(args.folder))
    loaded = load.load(args.folder, Options("exact", device=device), report)
    sizes = "".join(f" --{name} {value}" for name, value, usual in (
        ("train", args.train, 5000), ("test", args.test, 1200), ("live", args.live, 400)) if value != usual)
    command = f"python -m engine evidence {args.folder} --out {args.out}{sizes}"
    try:
        found = gather(loaded, args.folder, command, args.train, args.test, args.live, report)
    finally:
        loaded.runtime.close()
    chosen = [row.name for row in next(iter(found.replayed.values())) if row.name != "Belady's optimum"]
    plots = {f"{out.stem}-gap.svg": bars(found.replayed, chosen), f"{out.stem}-cost.svg": scatter(found.live)}
    for name, drawn in plots.items():
        (out.parent / name).write_text(drawn, encoding="utf-8")
    out.write_text(page(found, list(plots)), encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(costs(found), indent=1) + "\n", encoding="utf-8")
    for line in found.judged:
        report(f"{'holds' if line.holds else 'does NOT hold'}: {line.asked}: {line.found}")
    return {"judged": [asdict(line) for line in found.judged],
            "replayed": {f"{share:.2f}": [row.document() for row in rows] for share, rows in found.replayed.items()},
            "live": {f"{share:.2f}": [asdict(row) for row in rows] for share, rows in found.live.items()}}
