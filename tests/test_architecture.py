"""ARCHITECTURE.md tells the truth: its ways go through functions that exist, each asked for by one before it."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
MOST_LINES = 120


def way(title: str) -> list[tuple[int, str, str]]:
    """(number, file, function) of a chapter's numbered steps; a step may name several functions of its file."""
    chapter = TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^(\d+)\. `([\w/]+\.py)` ((?:`[\w.]+`(?:, )?)+):", chapter, re.MULTILINE)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(re.findall(r"^\d", chapter, re.MULTILINE)) + 1))
    return [(int(number), file, name) for number, file, names in steps for name in re.findall(r"`([\w.]+)`", names)]


def function(file: str, name: str) -> ast.AST:
    """The definition of `name` (Class.method or function) in a file of the tree."""
    node: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        node = next(child for child in ast.iter_child_nodes(node) if getattr(child, "name", "") == part)
    return node


def asks_for(node: ast.AST) -> set[str]:
    """Names that a function calls or hands on."""
    return {child.attr if isinstance(child, ast.Attribute) else child.id for child in ast.walk(node)
            if isinstance(child, (ast.Attribute, ast.Name))}


@pytest.mark.parametrize("title, n_steps", [("A prompt's way to a token", 10), ("A checkpoint's way to a folder", 8)])
def test_each_step_is_asked_for_by_one_before_it(title, n_steps):
    steps, asked = way(title), set()
    assert steps[-1][0] == n_steps
    for number, file, name in steps:
        if number > 1 and name != "floe_experts":  # transformers calls that one
            assert name.rpartition(".")[2] in asked, f"{title}, step {number}: nothing before it asks for {name}"
        asked |= asks_for(function(file, name))


def test_transformers_calls_our_experts():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from engine.files.manifest import EXPERTS
    from engine.model.registration import floe_experts
    assert ALL_EXPERTS_FUNCTIONS[EXPERTS] is floe_experts


def test_every_file_that_is_named_exists():
    names = {name for name in re.findall(r"`([\w/]+\.(?:py|md))`", TEXT) if "NAME" not in name}
    assert len(names) > 40
    missing = {name for name in names if not (ROOT / name).exists() and not list(ROOT.glob(f"[aeikt]*/**/{name}"))}
    assert missing == set()


def test_it_stays_short():
    assert len(TEXT.splitlines()) <= MOST_LINES
