"""`python -m engine.bench.first_light.child PART`: one part of a step, one JSON row a line as soon as it is known.

Loads torch only where the part needs it. Exit 3 where no card can be used; any other mistake is a traceback.
"""
from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module

from engine.bench.first_light import bad_day
from engine.bench.rows import Row, say
from engine.core import MachineError

# By the name in `steps`: a module of this package and its function.
PARTS = {"machine": ("machine", "machine"), "locked": ("machine", "locked"), "kernels": ("kernel_checks", "kernels"),
         "more-kernels": ("kernel_checks", "more_kernels"), "tables": ("table_checks", "tables"),
         "recorded": ("decode_checks", "recorded"), "fused": ("decode_checks", "fused"),
         "chat": ("chat_checks", "chat"), "nodes": ("speed_checks", "nodes"),
         "fill": ("speed_checks", "fill"), "whole": ("decode_checks", "whole"), "gpt-oss": ("decode_checks", "gpt_oss"),
         "gemma": ("decode_checks", "gemma"), "tests": ("card_tests", "tests"),
         "small-chip": ("speed_checks", "small_chip")}


def main(name: str) -> int:
    faulthandler.enable()
    with suppress(ImportError, OSError, ValueError):
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))    # a crash leaves rows, not gigabytes
    try:
        for row in _part(name)():
            say(row)
    except MachineError as error:
        say({"no_card": str(error)})
        return 3
    return 0


def _part(name: str) -> Callable[[], Iterable[Row]]:
    """The function that makes its rows; a module that does not import takes no other part along."""
    if name in bad_day.PARTS:
        return bad_day.PARTS[name]
    module, function = PARTS[name]
    return getattr(import_module(f"engine.bench.first_light.{module}"), function)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
