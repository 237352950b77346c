"""The shape of the house: imports follow the arrows of the design, files stay small, names say what they are.

Lazy imports inside functions count as well, and so do those for type checkers.
"""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("app", "engine", "kernels", "installer")
OURS = {*PACKAGES, "tests"}
MAX_LINES = 450
FORBIDDEN_NAMES = {"utils", "util", "helper", "helpers", "manager", "misc", "registry", "common"}

# A package's files may import these; a trailing dot means the package and anything below it.
BETWEEN = {
    "app": {"app.", "engine"},  # the door, never engine.experts.host
    "engine": {"engine.", "kernels."},
    "kernels": {"kernels."},
    "installer": {"installer."},
}
# Packages of the engine, lowest first: each imports from itself and from those before it. What lies beside them in
# engine/ is below them all, but for the doors, which are above.
TOWER = ("policies", "machine", "files", "planning", "experts", "model", "decode", "chat", "quality", "library",
         "bench", "cli")
DOORS = {"engine", "engine.__main__", "engine.hf"}
MAX_FILES = 14  # in a folder, beside its __init__


def files(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imported(tree: ast.AST, path: str) -> set[str]:
    """Full names of our modules that a file imports; `from engine import nvml` counts as engine.machine.nvml."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            module = ROOT / node.module.replace(".", "/")
            below = {alias.name for alias in node.names
                     if (module / f"{alias.name}.py").exists() or (module / alias.name / "__init__.py").exists()}
            names |= {f"{node.module}.{name}" for name in below}
            if len(below) < len(node.names):
                names.add(node.module)
    return {name for name in names if name.split(".")[0] in OURS}


def allowed(name: str, rules: set[str]) -> bool:
    return any(f"{name}.".startswith(rule) if rule.endswith(".") else name == rule for rule in rules)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_along_the_arrows(package):
    for path in files(package):
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), str(path)):
            assert allowed(name, BETWEEN[package]), f"{path.relative_to(ROOT)} may not import {name}"


def asked_of(tree: ast.AST) -> set[tuple[str, str]]:
    """(module, name): what a file asks of our modules, by import or as an attribute, inside functions as well."""
    found, modules = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names if "." in alias.name}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                if (ROOT / below.replace(".", "/")).with_suffix(".py").exists():
                    modules[alias.asname or alias.name] = below
                else:
                    found.add((node.module, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            found.add((modules[ast.unparse(node.value)], node.attr))
    return {(module, name) for module, name in found if module.split(".")[0] in OURS}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_file_asks_of_another_is_there(package):
    """Also where it is asked inside a function that no test may run, on a graphics card for example."""
    for path in files(package):
        for module, name in asked_of(ast.parse(path.read_text(encoding="utf-8"))):
            assert hasattr(import_module(module), name), f"{path.relative_to(ROOT)}: {module} has no {name}"
    assert asked_of(ast.parse("def f():\n    from engine import hf\n    hf.nothing")) == {("engine.hf", "nothing")}


def floor(module: str) -> int:
    parts = module.split(".")
    return TOWER.index(parts[1]) if len(parts) > 1 and parts[1] in TOWER else -1


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def graph() -> dict[str, set[str]]:
    """Product module -> those of ours that it imports; TYPE_CHECKING and imports inside functions included."""
    return {module_name(path): imported(ast.parse(path.read_text(encoding="utf-8")), str(path))
            for path in files(*PACKAGES)}


@pytest.mark.parametrize("package", ("", *TOWER))
def test_the_engine_is_a_tower(package):
    for module, names in graph().items():
        if module.startswith("engine") and module not in DOORS and floor(module) == floor(f"engine.{package}"):
            for name in names:
                assert not name.startswith("engine") or floor(name) <= floor(module), f"{module} may not import {name}"


def test_there_is_no_circle():
    """Kahn's order: what is left when every module whose imports are all gone is taken away."""
    left = {module: {name for name in names if name != module} for module, names in graph().items()}
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("top, ending", [*((package, "py") for package in (*PACKAGES, "tests")), ("assets/ui", "*"),
                                         ("installer", "*")])
def test_no_folder_is_a_heap(top, ending):
    for folder in {path.parent for path in (ROOT / top).rglob(f"*.{ending}")} - {ROOT / top / "__pycache__"}:
        found = sorted(path.name for path in folder.glob(f"*.{ending}") if path.name != "__init__.py")
        assert len(found) <= MAX_FILES, f"{folder.relative_to(ROOT)} holds {len(found)} files: {found}"


def test_the_door_of_the_engine_is_not_used_from_inside():
    """A file of the engine asks its neighbour, not the door: through the door everything is below everything."""
    for path in files("engine"):
        names = imported(ast.parse(path.read_text(encoding="utf-8")), str(path))
        assert "engine" not in names, f"{path.relative_to(ROOT)} imports from the engine's door"


def test_the_door_has_no_name_of_a_module():
    """Python would put the module in the place of the name as soon as somebody imports it."""
    import engine
    modules = {path.stem for path in (ROOT / "engine").iterdir()}
    assert not modules & set(engine.__all__)
    code = ("import sys, engine; "
            "[getattr(engine, name) for name in ('download', 'this_machine', 'look_up', 'delete')]; "
            "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_verbs_are_imported_by_nobody_but_their_door():
    for path in files(*PACKAGES):
        if "cli" not in path.parts and path.name != "__main__.py":
            names = imported(ast.parse(path.read_text(encoding="utf-8")), str(path))
            assert not any(name.startswith("engine.cli") for name in names), f"{path} imports a verb"


@pytest.mark.parametrize("source, wrong", [
    ("import engine.experts.host", "app"), ("from engine.experts.host import Runtime", "app"),
    ("from engine import experts", "app"), ("def f():\n    import engine.core", "kernels"),
    ("from tests import conftest", "engine"), ("from kernels import layout", "installer")])
def test_the_rules_refuse(tmp_path, source, wrong):
    (name,) = imported(ast.parse(source), "a file")
    assert not allowed(name, BETWEEN[wrong])


def test_files_are_small_and_named_for_what_they_do():
    for path in files(*PACKAGES, "tests"):
        shown = path.relative_to(ROOT)
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, f"{shown} is too long: two ideas?"
        words = {word for part in shown.with_suffix("").parts for word in part.split("_")}
        assert not words & FORBIDDEN_NAMES, f"{shown}: say what it does"


def test_every_file_says_what_it_is():
    for path in files(*PACKAGES):
        if path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path}: no docstring"


@pytest.mark.parametrize("module", ["engine", "engine.planning.planner", "engine.library.catalogue",
                                    "engine.machine.detect", "kernels", "app"])
def test_starts_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, f"import {module} loads torch"


def test_the_repository_speaks_of_the_project_alone():
    """No path of a developer's machine, no mirror of a package index, in any file that is tracked."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    own = Path(__file__).name
    bad = re.compile(r"/root/|/home/(?!user\b)\w+|/opt/(?:pypi|wheels)|file:///opt|/work/")
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.name == own or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = bad.search(text)
        assert not found, f"{name} speaks of {found[0]!r}"
