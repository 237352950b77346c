"""publish FOLDER REPO: upload a finished compressed folder with a generated model card."""
from __future__ import annotations

import argparse

from engine.cli import report
from engine.library.hub import Hub
from engine.paths import typed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=typed, help="compressed folder")
    parser.add_argument("repository", metavar="REPO", help="owner/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="visible to you alone")
    parser.add_argument("--token", help="access token that may write (default: what `hf auth login` stored)")


def run(args: argparse.Namespace) -> dict:
    from engine.library.publish import publish
    address = publish(args.folder, args.repository, Hub.here(args.token), args.private,
                      report)
    report(f"Published: {address}")
    return {"repository": args.repository, "commit": address}
