"""`trace FOLDER`: what the routers say while the model answers, as a file for `simulate` and `fit-predictor`."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.cli import report
from engine.core import LEVELS, Options, UserError
from engine.paths import typed
from engine.units import parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=typed, metavar="FOLDER", help="a compressed model")
    parser.add_argument("--prompts", type=typed, required=True, metavar="FILE",
                        help="conversations as .jsonl (their questions are asked), or one prompt a line; also .xz")
    parser.add_argument("--out", type=typed, required=True, metavar="TRACE", help="the .npz file to write")
    parser.add_argument("--level", choices=[level for level in LEVELS if level != "full"],
                        help="default: the plan's; a sparse one also records neurons")
    parser.add_argument("--near", type=parse_bytes, metavar="SIZE", help="near memory meanwhile (default: the plan's)")
    parser.add_argument("--tokens", type=int, default=2000, metavar="N", help="tokens to write in all (2000)")
    parser.add_argument("--most", type=int, default=256, metavar="N", help="tokens of one answer at most (256)")
    parser.add_argument("--horizon", type=int, default=1, metavar="N", help="layers that routers look ahead (1)")
    parser.add_argument("--inputs", action="store_true", help="also what every layer is given; learning needs it")


def run(args: argparse.Namespace) -> dict:
    if min(args.tokens, args.most) < 1 or args.horizon < 0:
        raise UserError("--tokens and --most must be at least 1, --horizon at least 0.")
    from engine.files.manifest import is_compressed
    from engine.model import load
    from engine.quality.recorder import Recorder, record

    load.check_folder(Path(args.folder))
    if not is_compressed(Path(args.folder)):
        raise UserError(f"{args.folder} is an uncompressed checkpoint; compress it first.")
    options = Options(level=args.level, near_bytes=args.near, device=args.device)
    loaded = load.load(args.folder, options, report)
    recorder = Recorder(loaded, args.horizon, args.inputs)
    try:
        record(loaded, args.prompts, recorder, args.tokens, args.most, _progress)
        trace = recorder.trace(Path(args.folder).name)
    finally:
        print(file=sys.stderr)  # the line of the progress ends
        loaded.runtime.close()
    trace.save(Path(args.out))
    size = Path(args.out).stat().st_size
    report(f"{len(trace):,} tokens, {int(trace.decode.sum()):,} of them written one a step, in {size:,} bytes")
    return {"tokens": len(trace), "decode_tokens": int(trace.decode.sum()), "bytes": size, "level": trace.run.level}


def _progress(answers: int, tokens: int) -> None:
    print(f"\r{answers} answers, {tokens} tokens", end="", file=sys.stderr, flush=True)
