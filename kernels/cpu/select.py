"""Compiled twin of kernels/select.py: counts, digit after digit, find the smallest key that is kept and the smallest
that is refined, one pass lists them. The first digit is the largest: all keys count for it, few behind it.

Legend: T tokens, N scores of a token.
"""
from __future__ import annotations

import numpy as np
import torch
from numba import carray, float32, int8, int32, njit

from kernels.cpu.threads import Step, address, call, fields, pack, pointer, task
from kernels.select import FLOE, KEY_SHIFT, REFINED

Tensor = torch.Tensor

FIRST, REST = 10, 14        # bits of the largest digit, and behind it
DIGITS = ((7, 7), (0, 7))   # the others: where each begins in a key, and its bits


@njit(cache=True, nogil=True)
def _down(counts, above, left, bits):
    """From the largest digit down to that of the key number `left` -> the key's digits so far, and its number there."""
    digit = 2**bits - 1
    while counts[digit] < left:
        left -= counts[digit]
        digit -= 1
    return above << bits | digit, left


@njit(cache=True, nogil=True)
def _key_of(found, left, keys, candidates, counts):
    """Of all that begin with the digit `found` the key number `left`, from the largest -> it, and its number among its
    equals. candidates: room, int32 [N]"""
    n = 0
    for key in keys:        # without branches, as below
        candidates[n] = key
        n += key >> REST == found
    for shift, bits in DIGITS:
        counts[:2**bits] = 0
        for key in candidates[:n]:
            counts[key >> shift & 2**bits - 1] += key >> shift + bits == found
        found, left = _down(counts, found, left, bits)
    return found, left


@njit(cache=True, nogil=True)
def _choose(scores, n_refined, n_total, counts, candidates, neurons, fidelity):
    """One token's: scores float32 [N], neurons int32 and fidelity int8 [capacity]. counts, candidates: room, int32
    [2, 2**FIRST] and [N]"""
    keys = (scores.view(np.int32) & 0x7FFFFFFF) >> KEY_SHIFT
    counts[:] = 0
    for i in range(len(keys)):      # by turns: equal neighbours would wait for each other's count
        counts[i & 1, keys[i] >> REST] += 1
    counts[0] += counts[1]
    digit, equal = _down(counts[0], 0, n_total, FIRST)
    digit_of_best, equally_good = _down(counts[0], 0, n_refined, FIRST)
    least, equal = _key_of(digit, equal, keys, candidates, counts[1])
    best, equally_good = _key_of(digit_of_best, equally_good, keys, candidates, counts[1])
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
    counts, candidates = np.empty((2, 2**FIRST), np.int32), np.empty(a.per_token, np.int32)
    for t in range(a.tokens):
        _choose(scores[t], a.refined, a.total, counts, candidates, neurons[t], fidelity[t])


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
