"""Names that no model may have on any system, paths that no disk can have, and what a folder holds."""
from __future__ import annotations

from pathlib import Path

BAD_NAMES = ["", ".", "..", "...", ".partial", "..partial", "...partial", "x.partial", "x.PARTIAL", "../models", "/tmp",
             "a/b", "a\\b", "C:", "C:x", "~nosuch/x", "x\ny", "x\0y", "x\x7f", "x\x1b[2J", "x\u2028y", "\ud800", "x.",
             "x ", " x", ".x", "n" * 201, "\u00e4" * 101, "con", "CON", "nul.txt", "com1", "LPT9.floe", "aux .x", "a*b",
             "a?b", 'a"b', "a|b", "<a>"]
BAD_PATHS = ["~nosuch/x", "~nosuch", "/x\ny", "/x\0y", "/" + "n" * 300, "/" + "a/" * 3000, "/\ud800", "/x\u2028y"]


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
