"""The ziglang wheel as C compiler: Triton's own build step makes a Python module with it that can be imported."""
from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from installer import compiler, environment
from installer.screen import Screen

CODE = """
import importlib.util, sys
from triton.runtime import build
so = build._build("answer", sys.argv[1] + "/answer.c", sys.argv[1], [], [], [], [])
spec = importlib.util.spec_from_file_location("answer", so)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.answer())
"""
SOURCE = """
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "answer", 0, -1, methods};
PyMODINIT_FUNC PyInit_answer(void) { return PyModule_Create(&module); }
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere Triton brings a compiler or is not used")
def test_triton_builds_with_zig(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("ziglang")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("this Python has no Python.h")
    made = environment.Environment(tmp_path / "env é")
    made.python.parent.mkdir(parents=True)
    made.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    made.python.chmod(0o755)
    (tmp_path / "answer.c").write_text(SOURCE)
    variables = environment.Environment(made.folder, str(compiler.write_wrapper(made))).variables(tmp_path / "cache")
    variables |= {"PATH": "/nowhere", "ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "zig")}
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path], env=variables, capture_output=True, text=True)
    assert done.stdout == "42\n", done.stderr


def test_no_compiler_is_fetched_where_none_is_needed(tmp_path, monkeypatch):
    def fail(*arguments):
        raise AssertionError("nothing should be installed")
    monkeypatch.setattr(environment, "install", fail)
    made, screen = environment.Environment(tmp_path), Screen(tmp_path / "log")
    assert compiler.add_compiler(made, "cpu", tmp_path, tmp_path, screen) is None
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert compiler.add_compiler(made, "cu130", tmp_path, tmp_path, screen) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere Triton brings a compiler or is not used")
def test_the_wheel_is_fetched_where_there_is_no_compiler(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(environment, "install", lambda made, arguments, app, screen: asked.extend(arguments))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "bin").mkdir()
    made = environment.Environment(tmp_path)
    script = compiler.add_compiler(made, "cu130", Path("pins"), tmp_path, Screen(tmp_path / "log"))
    assert Path(script) == tmp_path / "bin" / "zig-cc" and "pins/compiler.lock" in asked and "--require-hashes" in asked
