"""What a processor is asked for, what is kept between two starts, and what happens without numba."""
from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="needs numba, which compiles these functions")

import llvmlite.binding as llvm

from kernels.cpu import target
from kernels.cpu.dots import FourWay, Plain, TwoWay, choose

RUN = """
    import torch
    from kernels import dispatch
    from kernels.activation import Gate
    from kernels.dense import dense
    from kernels.layout import Layout
    from tests.support.random_experts import random_blobs
    layout = Layout(256, 40, 64)
    blobs = random_blobs(2, layout, torch.Generator().manual_seed(0))
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
    arguments = (x, blobs, torch.tensor([[1, 0]], dtype=torch.int32), layout, Gate())
    found = dense(*arguments)
"""


def run(repository, code: str, before: str = "", **environment: str) -> str:
    """What a Python of its own says."""
    command = [sys.executable, "-c", before + textwrap.dedent(RUN) + textwrap.dedent(code)]
    done = subprocess.run(command, cwd=repository, env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("there, kind, parts", [
    ({"avx2", "avx512bw", "avx512vl", "avx512vnni"}, FourWay, 1), ({"avx2", "avxvnni"}, FourWay, 2),
    ({"avx2", "avx512bw"}, TwoWay, 1), ({"avx2"}, TwoWay, 2), ({"neon", "dotprod"}, FourWay, 4), ({"neon"}, Plain, 1),
    (set(), Plain, 1)])
def test_the_best_instructions_that_there_are(there, kind, parts):
    chosen = choose(frozenset(there))
    assert type(chosen) is kind and chosen.parts == parts


SAID = """
    from kernels.cpu import activation, apply
    from kernels.cpu.dots import DOTS
    error = (found - dense.reference(*arguments)).abs().max() / found.abs().max()
    assert error < 2e-4, error
    print(type(DOTS).__name__, DOTS.parts, found.numpy().tobytes().hex(), apply._add_neurons.cache_hits,
          sum(activation._quantize.stats.cache_misses.values()))
"""


@pytest.fixture(scope="module")
def first(repository, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of what the first process compiled for this processor, and what it said."""
    cache = tmp_path_factory.mktemp("numba")
    return cache, run(repository, SAID, NUMBA_CACHE_DIR=str(cache)).split()


@pytest.mark.skipif(not llvm.get_host_cpu_features().get("avx2"), reason="needs an x86 processor with AVX2")
def test_every_kind_of_processor_makes_the_same_bits(repository, tmp_path, first):
    """An older one by name (AVX2), one with nothing but plain vectors, and this one."""
    haswell, plain = (run(repository, SAID, NUMBA_CPU_NAME=name, NUMBA_CACHE_DIR=str(tmp_path)).split()
                      for name in ("haswell", "x86-64"))
    assert haswell[:2] == ["TwoWay", "2"] and plain[:2] == ["Plain", "1"]
    assert haswell[2] == first[1][2]        # x86-64 rounds a product before it is added


def test_the_second_process_compiles_nothing(repository, first):
    cache, said = first
    assert said[3:] == ["0", "1"]
    kept = sorted(path.name for path in cache.rglob("*.nbi"))
    assert any("apply._add_neurons" in name for name in kept)
    assert run(repository, SAID, NUMBA_CACHE_DIR=str(cache)).split()[2:] == [said[2], "1", "0"]
    assert sorted(path.name for path in cache.rglob("*.nbi")) == kept


def test_another_version_of_these_files_shares_nothing(tmp_path):
    (tmp_path / "vectors.py").write_text("one")
    first = target.version_of(tmp_path)
    (tmp_path / "vectors.py").write_text("two")
    assert target.version_of(tmp_path) != first
    (tmp_path / "vectors.py").write_text("one")
    assert target.version_of(tmp_path) == first


def test_every_buffer_says_its_type(repository):
    """The process's default changes while transformers makes a model beside an answer."""
    silent = [(path.name, call.lineno) for path in (repository / "kernels" / "cpu").rglob("*.py")
              for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
              if isinstance(call, ast.Call) and ast.unparse(call.func) in ("torch.empty", "torch.zeros", "torch.ones")
              and not any(given.arg in ("dtype", None) for given in call.keywords)]
    assert silent == []


def test_without_numba_the_reference_runs_and_a_sentence_says_so(repository):
    found = run(repository, """
        assert torch.equal(found, dense.reference(*arguments)) and dispatch.compile_all()
        print(dispatch.why_not_compiled())
    """, before="import sys; sys.modules['numba'] = None")
    assert found.startswith("The fast functions for processors cannot be used (ModuleNotFoundError: import of numba")


def test_nothing_is_compiled_before_it_is_used(repository):
    code = "import sys, kernels.dense, kernels.apply, engine; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0
