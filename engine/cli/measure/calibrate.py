"""`calibrate FOLDER`: what each level may leave out, measured and stored in the folder."""
from __future__ import annotations

import argparse
from pathlib import Path

from engine.cli import report, report_layers
from engine.core import UserError
from engine.paths import typed
from engine.quality.texts import CALIBRATION_TEXT, CALIBRATION_TOKENS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=typed, help="compressed folder")
    parser.add_argument("--text", type=typed, action="append", help="text to calibrate on, may be given several times: "
                        "every level keeps its promise on each (.txt or .jsonl chats, also .xz)")
    parser.add_argument("--tokens", type=int, default=CALIBRATION_TOKENS,
                        help="tokens of all texts together (default %(default)s)")
    parser.add_argument("--reference", type=typed, help="uncompressed checkpoint that KL is measured against")
    parser.add_argument("--original", metavar="CHECKPOINT", help="what the folder was made from (a folder, a GGUF "
                        "file, a Hub id): first make codes of it that err less on the texts, where an answer "
                        "feels it; minutes on a card, hours on a processor")
    parser.add_argument("--like", default="", help="folder with the configuration that belongs to a GGUF file")


def run(args: argparse.Namespace) -> dict:
    if args.tokens < 1:
        raise UserError("--tokens must be at least 1.")
    from engine.quality.calibrate import calibrate

    texts = args.text or [CALIBRATION_TEXT]
    if args.original:
        _requantize(args, tuple(texts))
    found = calibrate(args.folder, texts, args.tokens, args.reference, args.device, report)
    for level, measured in found["levels"].items():
        report(f"{level:9} perplexity {measured['perplexity']:.3f}  KL {measured['kl']:.4f}")
    return found


def _requantize(args: argparse.Namespace, texts: tuple[Path, ...]) -> None:
    from engine.library.requantize import Text, requantize
    requantize(args.folder, args.original, Text(texts, args.tokens), args.device, args.like, report_layers)
