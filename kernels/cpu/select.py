"""Compiled twin of kernels/select.py: three counts, digit after digit, find the smallest key that is kept and the
smallest that is refined, one pass lists them. The first digit is the largest, so that few keys count behind it.

Legend: T tokens, N scores of a token.
"""
from __future__ import annotations

import numpy as np
import torch
from numba import carray, float32, int8, int32, njit

from kernels.cpu.threads import Step, address, call, fields, pack, pointer, task
from kernels.select import FLOE, KEY_SHIFT, REFINED

Tensor = torch.Tensor

FIRST = 10                              # bits of the largest digit
DIGITS = ((14, FIRST), (7, 7), (0, 7))  # where each begins in a key, and its bits


@njit(cache=True, nogil=True)
def _down(counts, above, left, bits):
    """From the largest digit down to that of the key number `left` -> the key's digits so far, and its number there."""
    digit = 2**bits - 1
    while counts[digit] < left:
        left -= counts[digit]
        digit -= 1
    return above << bits | digit, left


@njit(cache=True, nogil=True)
def _choose(scores, n_refined, n_total, counts, neurons, fidelity):
    """One token's: scores float32 [N], neurons int32 and fidelity int8 [capacity]. counts: room, int32 [2, 2**FIRST]"""
    keys = (scores.view(np.int32) & 0x7FFFFFFF) >> KEY_SHIFT
    least, best, equal, equally_good = 0, 0, n_total, n_refined
    for shift, bits in DIGITS:
        counts[:, :2**bits] = 0
        for key in keys:
            above, digit = key >> shift + bits, key >> shift & 2**bits - 1
            if above == least:
                counts[0, digit] += 1
            if above == best:
                counts[1, digit] += 1
        least, equal = _down(counts[0], least, equal, bits)
        best, equally_good = _down(counts[1], best, equally_good, bits)
    at = neuron = 0
    while at < n_total:     # without branches, which nobody could foresee
        key = keys[neuron]
        keep, refine = (key > least) | (key == least) & (equal > 0), (key > best) | (key == best) & (equally_good > 0)
        equal -= key == least
        equally_good -= key == best
        neurons[at], fidelity[at] = neuron, REFINED if refine else 0
        at += keep
        neuron += 1
    neurons[n_total:], fidelity[n_total:] = -1, 0


RECORD = fields("tokens scores per_token refined total neurons fidelity capacity")


@task
def _select(table):
    a = carray(pointer(table), 1, RECORD)[0]
    scores = carray(pointer(a.scores), (a.tokens, a.per_token), float32)
    neurons = carray(pointer(a.neurons), (a.tokens, a.capacity), int32)
    fidelity = carray(pointer(a.fidelity), (a.tokens, a.capacity), int8)
    counts = np.empty((2, 2**FIRST), np.int32)
    for t in range(a.tokens):
        _choose(scores[t], a.refined, a.total, counts, neurons[t], fidelity[t])


def selecting(scores: Tensor, n_refined: int, n_total: int, capacity: int) -> tuple[Step, Tensor, Tensor]:
    """The step that chooses of scores float32 [T, N], and the neurons and fidelity that it writes."""
    assert 0 <= n_refined <= n_total <= capacity <= scores.shape[1], (n_refined, n_total, capacity, scores.shape)
    neurons = torch.empty(len(scores), capacity, dtype=torch.int32)
    fidelity = torch.empty(len(scores), capacity, dtype=torch.int8)
    record = pack(RECORD, 1, tokens=len(scores), scores=address(scores), per_token=scores.shape[1], refined=n_refined,
                  total=n_total, neurons=address(neurons), fidelity=address(fidelity), capacity=capacity)
    return Step(_select, record, (scores, neurons, fidelity), whole=True), neurons, fidelity


def select(scores: Tensor, n_refined: int | Tensor, n_total: int | Tensor, capacity: int | None = None,
           histogram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.select.select."""
    n_refined, n_total = int(n_refined), int(n_total)
    step, *chosen = selecting(scores.detach().contiguous(), n_refined, n_total,
                              n_total if capacity is None else capacity)
    call(step)
    if histogram is not None:
        histogram.zero_()
    return tuple(chosen)


@njit("int64(float32[:,::1], float32[:,::1], int32[:,::1])", cache=True, nogil=True)
def _select_above(scores, threshold, neurons):
    """-> the number kept of the last token."""
    neurons[:] = -1
    at = 0
    for t in range(len(scores)):
        at = 0
        for neuron in range(scores.shape[1]):
            if at < neurons.shape[1] and not scores[t, neuron] <= threshold[t, neuron]:
                neurons[t, at] = neuron
                at += 1
    return at


def select_above(scores: Tensor, threshold: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.select.select_above."""
    assert capacity is not None or len(scores) == 1, "one token at a time: the number kept differs between tokens"
    neurons = torch.empty(len(scores), scores.shape[1] if capacity is None else capacity, dtype=torch.int32)
    threshold = threshold.expand_as(scores).contiguous()
    kept = _select_above(scores.detach().contiguous().numpy(), threshold.numpy(), neurons.numpy())
    if capacity is None:
        neurons = neurons[:, :kept].contiguous()
    return neurons, torch.full_like(neurons, FLOE, dtype=torch.int8)
