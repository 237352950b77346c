"""delete NAME: remove a model from the data folder, or what an unfinished download has left."""
from __future__ import annotations

import argparse

from engine.cli import report
from engine.library.installed import delete
from engine.units import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="as `models` shows it")


def run(args: argparse.Namespace) -> dict:
    freed = delete(args.name, args.data)
    report(f"{args.name} is gone, {size(freed)} freed.")
    return {"name": args.name, "freed_bytes": freed}
