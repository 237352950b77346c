"""Blocks of one launch that wait for one of them, without a way to wait for ever.

`turn` int32 [4] in device memory, zero before and after every launch: work drawn, work done, what was published, blocks
that left. Blocks draw their work instead of having it by their number: what is waited for is always held by a block
that already runs and waits for nobody. So it does not matter how many blocks are resident at a time, nor in which order
they start, nor what else the card computes: a block that has not started holds no work, and finds it all drawn when it
starts. The last block to leave sets everything back to zero, so a replay needs no reset. A launch runs whole, or the
driver gives the whole context up: a step that broke off between two launches leaves zeros as well. Launches that share
a `turn` must follow each other; what runs beside has one of its own.
"""
from __future__ import annotations

import triton
import triton.language as tl

WORDS = 4   # of a turn


@triton.jit
def draw(turn):
    """The next piece of work, 0 first."""
    return tl.atomic_add(turn, 1, sem="relaxed")


@triton.jit
def finish(turn):
    """A piece of work is done -> how many were before it; who comes last sees what all of them wrote."""
    tl.debug_barrier()
    return tl.atomic_add(turn + 1, 1, sem="acq_rel")


@triton.jit
def publish(turn):
    """What this block wrote may be read by those that wait."""
    tl.debug_barrier()
    tl.atomic_xchg(turn + 2, 1, sem="release")


@triton.jit
def wait(turn):
    """Until it was published; read it past the first cache (".cg")."""
    while tl.atomic_add(turn + 2, 0, sem="acquire") == 0:
        pass
    tl.debug_barrier()


@triton.jit
def leave(turn):
    """The last thing of every block."""
    if tl.atomic_add(turn + 3, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(turn + tl.arange(0, 4), 0)
