"""`trace FOLDER`: what the routers say while the model answers, as a file for `simulate` and `fit-predictor`."""
from __future__ import annotations

import argparse
from pathlib import Path

from engine.cli import check_out, on_processor, progress_line, report
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
    device, out = on_processor(args.device, "trace"), check_out(Path(args.out))
    from engine.files.manifest import is_compressed
    from engine.model import load
    from engine.quality.recorder import Recorder, record

    load.check_folder(Path(args.folder))
    if not is_compressed(Path(args.folder)):
        raise UserError(f"{args.folder} is an uncompressed checkpoint; compress it first.")
    options = Options(level=args.level, near_bytes=args.near, device=device)
    loaded = load.load(args.folder, options, report)
    recorder = Recorder(loaded, args.horizon, args.inputs)
    try:
        record(loaded, args.prompts, recorder, args.tokens, args.most,
               lambda answers, tokens: progress_line(f"{answers} answers, {tokens} tokens"))
        trace = recorder.trace(Path(args.folder).name)
    finally:
        progress_line()
        loaded.runtime.close()
    trace.save(out)
    size = out.stat().st_size
    report(f"{len(trace):,} tokens, {int(trace.decode.sum()):,} of them written one a step, in {size:,} bytes")
    return {"tokens": len(trace), "decode_tokens": int(trace.decode.sum()), "bytes": size, "level": trace.run.level}

