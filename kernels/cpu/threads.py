"""Work in pieces over the threads that torch computes with already: a second pool would wait against the first.

A task is compiled with `task` and takes its pieces from a counter; what a piece computes depends on nothing but its
number, so results depend neither on the number of threads nor on which of them was first. Tasks that follow one
another are one call in program.py.
"""
from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from kernels.cpu.vectors import INT64

Tensor = torch.Tensor

task = cfunc("void(int64)", cache=True)     # of the address of its record
GRAIN = 256 << 10   # bytes a thread reads, at least: some 25 us, where starting and awaiting a second one costs 5 to 10
                    # in a quiet machine, and in a busy one may cost a turn of the scheduler
HEAD = struct.Struct("=qqq")    # of every record: the counter, the pieces, about how many bytes they read
_START = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def fields(names: str, floats: str = "") -> np.dtype:
    """The record that a task is told everything in: int64 and float32, and before them what HEAD says.
    The task reads it as `carray(pointer(address), 1, dtype)[0]`."""
    return np.dtype([(name, np.int64) for name in ("next", "n_pieces", "n_bytes", *names.split())]
                    + [(name, np.float32) for name in floats.split()])


class Step(NamedTuple):
    """A task and its record. alive: what lies at the record's addresses. whole: one thread takes all of it, whatever
    the record says of pieces, because several tasks share it."""

    task: object
    record: bytearray
    alive: tuple = ()
    whole: bool = False

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.record))


@intrinsic
def claim(context, address):
    """The next piece of the record at this address: a number that no other thread gets."""
    def generate(context, builder, signature, arguments):
        counter = builder.inttoptr(arguments[0], ir.PointerType(INT64))
        return builder.atomic_rmw("add", counter, ir.Constant(INT64, 1), "monotonic")
    return types.int64(types.int64), generate


@intrinsic
def pointer(context, address):
    """An address as numba's `carray` takes it."""
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.PointerType(ir.IntType(8)))
    return types.voidptr(types.int64), generate


def pack(record: np.dtype, n_pieces: int, n_bytes: int = 0, /, **values: float) -> bytearray:
    """A record with its values."""
    return bytearray(_packing(record).pack(0, n_pieces, n_bytes, *[values[name] for name in record.names[3:]]))


def run(function, record: np.dtype, n_pieces: int, n_bytes: int, /, **values: float) -> None:
    """Compute all pieces of a task, which reads about n_bytes, and wait for them. values: of the record's fields,
    addresses among them; whoever calls keeps alive what lies there."""
    call(Step(function, pack(record, n_pieces, n_bytes, **values)))


def call(step: Step) -> None:
    """One step, in as many threads as it is worth."""
    _, n_pieces, n_bytes = HEAD.unpack_from(step.record)
    n = 1 if step.whole else min(n_pieces, torch.get_num_threads(), max(1, n_bytes // GRAIN))
    if n > 1:
        parallel()(step.task.address, step.address, n, 0)
    elif n:
        step.task.ctypes(step.address)


@cache
def _packing(record: np.dtype) -> struct.Struct:
    """The same bytes as the record's: a struct is made in a fifth of an array's time."""
    return struct.Struct("=" + "".join({"i": "q", "f": "f"}[record[name].kind] for name in record.names))


def address(tensor: Tensor | None) -> int:
    """0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


@cache
def parallel() -> Callable[[int, int, int, int], None]:
    """A C function of address, argument, number of threads and 0 that calls the one there in every thread."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/lib*omp*")):
        library = ctypes.CDLL(str(path))        # loaded already, this asks for its handle
        if hasattr(library, "GOMP_parallel"):   # GNU's own, and LLVM's but on Windows
            return _START(("GOMP_parallel", library))
    return _START(_python_threads)


def _python_threads(address: int, argument: int, n: int, _: int) -> None:
    """Where torch's pool cannot be asked; each start costs some ten microseconds more."""
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)
    started = [_pool().submit(function, argument) for _ in range(n - 1)]
    function(argument)
    wait(started)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernels")
