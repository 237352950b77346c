"""Compiled twin of kernels/trunk/route.py."""
from __future__ import annotations

import math

import torch
from numba import float32, njit

Tensor = torch.Tensor


@njit("void(float32[:,::1], boolean, int64[:,::1], float32[:,::1])", cache=True, nogil=True)
def _route(logits, renormalised, ids, shares):
    for t in range(len(logits)):
        row, taken = logits[t], float32(0)
        largest, total = row[0], float32(0)
        for value in row:
            largest = value if value > largest else largest
        for value in row:
            total += math.exp(value - largest)
        for k in range(ids.shape[1]):
            best = -1
            for expert, value in enumerate(row):
                if best >= 0 and not value > row[best]:
                    continue
                is_free = True
                for before in range(k):
                    is_free = is_free and ids[t, before] != expert
                if is_free:
                    best = expert
            ids[t, k], shares[t, k] = best, math.exp(row[best] - largest) / total
            taken += shares[t, k]
        if renormalised:
            for k in range(ids.shape[1]):
                shares[t, k] /= taken


def route(logits: Tensor, top_k: int, renormalised: bool) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.route.route."""
    ids = torch.empty(len(logits), top_k, dtype=torch.int64)
    shares = torch.empty(len(logits), top_k, dtype=torch.float32)
    _route(logits.numpy(), renormalised, ids.numpy(), shares.numpy())
    return ids, shares
