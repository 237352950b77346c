"""Compiled twin of kernels/trunk/route.py."""
from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, float32, int8, int32, int64, njit

from kernels.cpu.program import STOP
from kernels.cpu.threads import Step, address, fields, pack, pointer, task

Tensor = torch.Tensor


@njit(cache=True, nogil=True)
def _route_one(row, renormalised, ids, shares):
    largest, total, taken = row[0], float32(0), float32(0)
    for value in row:
        largest = value if value > largest else largest
    for value in row:
        total += math.exp(value - largest)
    for k in range(len(ids)):
        best = -1
        for expert, value in enumerate(row):
            if best >= 0 and not value > row[best]:
                continue
            is_free = True
            for before in range(k):
                is_free = is_free and ids[before] != expert
            if is_free:
                best = expert
        ids[k], shares[k] = best, math.exp(row[best] - largest) / total
        taken += shares[k]
    if renormalised:
        for k in range(len(ids)):
            shares[k] /= taken


@njit("void(float32[:,::1], boolean, int64[:,::1], float32[:,::1])", cache=True, nogil=True)
def _route(logits, renormalised, ids, shares):
    for t in range(len(logits)):
        _route_one(logits[t], renormalised, ids[t], shares[t])


def route(logits: Tensor, top_k: int, renormalised: bool) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.route.route."""
    ids = torch.empty(len(logits), top_k, dtype=torch.int64)
    shares = torch.empty(len(logits), top_k, dtype=torch.float32)
    _route(logits.contiguous().numpy(), renormalised, ids.numpy(), shares.numpy())
    return ids, shares


RECORD = fields("experts routed renormalised logits ids shares there")


@task
def _route_near(table):
    """One token's; stops the program where one of the experts is not there."""
    a = carray(pointer(table), 1, RECORD)[0]
    ids, there = carray(pointer(a.ids), a.routed, int32), carray(pointer(a.there), a.experts, int8)
    _route_one(carray(pointer(a.logits), a.experts, float32), a.renormalised != 0, ids,
               carray(pointer(a.shares), a.routed, float32))
    for expert in ids:
        if not there[expert]:
            carray(pointer(table), 1, int64)[0] = STOP


def routing(logits: Tensor, renormalised: bool, ids: Tensor, shares: Tensor, there: np.ndarray) -> Step:
    """The step of `route` for logits float32 [1, E], into ids int32 and shares float32 [1, k]. there: bool [E], which
    experts are near; where one is not, the program stops here, and goes on from here once it is."""
    record = pack(RECORD, 1, experts=logits.shape[1], routed=ids.shape[1], renormalised=renormalised,
                  logits=address(logits), ids=address(ids), shares=address(shares), there=there.ctypes.data)
    return Step(_route_near, record, (logits, ids, shares, there), whole=True)
