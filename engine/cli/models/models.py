"""models: what there is, whole or unfinished; with --keep-in, where new ones go from now on."""
from __future__ import annotations

import argparse

from engine.cli import report
from engine.library import catalogue
from engine.library.installed import Installed, models
from engine.paths import choose_models_dir
from engine.units import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep-in", metavar="FOLDER", help="keep new models there ('': in the data folder); those "
                                                            "that are here already stay where they are")


def run(args: argparse.Namespace) -> dict:
    if args.keep_in is not None:
        report(f"New models are kept in {choose_models_dir(args.keep_in, args.data)}.")
    found = models(args.data)
    for model in found:
        report(_line(model))
    if not found:
        report("No models yet. Get one with python -m engine download MODEL: any Hub id (owner/name), or one of "
              f"{', '.join(catalogue.entries())}.")
    return {"models": [{"name": model.name, "folder": str(model.folder), "kind": model.kind, "bytes": model.bytes,
                        "levels": list(model.levels), "share": model.share, "source": model.source}
                       for model in found]}


def _line(model: Installed) -> str:
    state = f"unfinished, {100 * model.share:.0f} %" if model.kind == "unfinished" else ", ".join(model.levels)
    return f"{model.name:32} {size(model.bytes):>9}  {model.kind:11} {state}"
