"""`eval FOLDER`: perplexity, KL, agreement, far bytes and hit rate of levels, against a reference."""
from __future__ import annotations

import argparse

from engine.cli import progress_line, report
from engine.core import LEVELS, Options, UserError
from engine.paths import typed
from engine.units import parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=typed, metavar="FOLDER", help="a compressed model or an uncompressed checkpoint")
    parser.add_argument("--levels", metavar="A,B", help="default: all that the folder offers")
    parser.add_argument("--reference", type=typed, metavar="SOURCE",
                        help="model folder (default: FOLDER at its best level)")
    parser.add_argument("--text", type=typed, metavar="FILE", help="text, or conversations as .jsonl; also .xz "
                        "(default: a small text of our own)")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="tokens to predict (4096)")
    parser.add_argument("--near", default="all", metavar="SIZE", help="near memory: all, sketches, or a size (all)")


def run(args: argparse.Namespace) -> dict:
    wished = levels_of(args.levels)
    near = args.near if args.near in ("all", "sketches") else parse_bytes(args.near)
    if args.tokens < 1:
        raise UserError("--tokens must be at least 1.")
    from engine.model import load
    from engine.quality import evaluate
    from engine.quality.texts import EVALUATION_TEXT, read_tokens

    loaded = load.load(args.folder, Options(level="exact", device=args.device, predict=False), report)
    reference = args.reference and load.load(args.reference, Options(level="exact", device=args.device, predict=False))
    documents = read_tokens(args.text or EVALUATION_TEXT, loaded.tokenizer, args.tokens, evaluate.longest(loaded))
    try:
        found = evaluate.evaluate(loaded, documents, wished or list(loaded.runtime.levels), near, reference,
                                  lambda done, total: progress_line(f"{done}/{total} documents"))
    finally:
        progress_line()
    report(f"{found.tokens:,} tokens, reference perplexity {found.reference_perplexity:.4f}\n"
           "level     perplexity      KL   top-1   far bytes/token   hits")
    for row in found.levels:
        report(f"{row.level:9}{row.perplexity:11.4f}{row.kl:8.4f}{row.top1_agreement:8.1%}"
               f"{row.far_bytes_per_token:18,.0f}{row.hit_rate:7.1%}")
    return found.document()


def levels_of(text: str | None) -> list[str]:
    """The levels of `--levels`, without repeats. UserError for one that does not exist."""
    names = list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    for name in names:
        if name not in LEVELS:
            raise UserError(f"There is no level {name!r}; choose from {', '.join(LEVELS)}.")
    return names

