"""`python -m engine VERB`: one module a verb in engine/cli/, loaded only when it is asked for.

A verb module offers `add_arguments(parser)` and `run(args) -> dict | None`; what it returns is the JSON document of
`--json`. Prose and progress go to standard error. Exit 0 done, 2 user error, 3 machine error.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from engine.core import MachineError, UserError
from engine.paths import data_path, typed
from engine.plain_process import begin_process

GROUPS = {
    "models": {
        "hardware": "what this machine offers: cards, memory, measured copy speed",
        "plan": "does a model fit, at which level, how fast",
        "download": "fetch a model; goes on after a stop",
        "models": "what the data folder holds",
        "delete": "remove a model from the data folder",
        "compress": "make a compressed model folder from a checkpoint",
        "specialise": "a smaller model with fewer experts, for texts of one kind",
        "import_gguf": "make a compressed model folder from a GGUF file",
        "publish": "upload a finished folder with a model card",
    },
    "chat": {
        "chat": "talk to a model in the terminal",
    },
    "measure": {
        "calibrate": "measure what each level may leave out, and store it in the folder",
        "eval": "perplexity, KL, bytes and hit rate of levels",
        "trace": "what the routers say while the model answers, for simulate and fit-predictor",
        "usage": "how much each expert is used, as a heat-map and a list of what to pin",
        "simulate": "a trace replayed under policies: hits, bytes, recall, without the model",
        "fit-predictor": "train predictors of experts on a trace",
        "evidence": "every policy on one model, as a page with plots",
        "bench": "tokens per second and what bounds them",
        "synth": "a model of real shape with made-up weights, to measure speed with",
        "gpu": "what a graphics card does: first-light is everything in nine minutes",
        "tables": "the tables of the design: masks and quantisers compared on one checkpoint",
    },
}
VERBS = {verb: text for verbs in GROUPS.values() for verb, text in verbs.items()}


def usage() -> str:
    """The verbs in their groups, as `--help` shows them."""
    groups = [f"{group}\n" + "\n".join(f"  {verb:13} {text}" for verb, text in verbs.items())
              for group, verbs in GROUPS.items()]
    return "\n\n".join(["usage: python -m engine VERB ...", *groups])


def module_of(verb: str) -> ModuleType:
    """engine/cli/GROUP/VERB.py, loaded when it is asked for."""
    group = next(group for group, verbs in GROUPS.items() if verb in verbs)
    return import_module(f"engine.cli.{group}.{verb.replace('-', '_')}")


def build_parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m engine {verb}", description=VERBS[verb])
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output, nothing else")
    parser.add_argument("--data", type=typed, metavar="DIR",
                        help="data folder (default: FLOECHAT_HOME, else the platform's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when it works")
    module_of(verb).add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the exit code. Wrong words on the command line end in argparse's SystemExit(2)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in VERBS:
        print(f"There is no verb {argv[0]!r}; choose one of {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    try:
        args = build_parser(argv[0]).parse_args(argv[1:])
        if args.data:
            os.environ["FLOECHAT_HOME"] = str(args.data)  # for whoever asks for it by itself: which Hub, which hosts
        _keep_compiled(data_path() / "cache")
        document = module_of(argv[0]).run(args)
    except (UserError, MachineError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 3
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error)
    if args.json:
        print(json.dumps(document))
    return 0


def _keep_compiled(cache: Path) -> None:
    """What is compiled for this processor and this card goes where the application has it too, if that is there."""
    if cache.is_dir():
        os.environ.setdefault("NUMBA_CACHE_DIR", str(cache / "numba"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))


def _failed(error: Exception) -> int:
    """A machine's error in one sentence; what is a mistake of this program keeps its traceback."""
    from engine.machine.errors import in_words  # loads torch; wrong arguments need not wait for it

    words = in_words(error)
    if words is None:
        raise error
    print(words, file=sys.stderr)
    return 3


if __name__ == "__main__":
    begin_process("engine")
    sys.exit(main())
