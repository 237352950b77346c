"""Compiled twin of kernels/select.py: three counts of 8 bits find the smallest key that is kept, one pass lists them.

Legend: T tokens, N scores of a token.
"""
from __future__ import annotations

import numpy as np
import torch
from numba import njit

from kernels.select import FLOE, KEY_SHIFT, REFINED

Tensor = torch.Tensor

KEY_BITS, DIGIT = 24, 8     # bits


@njit(cache=True, nogil=True)
def _least(keys, n, counts):
    """The smallest of the n largest keys, and how many of the keys that equal it are among them: digit after digit,
    the largest first. counts int32 [2**DIGIT]"""
    least, left = 0, n
    for shift in range(KEY_BITS - DIGIT, -1, -DIGIT):
        counts[:] = 0
        for key in keys:
            if key >> shift + DIGIT == least:
                counts[key >> shift & 2**DIGIT - 1] += 1
        digit = 2**DIGIT - 1
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        least = least << DIGIT | digit
    return least, left


@njit("void(float32[:,::1], int64, int64, int32[:,::1], int8[:,::1])", cache=True, nogil=True)
def _select(scores, n_refined, n_total, neurons, fidelity):
    counts = np.empty(2**DIGIT, np.int32)
    neurons[:], fidelity[:] = -1, 0
    if not n_total:
        return
    for t in range(len(scores)):
        keys = (scores[t].view(np.int32) & 0x7FFFFFFF) >> KEY_SHIFT
        least, equal = _least(keys, n_total, counts)
        best, equally_good = _least(keys, n_refined, counts) if n_refined else (1 << KEY_BITS, 0)
        at = 0
        for neuron, key in enumerate(keys):
            if key < least or (key == least and not equal):
                continue
            equal -= key == least
            if key > best or (key == best and equally_good):
                equally_good -= key == best
                fidelity[t, at] = REFINED
            neurons[t, at] = neuron
            at += 1


def select(scores: Tensor, n_refined: int | Tensor, n_total: int | Tensor, capacity: int | None = None,
           histogram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.select.select."""
    n_refined, n_total = int(n_refined), int(n_total)
    capacity = n_total if capacity is None else capacity
    assert 0 <= n_refined <= n_total <= capacity <= scores.shape[1], (n_refined, n_total, capacity, scores.shape)
    neurons = torch.empty(len(scores), capacity, dtype=torch.int32)
    fidelity = torch.empty(len(scores), capacity, dtype=torch.int8)
    _select(scores.detach().contiguous().numpy(), n_refined, n_total, neurons.numpy(), fidelity.numpy())
    if histogram is not None:
        histogram.zero_()
    return neurons, fidelity


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
