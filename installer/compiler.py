"""A C compiler for Triton where the computer has none: the ziglang wheel, behind a small script that is called like cc.

At its first use on a card Triton builds one small C file against Python.h. On Windows its package brings a compiler.
"""
from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from installer import environment
from installer.screen import Screen


def add_compiler(made: environment.Environment, backend: str, pins: Path, app: Path, screen: Screen) -> str | None:
    """The path of the compiler that was added, or None where none is needed."""
    if backend == "cpu" or not sys.platform.startswith("linux"):
        return None
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        screen.say("This Python has no Python.h, which the graphics card's kernels need: install python3-dev and start "
                   "with --repair.")
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    environment.install(made, ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r",
                               str(pins / "compiler.lock")], app, screen)
    return str(write_wrapper(made))


def write_wrapper(made: environment.Environment) -> Path:
    """A script in the environment that takes cc's arguments."""
    script = made.folder / "bin" / "zig-cc"
    script.write_text('#!/bin/sh\nexec "${0%/*}/python" -m ziglang cc "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script
