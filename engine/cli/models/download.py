"""download MODEL: fetch a model into the data folder; started again after a stop it goes on where it was."""
from __future__ import annotations

import argparse
import sys

from engine.cli import report
from engine.library.download import SOURCES, download
from engine.library.hub import Hub
from engine.library.network import plain_hosts
from engine.library.transfer import CompressOptions
from engine.paths import typed
from engine.progress import Progress
from engine.quality.texts import CALIBRATION_TEXT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name of the catalogue, or a Hub id (owner/name)")
    parser.add_argument("--source", choices=SOURCES, help="default: ready-made if there is one, else the original")
    parser.add_argument("--folder", type=typed, metavar="DIR", help="where to put it (default: the data folder)")
    parser.add_argument("--file", default="", metavar="NAME", help="which GGUF file, where there are several")
    parser.add_argument("--like", default="", metavar="ORIGINAL",
                        help="folder or Hub id with configuration and tokenizer, where a GGUF repository names none")
    parser.add_argument("--token", help="access token of the Hub (default: the one that `hf auth login` stored)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="HOST", help="a host besides the "
                        "Hub's own from which files may come, as a company's store; repeatable (also FLOECHAT_HOSTS)")
    parser.add_argument("--trunk-bits", type=int, choices=(16, 8, 4), help="bits outside the experts (4 on a card, 8)")
    parser.add_argument("--delete-original", action="store_true",
                        help="remove each part of the original once it is compressed (least disk; with --quality it "
                        "is fetched twice)")
    parser.add_argument("--quality", action="store_true", help="make codes that err less, which takes several times as "
                        "long: minutes on a card, hours on a processor")
    parser.add_argument("--text", type=typed, action="append", metavar="FILE", help="what --quality reads (.txt or "
                        ".jsonl chats, also .xz; default: a few chats of ours)")


def run(args: argparse.Namespace) -> dict:
    texts = tuple(args.text or [CALIBRATION_TEXT]) if args.quality or args.text else ()
    choice = CompressOptions(args.trunk_bits, args.device, not args.delete_original, texts)
    hub = Hub.here(args.token, plain_hosts(" ".join(args.allow_host)), args.data)
    try:
        folder = download(args.model, args.source, args.folder, args.data, hub, _tell, None, choice,
                          args.file, args.like)
    except KeyboardInterrupt:
        report("\nWhat has arrived is kept: start again to go on, or delete it.")
        raise
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)      # behind the line that was rewritten
    report(f"{folder} is ready. Talk to it: python -m engine chat {folder}")
    return {"folder": str(folder)}


def _tell(progress: Progress) -> None:
    """One line that is rewritten on a terminal; whole lines, and only news, in a file."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{progress}", end="", file=sys.stderr, flush=True)
    elif progress.text:
        report(str(progress))
