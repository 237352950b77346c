"""The compiled functions alone on this processor, at a catalogue model's shape, against copies between the calls.

Other programs share memory and cores, so every round times a copy and each function, and the medians of all rounds are
set against each other. A copy's bytes are read and written: both count. What it leaves in the caches is written back
before the functions run, because no token of an answer meets that. A function runs IN_A_ROW times, as in a token, where
its threads are awake; its weights are a gigabyte of whole experts, of which a third is sketches, or of matrices.
"""
from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from engine.bench.blobs import random_matrix
from engine.bench.gpu_kernels import Run
from engine.bench.rows import CardTable, Row
from engine.bench.single_kernels import must_read, runs
from engine.bench.synthetic import SHARES, Shape
from engine.core import MachineError
from engine.machine.detect import processor_name
from kernels import dispatch
from kernels.trunk.linear import Matrices, linears

COPY_BYTES = 256 << 20      # several times the largest cache
WEIGHTS = 1 << 30           # bytes of different experts, and of different matrices
IN_A_ROW = 32
LINEAR = (4096, 2048)       # rows and columns: the largest matrix of attention in Qwen3-30B-A3B
ROUNDS = 30


def measured(shape: Shape, rounds: int = ROUNDS) -> Iterator[Row]:
    """A row a function. MachineError where nothing is compiled: references are not worth a row."""
    if why := dispatch.compile_all():
        raise MachineError(why)
    from kernels.cpu.dots import DOTS
    spec = shape.spec
    refined, down_only = (int(share * spec.top_k * spec.neurons) for share in SHARES["fast"])
    n_bytes = must_read(shape.layout, spec.top_k, refined, down_only)
    todo = runs(shape, refined, down_only, "cpu", max(spec.top_k, WEIGHTS // shape.layout.blob_bytes))
    for bits in (8, 4):
        todo[f"linear{bits}"], n_bytes[f"linear{bits}"] = _linear(bits)
    source, target, other = (torch.ones(COPY_BYTES // 8, dtype=torch.int64) for _ in range(3))
    took = {name: [] for name in ("copy", *todo)}
    for _ in range(rounds):
        for name, run in (("copy", lambda: target.copy_(source)), *todo.items()):
            n, start = 1 if name == "copy" else IN_A_ROW, perf_counter()
            for _ in range(n):
                run()
            took[name].append((perf_counter() - start) / n)
            if name == "copy":
                other.max()
    copied = 2 * COPY_BYTES / median(took["copy"])
    for name in todo:
        seconds = median(took[name])
        yield {"measured": "kernels", "model": shape.name, "hidden": spec.hidden, "name": name, "us": 1e6 * seconds,
               "bytes": n_bytes[name], "gb_per_second": n_bytes[name] / seconds / 1e9,
               "copy_gb_per_second": copied / 1e9, "of_copy": n_bytes[name] / seconds / copied,
               "threads": torch.get_num_threads(), "instructions": f"{type(DOTS).__name__} in {DOTS.parts}"}


def _linear(bits: int) -> tuple[Run, int]:
    """One token through one of many matrices, as an open model holds them, and the bytes of a matrix."""
    n_rows, columns = LINEAR
    draw = torch.Generator().manual_seed(bits)
    codes, scales = random_matrix(n_rows, columns, bits, draw)
    made = [Matrices(((codes.clone(), scales.clone(), None),)) for _ in range(max(1, WEIGHTS // codes.nbytes))]
    x, matrices = torch.randn(1, columns, generator=draw), cycle(made)
    return lambda: linears(x, next(matrices))[0], made[0].n_bytes


def processor_table(folder: Path) -> CardTable:
    """`folder`/cpu.csv."""
    versions = {name: version(name) for name in ("torch", "numba")}
    return CardTable(folder, "cpu", {"processor": processor_name(), **versions})
