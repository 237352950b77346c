"""The last block of a launch to finish goes on with what all have written: one node of a graph instead of two.

Each block writes its part and adds one to a counter; who finds all others counted is the last, and puts the counter
back to zero. So no launch begins with a counter that has to be cleared, and one serves launch after launch; a kernel
that broke off half-way has lost its card. No block ever waits for another. What is written before the addition is seen
behind it (it releases and acquires, a barrier of the block before it), by loads past the first cache alone. Which block
is last is chance: what it computes must not depend on that.
"""
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

MOST = 1024     # counters of a launch


@triton.jit
def is_last(counter, n):
    """Whether this is the last of n blocks that come here; all that they wrote before can be read."""
    tl.debug_barrier()  # all of the block has written
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == n - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
    return last


@cache
def counters(device: torch.device) -> torch.Tensor:
    """int32 [MOST], zero between launches; those that use them run one after the other. Made before a step is
    recorded, by the run before it."""
    return torch.zeros(MOST, dtype=torch.int32, device=device)
