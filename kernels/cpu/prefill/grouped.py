"""Compiled twin of `grouped` in kernels/dense.py: prefill from the packed codes, nothing decoded into memory.

Each code that is read meets up to TOGETHER tokens, AT_ONCE of them while it is in a register. Sums are those of
`dense`, in its order: gate(g, u) of 32 neurons, then their down rows, and 128 neurons before they are added to the
others. A piece of work is one expert over up to TOGETHER of its tokens, so results do not depend on what stands beside.

Legend: n rows of the activation, I neurons, H padded hidden.
"""
from __future__ import annotations

import numpy as np
import torch
from numba import carray, float32, int64, njit

from kernels.activation import KINDS, Gate, NeuronBias
from kernels.cpu.activation import blocks16
from kernels.cpu.apply import AHEAD, PIECE, SIZES
from kernels.cpu.down import NEURONS, TILE, rows_into_words, weigh_rows, weights_bytes, words_times
from kernels.cpu.gate import BIAS, bias_fields, biases_of, gated, kind_of
from kernels.cpu.rows import AT_ONCE, CODES, LINE, add_lines, ask_for, fine_tokens
from kernels.cpu.threads import address, claim, fields, pointer, run, task
from kernels.cpu.vectors import LANES
from kernels.layout import Layout

Tensor = torch.Tensor

TOGETHER = 32                           # tokens: their activations and sums stay in the second cache
LINES = 2 * LANES * LINE                # bytes: gate's and up's lines of 16 neurons, of one token
RECORD = fields(" ".join(SIZES) + " neurons items x x_bytes kind weights_bytes out " + " ".join(BIAS),
                floats="alpha limit")


@njit(cache=True, nogil=True)
def _lines(row, record, x, n, a, lines):
    """Gate's line and up's of a neuron for n tokens: AT_ONCE, 2 or 1."""
    blocks = a.padded // CODES
    for which in range(2):
        plane, fine = row + which * a.plane2, record + a.refine_at + which * a.plane2
        pairs, out = record + a.record_scales_at + (1 + which) * a.scales, lines + which * LANES * LINE
        fine_tokens(plane, fine, pairs, x, a.x_bytes, blocks, out, LINES, a.group, n)


@njit(cache=True, nogil=True)
def _products(blob, first, n_neurons, x, n_tokens, expert, a, lines, products):
    """gate(g, u) of up to 32 neurons from `first` on -> products float32 [tokens, 32]. Addresses but for numbers."""
    size = AT_ONCE if n_tokens >= AT_ONCE else 2 if n_tokens >= 2 else 1
    gate_bias, up_bias = biases_of(a, expert, a.neurons)
    sums = lines + AT_ONCE * LINES
    g, u = carray(pointer(sums), LANES, float32), carray(pointer(sums + LINE), LANES, float32)
    for begin in range(0, n_tokens, size):
        token = min(begin, n_tokens - size)     # the last ones overlap with those before: the same once more
        for start in range(0, n_neurons, LANES):
            n = min(LANES, n_neurons - start)
            for i in range(n):
                neuron = first + start + i
                if begin == 0:
                    ahead = min(neuron + AHEAD, a.neurons - 1)
                    ask_for(blob + ahead * a.sketch_row, a.sketch_row)
                    ask_for(blob + a.sketch_bytes + ahead * a.record, a.record)
                _lines(blob + neuron * a.sketch_row, blob + a.sketch_bytes + neuron * a.record,
                       x + token * a.x_bytes, size, a, lines + i * LINE)
            for t in range(size):
                add_lines(lines + t * LINES, sums)
                add_lines(lines + t * LINES + LANES * LINE, sums + LINE)
                if a.bias_ids:
                    for i in range(n):
                        g[i] += gate_bias[first + start + i]
                        u[i] += up_bias[first + start + i]
                gated(sums, sums + LINE, products + 4 * ((token + t) * NEURONS + start), a.kind, a.alpha, a.limit)


@njit(cache=True, nogil=True)
def _add_down(records, products, n_tokens, a, weights, words, out):
    """out float32 [tokens, H] += the 32 down rows, each times its product."""
    for t in range(n_tokens):
        weigh_rows(records, products + 4 * t * NEURONS, a.record_scales_at, (a.groups + 15) // 16,
                   weights + t * a.weights_bytes)
    for tile in range(a.padded // TILE):
        rows_into_words(records, tile, words)
        words_times(words, weights, a.weights_bytes, tile, n_tokens, out, 4 * a.padded, a.group)


@task
def _experts(table):
    a = carray(pointer(table), 1, RECORD)[0]
    items = carray(pointer(a.items), (a.n_pieces, 4), int64)
    lines, records = np.empty(AT_ONCE * LINES + 2 * LINE, np.int8), np.empty(NEURONS, np.int64)
    products, words = np.empty((TOGETHER, NEURONS), np.float32), np.empty(8 * NEURONS * 16, np.int8)
    weights, partial = np.empty(TOGETHER * a.weights_bytes, np.int8), np.empty((TOGETHER, a.padded), np.float32)
    piece = claim(table)
    while piece < a.n_pieces:
        blob, expert, row, n_tokens = items[piece, 0], items[piece, 1], items[piece, 2], items[piece, 3]
        x, out = a.x + row * a.x_bytes, carray(pointer(a.out + row * 4 * a.padded), (n_tokens, a.padded), float32)
        out[:] = 0
        for start in range(0, a.neurons, PIECE):
            partial[:n_tokens] = 0
            for first in range(start, min(start + PIECE, a.neurons), NEURONS):
                n = min(NEURONS, a.neurons - first)
                for i in range(NEURONS):
                    records[i] = blob + a.sketch_bytes + (first + (i if i < n else 0)) * a.record
                _products(blob, first, n, x, n_tokens, expert, a, lines.ctypes.data, products.ctypes.data)
                products[:, n:] = 0
                _add_down(records.ctypes.data, products.ctypes.data, n_tokens, a, weights.ctypes.data,
                          words.ctypes.data, partial.ctypes.data)
            for t in range(n_tokens):
                for i in range(a.padded):
                    out[t, i] += partial[t, i]
        piece = claim(table)


def grouped(x: Tensor, blobs: list[Tensor], counts: list[int], layout: Layout, gate: Gate,
            bias: NeuronBias | None = None) -> Tensor:
    """As kernels.dense.grouped."""
    if gate.kind not in KINDS:
        return NotImplemented
    assert len(x) == sum(counts) and x.shape[1] in (layout.hidden, layout.padded), (x.shape, counts)
    blocks, first, items = blocks16(x, layout.group, layout.padded), 0, []
    out, (tables, addresses) = torch.empty(len(x), layout.padded, dtype=torch.float32), bias_fields(bias)
    for expert, (blob, count) in enumerate(zip(blobs, counts, strict=True)):
        items += [(address(blob), expert, first + at, min(TOGETHER, count - at)) for at in range(0, count, TOGETHER)]
        first += count
    table = np.array(items, np.int64).reshape(-1, 4)
    run(_experts, RECORD, len(table), len(table) * layout.blob_bytes,
        **{name: getattr(layout, name) for name in SIZES}, neurons=layout.neurons, items=table.ctypes.data,
        x=address(blocks), x_bytes=blocks.stride(0), kind=kind_of(gate), weights_bytes=weights_bytes(layout.groups),
        out=address(out), alpha=gate.alpha, limit=gate.limit, **addresses)
    del tables      # read until here
    return out
