"""Steps that follow one another in one compiled call, without Python between them.

A step may stop the program: its task leaves STOP in the record's counter, which no count of pieces reaches. Whoever
called does what it waits for, and goes on from that step.
"""
from __future__ import annotations

import ctypes
from collections.abc import Callable
from time import perf_counter
from typing import ClassVar

import numpy as np
import torch
from llvmlite import ir
from numba import carray, int64, njit, types
from numba.extending import intrinsic

from kernels.cpu import threads
from kernels.cpu.threads import Step, call, parallel, pointer
from kernels.cpu.vectors import INT32, INT64

STOP = -1


@intrinsic
def _invoke(context, function, argument):
    """The task at an address."""
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [INT64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), generate


@intrinsic
def _start(context, start, function, argument, n):
    """The same in n threads; start: the address of `threads.parallel`."""
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [INT64, INT64, INT32, INT32])
        given = [*arguments[1:3], builder.trunc(arguments[3], INT32), ir.Constant(INT32, 0)]
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), given)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@njit("int64(int64[:,::1], int64, int64, int64, int64)", cache=True, nogil=True)
def _run(table, first, start, n_threads, grain):
    """table int64 [n, 3]: task, record, and 1 for what one thread takes whole."""
    for at in range(first, len(table)):
        head = carray(pointer(table[at, 1]), 3, int64)
        head[0] = 0
        n = 1 if table[at, 2] else min(head[1], n_threads, head[2] // grain)
        if n > 1:
            _start(start, table[at, 0], table[at, 1], n)
        else:
            _invoke(table[at, 0], table[at, 1])
        if head[0] == STOP:
            return at
    return len(table)


class Program:
    """Steps in their order, for as often as they are run.

    watch: of all programs, while somebody measures: it is told a step's task and its seconds, and each is a call of its
    own.
    """

    watch: ClassVar[Callable[[str, float], None] | None] = None

    def __init__(self, steps: list[Step]) -> None:
        self._steps = tuple(steps)      # the table knows addresses only
        rows = [(step.task.address, step.address, step.whole) for step in steps]
        self._table = np.array(rows, np.int64).reshape(-1, 3)
        self._start = ctypes.cast(parallel(), ctypes.c_void_p).value

    def __len__(self) -> int:
        return len(self._steps)

    def run(self, first: int = 0) -> int:
        """From this step on -> the number of the one that stopped; at the end, their number."""
        if Program.watch is not None:
            return self._watched(first, Program.watch)
        return _run(self._table, first, self._start, torch.get_num_threads(), threads.GRAIN)

    def _watched(self, first: int, watch: Callable[[str, float], None]) -> int:
        for at, step in enumerate(self._steps[first:], first):
            counter = np.frombuffer(step.record, np.int64, 1)
            counter[0], begun = 0, perf_counter()
            call(step)
            watch(step.task.__name__, perf_counter() - begun)
            if counter[0] == STOP:
                return at
        return len(self)
