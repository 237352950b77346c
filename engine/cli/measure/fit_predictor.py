"""`fit-predictor FOLDER TRACE`: the learned predictors of experts, trained on a recorded run."""
from __future__ import annotations

import argparse
from pathlib import Path

from engine.cli import check_out, progress_line, report
from engine.core import UserError
from engine.paths import typed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=typed, metavar="FOLDER", help="the model of the trace")
    parser.add_argument("trace", type=typed, metavar="TRACE", help="a file that `trace --inputs` wrote")
    parser.add_argument("--out", type=typed, required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="passes over the trace (20)")
    parser.add_argument("--held-out", type=float, default=0.2, metavar="SHARE",
                        help="of the answers, the last ones: what recall is measured on (0.2)")


def run(args: argparse.Namespace) -> dict:
    if args.epochs < 1 or not 0 < args.held_out < 1:
        raise UserError("--epochs must be at least 1, --held-out between 0 and 1.")
    out = check_out(Path(args.out))
    from engine.files.manifest import Manifest
    from engine.policies.learned import fit, save_predictors
    from engine.policies.trace import load_trace
    from engine.quality.simulate import recalls

    trace, manifest = load_trace(Path(args.trace)), Manifest.load(Path(args.folder))
    run, hidden = trace.run, trace.embedding.shape[1]
    if (run.layers, run.experts, hidden) != (manifest.layers, manifest.experts, manifest.hidden):
        raise UserError(f"{args.trace} was recorded with another model than {args.folder}.")
    held_out = trace.of_answers(1 - args.held_out, 1)
    if not held_out.decode.any():
        raise UserError(f"{args.trace} holds too few answers to keep some apart; record more.")
    made = fit(trace.of_answers(0, 1 - args.held_out), args.epochs,
               lambda name, share: progress_line(f"{name}: {share:.0%}"))
    progress_line()
    save_predictors(out, made, run.layers, run.experts, hidden)
    found = recalls(held_out, ("popularity", "repeat", "next", *made), made)
    for name, (once, twice, thrice) in found.items():
        report(f"{name:12} recall on held-out answers, of k / 2k / 3k guesses: {once:.1%} / {twice:.1%} / {thrice:.1%}")
    return {"recall": found, "held_out_tokens": int(held_out.decode.sum())}

