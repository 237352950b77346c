"""`specialise FOLDER DEST`: a compressed folder to a smaller one with fewer experts, for texts of one kind."""
from __future__ import annotations

import argparse

from engine.cli import on_processor, report
from engine.paths import typed
from engine.policies.usage import SCORES

WAYS = "mask: the others are left out; merge: they are averaged into those that stay; search: evolution chooses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=typed, metavar="FOLDER", help="a compressed model")
    parser.add_argument("dest", type=typed, metavar="DEST", help="folder to make")
    parser.add_argument("--text", type=typed, required=True, metavar="FILE",
                        help="texts of the kind it is for (.txt or .jsonl chats, also .xz); a quarter is kept back")
    parser.add_argument("--keep", type=float, default=0.5, metavar="SHARE", help="of each layer's experts (0.5)")
    parser.add_argument("--way", choices=("mask", "merge", "search"), default="mask", help=f"default mask. {WAYS}")
    parser.add_argument("--score", choices=SCORES, default="reap", help="what the experts that stay are chosen by: how "
                        "often they are taken, with what weight, or weight x norm of output (default reap)")
    parser.add_argument("--rounds", type=int, default=120, metavar="N", help="of a search (120)")
    parser.add_argument("--tokens", type=int, default=16_384, metavar="N", help="to read of each text (16384)")
    parser.add_argument("--general", type=typed, metavar="FILE",
                        help="other texts, to say what is lost there (default: those of ours)")


def run(args: argparse.Namespace) -> dict:
    on_processor(args.device, "specialise")
    from engine.model.load import check_folder
    from engine.quality.specialists.make import NOTE, Choice, specialise
    from engine.quality.texts import EVALUATION_TEXT

    check_folder(args.folder)
    choice = Choice(args.text, args.general or EVALUATION_TEXT, args.keep, args.way, args.score, args.rounds,
                    args.tokens)
    manifest = specialise(args.folder, args.dest, choice, lambda progress: report(progress.text))
    found, n_bytes = manifest.calibration[NOTE], sum(entry.bytes for entry in manifest.files)
    report(f"{args.dest}: {manifest.experts} of {found['experts']} experts a layer, {n_bytes:,} bytes. Perplexity on "
           f"its kind {found['held_out_before']:.3f} -> {found['held_out']:.3f}, on other texts "
           f"{found['general_before']:.3f} -> {found['general']:.3f}. Calibrate it next: python -m engine calibrate "
           f"{args.dest}")
    return {"folder": str(args.dest), "bytes": n_bytes, **found}
