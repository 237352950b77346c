"""Compiled twin of kernels/trunk/route.py."""
from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, float32, int8, int32, int64, njit

from kernels.cpu.program import STOP
from kernels.cpu.threads import Step, address, fields, pack, pointer, run, task
from kernels.trunk.route import LEAST, Choice

Tensor = torch.Tensor
TOLD = "experts routed tokens renormalised sigmoid correction groups kept of_group factors logits ids shares"
RECORD, NEAR = fields(TOLD, "scaling"), fields(f"{TOLD} there", "scaling")


@njit(cache=True, nogil=True)
def _is_better(value, best):
    """What is no number is better than any."""
    return value > best or (value != value and best == best)


@njit(cache=True, nogil=True)
def _best(wanted, is_left):
    """The first of the best that are left; taken."""
    best = -1
    for i in range(len(wanted)):
        if is_left[i] and (best < 0 or _is_better(wanted[i], wanted[best])):
            best = i
    is_left[best] = False
    return best


@njit(cache=True, nogil=True)
def _shares(row, sigmoid, shares):
    if sigmoid:
        for i in range(len(row)):
            shares[i] = float32(1) / (float32(1) + math.exp(-row[i]))
        return
    largest, total = row[0], float32(0)
    for value in row:
        largest = value if value > largest else largest
    for i in range(len(row)):
        shares[i] = math.exp(row[i] - largest)
        total += shares[i]
    for i in range(len(row)):
        shares[i] /= total


@njit(cache=True, nogil=True)
def _leave_groups_out(wanted, groups, kept, of_group, is_left):
    size = len(wanted) // groups
    best, is_free = np.zeros(groups, np.float32), np.ones(groups, np.bool_)
    for group in range(groups):
        for _ in range(of_group):
            best[group] += wanted[group * size + _best(wanted[group * size:(group + 1) * size],
                                                       is_left[group * size:(group + 1) * size])]
    is_left[:] = False
    for _ in range(kept):
        group = _best(best, is_free)
        is_left[group * size:(group + 1) * size] = True


@njit(cache=True, nogil=True)
def _route_one(row, a, ids, shares):
    """a: the record, of this and all other tokens."""
    n = len(row)
    every, is_left = np.empty(n, np.float32), np.ones(n, np.bool_)
    _shares(row, a.sigmoid, every)
    wanted = every
    if a.correction:
        wanted = every + carray(pointer(a.correction), n, float32)
    if a.groups > 1:
        _leave_groups_out(wanted, a.groups, a.kept, a.of_group, is_left)
    taken = float32(LEAST) if a.sigmoid else float32(0)
    for k in range(len(ids)):
        best = _best(wanted, is_left)
        ids[k], shares[k] = best, every[best]
        taken += every[best]
    for k in range(len(ids)):
        share = shares[k] / taken if a.renormalised else shares[k]
        shares[k] = share * a.scaling
        if a.factors:
            shares[k] *= carray(pointer(a.factors), n, float32)[ids[k]]


@task
def _route(table):
    a = carray(pointer(table), 1, RECORD)[0]
    logits = carray(pointer(a.logits), (a.tokens, a.experts), float32)
    ids = carray(pointer(a.ids), (a.tokens, a.routed), int64)
    shares = carray(pointer(a.shares), (a.tokens, a.routed), float32)
    for t in range(a.tokens):
        _route_one(logits[t], a, ids[t], shares[t])


def route(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.route.route."""
    logits = logits.contiguous()
    ids = torch.empty(len(logits), choice.top_k, dtype=torch.int64)
    shares = torch.empty(len(logits), choice.top_k, dtype=torch.float32)
    run(_route, RECORD, 1, 0, **_told(logits, choice, ids, shares))
    return ids, shares


def _told(logits: Tensor, choice: Choice, ids: Tensor, shares: Tensor) -> dict[str, float]:
    top_k, renormalised, sigmoid, correction, groups, kept, of_group, scaling, factors = choice
    return dict(experts=logits.shape[1], routed=top_k, tokens=len(logits), renormalised=renormalised, sigmoid=sigmoid,
                correction=address(correction), groups=groups, kept=kept, of_group=of_group, scaling=scaling,
                factors=address(factors), logits=address(logits), ids=address(ids), shares=address(shares))


@task
def _route_near(table):
    """One token's; stops the program where one of the experts is not there."""
    a = carray(pointer(table), 1, NEAR)[0]
    ids, there = carray(pointer(a.ids), a.routed, int32), carray(pointer(a.there), a.experts, int8)
    _route_one(carray(pointer(a.logits), a.experts, float32), a, ids, carray(pointer(a.shares), a.routed, float32))
    for expert in ids:
        if not there[expert]:
            carray(pointer(table), 1, int64)[0] = STOP


def routing(logits: Tensor, choice: Choice, ids: Tensor, shares: Tensor, there: np.ndarray) -> Step:
    """The step of `route` for logits float32 [1, E], into ids int32 and shares float32 [1, k]. there: bool [E], which
    experts are near; where one is not, the program stops here, and goes on from here once it is."""
    record = pack(NEAR, 1, **_told(logits, choice, ids, shares), there=there.ctypes.data)
    return Step(_route_near, record, (logits, choice, ids, shares, there), whole=True)
