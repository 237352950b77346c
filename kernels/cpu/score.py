"""Compiled twin of kernels/score.py: every sketch row of the routed experts once, at the speed of memory.

Legend as there; a piece of work is ROWS neurons of one token's routed expert.
"""
from __future__ import annotations

import numpy as np
import torch
from numba import carray, float32, int32, njit

from kernels.activation import KINDS, Gate, NeuronBias
from kernels.cpu.activation import blocks8
from kernels.cpu.gate import BIAS, bias_fields, biases_of, gated, kind_of
from kernels.cpu.rows import LINE, add_lines, ask_for, score_rows
from kernels.cpu.threads import Step, address, call, claim, fields, pack, pointer, task
from kernels.cpu.vectors import LANES
from kernels.layout import Layout
from kernels.select import BIN_SHIFT

Tensor = torch.Tensor

ROWS = 64
AHEAD = 4   # rows: without asking for them the processor stops at every page of 4 KiB (measured: half the speed)
UP_ONLY = -1    # in place of a gate's kind: score_up


@njit(cache=True, nogil=True)
def _lines(row, x, n_blocks, a, lines):
    """Of a neuron gate's line and up's, or up's alone."""
    if a.kind == UP_ONLY:
        at, pairs, up = row + a.plane, row + 2 * a.plane + a.scales, lines + LANES * LINE
        score_rows(at, pairs, a.scales, x, n_blocks, up, LANES * LINE, a.group, 1)
    else:
        score_rows(row, row + 2 * a.plane, a.scales, x, n_blocks, lines, LANES * LINE, a.group, 2)


RECORD = fields("pairs routed neurons row_bytes plane scales group x x_bytes sketches stride place weight kind scores "
                + " ".join(BIAS), floats="alpha limit")


@task
def _score(table):
    a = carray(pointer(table), 1, RECORD)[0]
    slots, weights = carray(pointer(a.place), a.pairs, int32), carray(pointer(a.weight), a.pairs, float32)
    scores, n_blocks = carray(pointer(a.scores), (a.pairs, a.neurons), float32), a.plane // LINE
    per_pair = (a.neurons + ROWS - 1) // ROWS
    both, found = np.empty((2, LANES, LANES), np.float32), np.empty((3, LANES), np.float32)
    piece = claim(table)
    while piece < a.n_pieces:
        lines, gate = both.ctypes.data, found.ctypes.data   # taken here, because an array lives up to its last use
        up, out = gate + LINE, gate + 2 * LINE
        pair, start = piece // per_pair, piece % per_pair * ROWS
        x, sketch = a.x + pair // a.routed * a.x_bytes, a.sketches + slots[pair] * a.stride
        gate_bias, up_bias = biases_of(a, pair, a.neurons)
        for first in range(start, min(start + ROWS, a.neurons), LANES):
            n = min(LANES, a.neurons - first)
            for i in range(n):
                row = sketch + (first + i) * a.row_bytes
                ask_for(row + AHEAD * a.row_bytes, a.row_bytes)
                _lines(row, x, n_blocks, a, lines + i * LINE)
            add_lines(lines + LANES * LINE, up)
            if a.bias_ids:
                found[1, :n] += up_bias[first:first + n]
            if a.kind == UP_ONLY:
                for i in range(n):
                    scores[pair, first + i] = abs(found[1, i])
                continue
            add_lines(lines, gate)
            if a.bias_ids:
                found[0, :n] += gate_bias[first:first + n]
            gated(gate, up, out, a.kind, a.alpha, a.limit)
            for i in range(n):
                scores[pair, first + i] = abs(found[2, i] * weights[pair])
        piece = claim(table)


def score(codes: Tensor, scales: Tensor, sketches: Tensor, place: Tensor, weight: Tensor, layout: Layout,
          gate: Gate, bias: NeuronBias | None = None, histogram: Tensor | None = None) -> Tensor:
    """As kernels.score.score."""
    if gate.kind not in KINDS:
        return NotImplemented
    scores = _launch(codes, scales, sketches, place, weight, layout, kind_of(gate), bias, gate)
    if histogram is not None:
        _count(scores.numpy(), histogram.numpy())
    return scores


def score_up(codes: Tensor, scales: Tensor, sketches: Tensor, place: Tensor, layout: Layout,
             bias: NeuronBias | None = None) -> Tensor:
    """As kernels.score.score_up."""
    return _launch(codes, scales, sketches, place, scales, layout, UP_ONLY, bias, Gate())


def _launch(codes: Tensor, scales: Tensor, sketches: Tensor, place: Tensor, weight: Tensor, layout: Layout, kind: int,
            bias: NeuronBias | None, gate: Gate) -> Tensor:
    x, place, weight = blocks8(codes, scales), place.int().contiguous(), weight.contiguous()
    scores = torch.empty(len(place), place.shape[1] * layout.neurons, dtype=torch.float32)
    call(scoring(x, sketches, place, weight, layout, kind, gate, scores, bias))
    return scores


def scoring(x: Tensor, sketches: Tensor, place: Tensor, weight: Tensor, layout: Layout, kind: int, gate: Gate,
            scores: Tensor, bias: NeuronBias | None = None) -> Step:
    """The step that writes scores float32 [T, k * I]. x: of `blocks8`; place int32 and weight float32 [T, k]."""
    assert sketches.stride(1) == 1 and sketches.shape[1] >= layout.neurons * layout.sketch_row, sketches.shape
    (tokens, routed), neurons, (tables, addresses) = place.shape, layout.neurons, bias_fields(bias)
    record = pack(
        RECORD, tokens * routed * -(-neurons // ROWS), scores.numel() * layout.sketch_row,
        pairs=tokens * routed, routed=routed, neurons=neurons, row_bytes=layout.sketch_row, plane=layout.plane2,
        scales=layout.scales, group=layout.group, x=address(x), x_bytes=x.stride(0), sketches=address(sketches),
        stride=sketches.stride(0), place=address(place), weight=address(weight), kind=kind,
        scores=address(scores), alpha=gate.alpha, limit=gate.limit, **addresses)
    return Step(_score, record, (x, sketches, place, weight, scores, tables))


@njit("void(float32[:,::1], int32[:,::1])", cache=True, nogil=True)
def _count(scores, histogram):
    for t in range(len(scores)):
        for bits in scores[t].view(np.int32):
            histogram[t, bits >> BIN_SHIFT] += 1
