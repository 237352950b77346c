"""Every device kernel equals its reference, under Triton's interpreter on the CPU.

Triton decides when it is imported whether kernels are interpreted, so the cases run in a child process.
"""
from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest

triton = pytest.importorskip("triton", reason="needs Triton, which this platform's package index may not have")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and tuple(
        map(int, numpy.__version__.split(".")[:2])) >= (2, 5):
    pytest.skip("the interpreter of Triton before 3.7 makes numbers of arrays, which numpy 2.5 refuses; install "
                "triton>=3.7 or numpy<2.5", allow_module_level=True)

FILES = ("memory", "choice", "product", "prefill", "linear", "attend", "delta", "self_check")


def run_cases(repository, marked: str, *names: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p",
               "tests.kernels.interpreter", "-m", marked, *(f"tests/kernels/interpreted_{name}.py" for name in names)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernels_equal_their_references(repository):
    run_cases(repository, "not slow", *FILES)


@pytest.mark.slow
def test_kernels_equal_their_references_on_more_shapes(repository):
    run_cases(repository, "slow", *FILES)
