"""The shape of the house: imports follow the arrows of the design, files stay small, names say what they are.

Lazy imports inside functions count as well. ENGINE lists the engine's lower files, which many rest on, with all they
may know; the files above them are only held to their package's arrows.
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
    "app": {"app.", "engine"},  # the door, never engine.experts
    "engine": {"engine.", "kernels."},
    "kernels": {"kernels."},
    "installer": {"installer."},
}
# What sits low in the engine, by file: it may import these of ours and no others.
ENGINE = {
    "spec": set(),
    "paths": {"engine.spec"},
    "units": {"engine.spec"},
    "nvml": set(),
    "hardware": {"engine.spec", "engine.nvml", "engine.rates"},
    "shape": {"engine.spec"},
    "hub": {"engine.spec"},
    "catalogue": {"engine.spec", "engine.paths", "engine.shape", "engine.hub"},
    "plan": {"engine.spec", "engine.shape", "engine.sparsity", "engine.speed", "kernels.layout", "engine.plan_text",
             "engine.units"},
    "sparsity": {"engine.spec", "kernels.layout"},
    "speed": {"engine.spec", "engine.sparsity", "kernels.layout"},
    "tensors": {"engine.spec"},
    "mapping": set(),
    "gguf_names": set(),
    "gguf_source": {"engine.spec", "engine.gguf_names"},
    "dequantize": {"engine.spec", "engine.tensors"},
    "skeleton": {"engine.spec", "engine.shape"},
    "checkpoint": {"engine.spec", "engine.tensors", "engine.mapping", "engine.dequantize", "engine.skeleton"},
    "format": {"engine.spec", "kernels."},
    "quantize": {"kernels."},
    "trunk": {"engine.quantize", "engine.spec", "kernels."},
    "failures": {"engine.spec", "engine.card_errors"},
    "compress": {"engine.spec", "engine.card_errors", "engine.checkpoint", "engine.format", "engine.quantize",
                 "engine.trunk", "kernels."},
    "store": {"engine.spec", "engine.format", "engine.checkpoint", "kernels."},
    "cache": {"engine.spec", "kernels."},
    "experts": {"engine.spec", "engine.store", "engine.cache", "engine.host_memory", "kernels."},
    "prefix": set(),
    "step_cache": {"engine.spec"},
    "gates": {"kernels."},
    "prefill": {"engine.plan", "kernels."},
    "beside": set(),
    "headroom": set(),
    "device_runtime": {"engine.spec", "engine.beside", "engine.store", "engine.cache", "engine.experts", "engine.gates",
                       "engine.prefill", "kernels."},
    "template": {"engine.spec", "engine.template_process"},
    "template_process": set(),
    "tokens": {"engine.spec", "engine.template"},
    "sections": {"engine.tokens"},
    "sampling": {"engine.spec"},
    "device_sampler": {"engine.spec", "engine.sampling"},
    "decoding": {"engine.spec", "engine.device_runtime", "engine.device_sampler", "engine.step_cache"},
    "graphs": {"engine.decoding"},
    "host_memory": {"engine.units"},
    "host_embedding": {"engine.host_memory", "kernels."},
    "far_locked": {"engine.spec", "engine.format", "engine.store", "engine.host_memory"},
    "repeating": {"engine.experts"},
    "card_errors": {"engine.spec", "engine.hardware"},
    "stepping": {"engine.spec", "engine.decoding", "engine.device_runtime", "engine.device_sampler", "engine.graphs",
                 "engine.headroom", "engine.prefix", "engine.step_cache"},
    "on_card": {"engine.device_runtime", "engine.experts", "engine.far_locked", "engine.format", "engine.host_memory"},
    "turn": {"engine.spec", "engine.tokens", "engine.sections", "engine.prefix", "engine.sampling", "engine.stepping"},
}


def files(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imported(tree: ast.AST, path: str) -> set[str]:
    """Full names of our modules that a file imports; `from engine import nvml` counts as engine.nvml."""
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


@pytest.mark.parametrize("module", ENGINE)
def test_engine_files_import_only_what_they_are_given(module):
    path = ROOT / "engine" / f"{module}.py"
    if not path.exists():
        pytest.skip(f"there is no engine/{module}.py (yet)")
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), str(path)):
        assert allowed(name, ENGINE[module]), f"engine/{module}.py may not import {name}"


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
    code = ("import sys, engine; [getattr(engine, name) for name in ('download', 'here', 'look_up', 'delete')]; "
            "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_verbs_are_imported_by_nobody_but_their_door():
    for path in files(*PACKAGES):
        if path.parts[-2] != "verbs" and path.name != "__main__.py":
            names = imported(ast.parse(path.read_text(encoding="utf-8")), str(path))
            assert not any(name.startswith("engine.verbs") for name in names), f"{path} imports a verb"


@pytest.mark.parametrize("source, wrong", [
    ("import engine.experts", "app"), ("from engine.experts import Runtime", "app"),
    ("from engine import experts", "app"), ("def f():\n    import engine.spec", "kernels"),
    ("from tests import conftest", "engine"), ("from kernels import layout", "installer")])
def test_the_rules_refuse(tmp_path, source, wrong):
    (name,) = imported(ast.parse(source), "a file")
    if name == "engine.experts" and not (ROOT / "engine/experts.py").exists():
        pytest.skip("there is no engine/experts.py (yet)")
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


@pytest.mark.parametrize("module", ["engine", "engine.plan", "engine.catalogue", "engine.hardware", "kernels", "app"])
def test_starts_without_torch(module):
    if not (ROOT / (module.replace(".", "/") + ".py")).exists() and not (ROOT / module.replace(".", "/")).is_dir():
        pytest.skip(f"there is no {module} (yet)")
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
