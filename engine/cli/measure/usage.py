"""`usage FOLDER --text FILE`: how much each expert of a model is used, as a heat-map and a list of what to pin."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

from engine.cli import check_out, on_processor, report
from engine.core import UserError
from engine.paths import typed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=typed, metavar="FOLDER",
                        help="a compressed model, with --text; or a trace, which holds no outputs and so no `reap`")
    parser.add_argument("--text", type=typed, metavar="FILE", help="texts to read (.txt or .jsonl chats, also .xz)")
    parser.add_argument("--tokens", type=int, default=16_384, metavar="N", help="to read of it (16384)")
    parser.add_argument("--out", type=typed, metavar="FILE", help="the .svg file to draw; the numbers lie beside it")


def run(args: argparse.Namespace) -> dict:
    if args.source.is_dir() == (args.text is None):
        raise UserError("Give a compressed model's folder with --text FILE, or a trace alone.")
    if args.tokens < 1:
        raise UserError("--tokens must be at least 1.")
    on_processor(args.device, "usage")
    out = check_out(Path(args.out)) if args.out else None
    from engine.policies.trace import load_trace
    from engine.policies.usage import of_trace
    from engine.quality.specialists.heat_map import heat_map

    usage = _read(args.source, args.text, args.tokens) if args.text else of_trace(load_trace(args.source))
    document = usage.document()
    if out:
        out.write_text(heat_map(usage), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    unused = int((usage.hard == 0).sum())
    report(f"{usage.tokens:,} tokens; a quarter of the experts answers {usage.coverage(0.25):.0%} of all picks, half "
           f"{usage.coverage(0.5):.0%}; {unused:,} of {usage.hard.size:,} were never taken")
    return document


def _read(folder: Path, text: Path, n_tokens: int):
    from engine.model.load import check_folder, load_tokenizer
    from engine.quality.specialists.examples import Counting, batches_of, loss
    from engine.quality.specialists.mixed_model import Source

    check_folder(folder)
    counting = Counting(Source(folder))
    loss(counting, batches_of(text, load_tokenizer(folder), n_tokens))
    return counting.usage()
