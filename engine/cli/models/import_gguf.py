"""import_gguf FILE DEST: a GGUF file to a compressed folder, and what quantising its weights a second time costs."""
from __future__ import annotations

import argparse

from engine.cli import report, report_layers
from engine.paths import typed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=typed, help="GGUF file (of several parts: any of them)")
    parser.add_argument("dest", type=typed, help="folder to make")
    parser.add_argument("--like", default="", metavar="ORIGINAL",
                        help="folder or Hub id with config.json and the tokenizer of the original model "
                             "(default: the folder of the file, else the file itself where it "
                             "says all of both)")
    parser.add_argument("--trunk-bits", type=int, choices=(16, 8, 4), default=16, help="bits outside the experts")


def run(args: argparse.Namespace) -> dict:
    from engine.library.gguf_import import import_gguf
    made = import_gguf(args.file, args.dest, args.like, args.trunk_bits, args.device, report_layers)
    report(f"{args.dest} is ready. Calibrate it next: python -m engine calibrate {args.dest}")
    return {"folder": str(args.dest), "bytes": sum(entry.bytes for entry in made.manifest.files),
            "layers": made.manifest.layers, "experts_stored_as": list(made.kinds), "added_error": made.added_error}
