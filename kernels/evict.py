"""Once a token: free the longest unused slots, so that the next token finds enough of them on the free stack; with
`free=layer` before a layer asks, as many as it lacks.

The only place where anything leaves near memory. Oldest first, ties by slot index, what was not used for AGES - 1
tokens or more counting as equally old; what was used in the clock's token stays, and so does what is pinned.
"""
from __future__ import annotations

import torch

from kernels.dispatch import twin
from kernels.pool import Pool

Tensor = torch.Tensor

AGES = 1024     # ages told apart; more would not fit the registers of the kernel that counts them


@twin("kernels.gpu.evict", "kernels.cpu.pool")
def age(pool: Pool, clock: int | Tensor, reserve: int | Tensor) -> Tensor:
    """Evict until `reserve` slots are free -> int64 [2]: slots evicted, of them never asked for since fetched ahead.

    clock: the token that just ended, or the one under way; its slots are kept. reserve: what the next token, or the
    layer, may need at most; no more is freed than there are objects outside. What is freed lies on the stack in slot
    order.
    """
    clock, reserve = int(clock), int(reserve)
    n_free = int(pool.n_free)
    resident = len(pool.object_of) - n_free
    wanted = min(reserve, len(pool.slot_of) - resident) - n_free
    old = (pool.object_of >= 0) & (pool.stamp < clock)
    n = min(wanted, int(old.sum()))
    if n <= 0:
        return torch.zeros(2, dtype=torch.int64, device=pool.stamp.device)
    stamps = torch.where(old, pool.stamp.clamp(min=clock - AGES + 1), torch.iinfo(torch.int32).max).long()
    order = (stamps << 32 | torch.arange(len(stamps), device=stamps.device)).topk(n, largest=False).indices
    order = order.sort().values
    wasted = pool.ahead[order].sum().long()
    pool.slot_of[pool.object_of[order].long()] = -1
    pool.object_of[order] = -1
    pool.ahead[order] = 0
    pool.free[n_free:n_free + n] = order.int()
    pool.n_free.add_(n)
    return torch.stack((torch.tensor(n, device=stamps.device), wasted))
