"""`compress SOURCE DEST`: a checkpoint folder to a compressed folder."""
from __future__ import annotations

import argparse

from engine.cli import report, report_layers
from engine.core import UserError
from engine.files.chat_parts import check_chat_parts
from engine.library.transfer import TOKENS
from engine.paths import typed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=typed, help="checkpoint folder (safetensors)")
    parser.add_argument("dest", type=typed, help="folder to make")
    parser.add_argument("--group-size", type=int, choices=(64, 128), help="default: 128 where it divides hidden")
    parser.add_argument("--trunk-bits", type=int, choices=(16, 8, 4), default=16, help="bits outside the experts")
    parser.add_argument("--text", type=typed, action="append", default=[], help="fit the codes to texts of this "
                        "kind, so that answers lose less at the same size (.txt or .jsonl chats, also .xz); may be "
                        "given several times; takes several times as long, and the disk holds the result twice "
                        "meanwhile")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of all texts together (default %(default)s)")


def run(args: argparse.Namespace) -> dict:
    from engine.library.compress import Text, compress
    if (args.source / "config.json").is_file():  # what is no model is refused below
        try:
            check_chat_parts(args.source)
        except (UserError, OSError) as error:
            report(f"Beforehand: {error}")
    manifest = compress(args.source, args.dest, args.group_size, args.trunk_bits, args.device, report_layers,
                        text=Text(tuple(args.text), args.tokens))
    n_bytes = sum(entry.bytes for entry in manifest.files)
    report(f"{args.dest}: {n_bytes:,} bytes. Calibrate it next: python -m engine calibrate {args.dest}")
    return {"folder": str(args.dest), "bytes": n_bytes, "layers": manifest.layers, "group_size": manifest.group_size,
            "trunk_bits": manifest.trunk_bits}
