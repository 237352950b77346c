"""Compiled twin of kernels/apply.py and kernels/dense.py: one pass over the chosen neurons, 32 at a time.

Of 32 neurons first gate(g, u) from sketch rows and records with the activation in 16-bit fixed point, then their down
rows (`down.py`) while those lie in the cache. A piece of work is up to PIECE neurons of one expert in the order of the
list; pieces are added in their order at the end. So what is summed with what depends on the list of neurons alone.

Legend: T tokens, k routed experts, I neurons, H padded hidden, N ranks in the list of neurons (dense: k * I).
"""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numba import carray, float32, int8, int32, int64, njit

from kernels.activation import KINDS, FixedPoint, Gate, NeuronBias
from kernels.cpu.activation import blocks16
from kernels.cpu.down import NEURONS, TILE, add_rows, weigh_rows, weights_bytes
from kernels.cpu.gate import BIAS, bias_fields, biases_of, gated, kind_of
from kernels.cpu.rows import CODES, LINE, add_lines, ask_for, coarse_rows, fine_rows
from kernels.cpu.threads import Step, address, call, claim, fields, pack, pointer, task
from kernels.cpu.vectors import LANES
from kernels.layout import Layout
from kernels.select import DOWN_ONLY, REFINED
from kernels.weigh import Mixture

Tensor = torch.Tensor

PIECE = 4 * NEURONS     # neurons
AHEAD = 2               # neurons whose rows are asked for before their turn
SIZES = ("plane2", "scales", "group", "groups", "padded", "sketch_row", "sketch_bytes", "record", "prefix",
         "record_scales_at", "refine_at")       # of a layout
RECORD = fields(" ".join(SIZES) + " pieces n_ranks routed per_expert slots n_slots blobs stride neurons fidelity "
                "record_places records record_stride x x_bytes kind weights_bytes partial out " + " ".join(BIAS),
                floats="alpha limit")


@njit(cache=True, nogil=True)
def _lines(row, record, kind, x, a, out):
    """Gate's line and up's of a neuron, at 4 or at 2 bits."""
    pairs, fine = record + a.record_scales_at + a.scales, record + a.refine_at
    coarse, blocks = row + 2 * a.plane2, a.padded // CODES
    if kind == REFINED:
        fine_rows(row, fine, pairs, a.scales, x, blocks, out, LANES * LINE, a.group, 2)
    elif kind == DOWN_ONLY:
        coarse_rows(row, coarse, a.scales, x, blocks, out, LANES * LINE, a.group, 2)
    else:       # FLOE: of up the sketch
        up, up_pairs, up_out = row + a.plane2, coarse + a.scales, out + LANES * LINE
        fine_rows(row, fine, pairs, a.scales, x, blocks, out, LANES * LINE, a.group, 1)
        coarse_rows(up, up_pairs, a.scales, x, blocks, up_out, LANES * LINE, a.group, 1)


@njit(cache=True, nogil=True)
def locate(a, token, expert, start, n, row, record, fidelity, index):
    """Addresses of n neurons from rank `start` on, and what is wanted of them."""
    slot = carray(pointer(a.slots), a.n_slots, int32)[token * a.routed + expert]
    blob, first = a.blobs + slot * a.stride, token * a.n_ranks + start
    if not a.neurons:       # dense
        for i in range(n):
            index[i] = start + i
            neuron = start + i - expert * a.per_expert
            row[i], record[i] = blob + neuron * a.sketch_row, blob + a.sketch_bytes + neuron * a.record
            fidelity[i] = REFINED
        return
    neurons = carray(pointer(a.neurons + 4 * first), n, int32)
    places = carray(pointer(a.record_places + 4 * first), n, int32)
    kinds = carray(pointer(a.fidelity + first), n, int8)
    for i in range(n):
        neuron = neurons[i] - expert * a.per_expert
        index[i], fidelity[i], row[i] = neurons[i], kinds[i], blob + neuron * a.sketch_row
        if a.record_places:
            record[i] = a.records + places[i] * a.record_stride
        else:       # the sketches' blobs are whole
            record[i] = blob + a.sketch_bytes + neuron * a.record


@njit(cache=True, nogil=True)
def _products(a, token, expert, n, row, record, fidelity, index, lines, products):
    """gate(g, u) of n located neurons of a routed expert. lines: room for those of 16 neurons, and for their sums."""
    x, first_neuron = a.x + token * a.x_bytes, expert * a.per_expert
    gate_bias, up_bias = biases_of(a, token * a.routed + expert, a.per_expert)
    gate, up = lines + 2 * LANES * LINE, lines + (2 * LANES + 1) * LINE
    g, u = carray(pointer(gate), LANES, float32), carray(pointer(up), LANES, float32)
    for first in range(0, n, LANES):
        for i in range(first, min(first + LANES, n)):
            for j in range(0 if i == 0 else AHEAD, AHEAD + 1):
                if i + j < n:
                    ask_for(row[i + j], a.sketch_row)
                    ask_for(record[i + j], a.prefix if fidelity[i + j] == DOWN_ONLY else a.record)
            _lines(row[i], record[i], fidelity[i], x, a, lines + (i - first) * LINE)
        add_lines(lines, gate)
        add_lines(lines + LANES * LINE, up)
        if a.bias_ids:
            for i in range(first, min(first + LANES, n)):
                g[i - first] += gate_bias[index[i] - first_neuron]
                u[i - first] += up_bias[index[i] - first_neuron]
        gated(gate, up, products + 4 * first, a.kind, a.alpha, a.limit)


@njit(cache=True, nogil=True)
def _add_down(a, records, products, weights, out):
    """out float32 [H] += the 32 down rows, each times its product. Addresses all."""
    weigh_rows(records, products, a.record_scales_at, (a.groups + 15) // 16, weights)
    add_rows(records, weights, a.padded // TILE, out, a.group)


@task
def _add_neurons(table):
    a = carray(pointer(table), 1, RECORD)[0]
    pieces = carray(pointer(a.pieces), (a.n_pieces, 4), int32)
    row, record, index = np.empty(NEURONS, np.int64), np.empty(NEURONS, np.int64), np.empty(NEURONS, np.int64)
    fidelity, products = np.empty(NEURONS, np.int8), np.empty(NEURONS, np.float32)
    weights, lines = np.empty(a.weights_bytes, np.int8), np.empty((2 * LANES + 2) * LINE, np.int8)
    piece = claim(table)
    while piece < a.n_pieces:
        token, expert, first, last = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2], pieces[piece, 3]
        out = a.partial + piece * 4 * a.padded
        carray(pointer(out), a.padded, float32)[:] = 0
        for start in range(first, last, NEURONS):
            n = min(NEURONS, last - start)
            locate(a, token, expert, start, n, row, record, fidelity, index)
            _products(a, token, expert, n, row, record, fidelity, index, lines.ctypes.data, products.ctypes.data)
            record[n:], products[n:] = record[0], 0
            _add_down(a, record.ctypes.data, products.ctypes.data, weights.ctypes.data, out)
        piece = claim(table)


@njit(cache=True, nogil=True)
def most_pieces(n_ranks, tokens, routed):
    return tokens * (n_ranks // PIECE + routed)


@njit(cache=True, nogil=True)
def list_pieces(neurons, routed, per_expert, pieces):
    """neurons int32 [T, N] ascending, then -1 -> how many pieces, int32 [.., 4]: token, expert, first rank, and the one
    behind."""
    n = 0
    for token in range(len(neurons)):
        rank, ranks = 0, neurons.shape[1]
        while rank < ranks and neurons[token, rank] >= 0:
            expert, first = neurons[token, rank] // per_expert, rank
            while (rank < ranks and rank < first + PIECE and neurons[token, rank] >= 0
                   and neurons[token, rank] // per_expert == expert):
                rank += 1
            pieces[n, 0], pieces[n, 1], pieces[n, 2], pieces[n, 3] = token, expert, first, rank
            n += 1
    return n


@task
def _divide(table):
    """The list of pieces, and their number, of the record that `_add_neurons` will get, too."""
    a = carray(pointer(table), 1, RECORD)[0]
    tokens = a.n_slots // a.routed
    neurons = carray(pointer(a.neurons), (tokens, a.n_ranks), int32)
    pieces = carray(pointer(a.pieces), (most_pieces(a.n_ranks, tokens, a.routed), 4), int32)
    carray(pointer(table), 2, int64)[1] = list_pieces(neurons, a.routed, a.per_expert, pieces)


@lru_cache(64)
def every_piece(tokens: int, routed: int, per_expert: int) -> np.ndarray:
    """As of `list_pieces`, where every neuron is in the list."""
    firsts = np.arange(0, per_expert, PIECE)
    pieces = np.empty((tokens, routed, len(firsts), 4), np.int32)
    pieces[..., 0] = np.arange(tokens)[:, None, None]
    pieces[..., 1] = np.arange(routed)[:, None]
    pieces[..., 2] = np.arange(routed)[:, None] * per_expert + firsts
    pieces[..., 3] = np.arange(routed)[:, None] * per_expert + np.minimum(firsts + PIECE, per_expert)
    return pieces.reshape(-1, 4)


@task
def _add_pieces(table):
    """out float32 [T, k, H] = the sums of the pieces [n, H], in their order."""
    a = carray(pointer(table), 1, RECORD)[0]
    pieces = carray(pointer(a.pieces), (a.n_pieces, 4), int32)
    partial = carray(pointer(a.partial), (a.n_pieces, a.padded), float32)
    out = carray(pointer(a.out), (a.n_slots, a.padded), float32)
    out[:] = 0
    for n in range(a.n_pieces):
        total = out[pieces[n, 0] * a.routed + pieces[n, 1]]
        for i in range(a.padded):
            total[i] += partial[n, i]


WEIGH_RECORD = fields("tokens routed padded hidden sums weights residual out")


@task
def _weigh(table):
    """out float32 [T, H] = residual + the experts' sums times their weights, in their order."""
    a = carray(pointer(table), 1, WEIGH_RECORD)[0]
    sums = carray(pointer(a.sums), (a.tokens, a.routed, a.padded), float32)
    weights = carray(pointer(a.weights), (a.tokens, a.routed), float32)
    residual = carray(pointer(a.residual), (a.tokens, a.hidden), float32)
    out = carray(pointer(a.out), (a.tokens, a.hidden), float32)
    for t in range(a.tokens):
        out[t] = 0
        for k in range(a.routed):
            share, row = weights[t, k], sums[t, k]
            for i in range(a.hidden):
                out[t, i] += row[i] * share
        if a.residual:
            for i in range(a.hidden):
                out[t, i] = residual[t, i] + out[t, i]


def apply(x: Tensor, sketches: Tensor, place: Tensor, records: Tensor, record_place: Tensor, neurons: Tensor,
          fidelity: Tensor, layout: Layout, gate: Gate, bias: NeuronBias | None = None,
          mixture: Mixture | None = None, fixed: FixedPoint | None = None) -> Tensor:
    """As kernels.apply.apply."""
    if gate.kind not in KINDS:
        return NotImplemented
    neurons, record_place, fidelity = neurons.int().contiguous(), record_place.int().contiguous(), fidelity.contiguous()
    assert neurons.shape == record_place.shape == fidelity.shape and fidelity.dtype == torch.int8
    assert records.stride(1) == 1 and records.shape[1] >= layout.record, (records.shape, layout.record)
    chosen = Chosen(neurons, fidelity, record_place, records)
    return _launch(x, sketches, place, layout, gate, chosen, bias, mixture)


def dense(x: Tensor, blobs: Tensor, place: Tensor, layout: Layout, gate: Gate, bias: NeuronBias | None = None,
          mixture: Mixture | None = None) -> Tensor:
    """As kernels.dense.dense."""
    if gate.kind not in KINDS:
        return NotImplemented
    assert blobs.shape[1] >= layout.blob_bytes, (blobs.shape, layout.blob_bytes)
    return _launch(x, blobs, place, layout, gate, None, bias, mixture)


def _launch(x: Tensor, sketches: Tensor, place: Tensor, layout: Layout, gate: Gate, chosen: Chosen | None,
            bias: NeuronBias | None, mixture: Mixture | None) -> Tensor:
    assert len(x) == len(place) and x.shape[1] in (layout.hidden, layout.padded), (x.shape, layout)
    blocks = blocks16(x, layout.group, layout.padded)
    steps, sums = adding(blocks, sketches, place.int().contiguous(), layout, gate, chosen, bias)
    for step in steps:
        call(step)
    return sums if mixture is None else _mixed(sums, mixture)


def _mixed(sums: Tensor, mixture: Mixture) -> Tensor:
    """As kernels.weigh.weigh; sums [T, k, H] are changed."""
    weights, hidden, residual, bias, ids = mixture
    if bias is not None:
        sums[..., :hidden] += bias[ids.long()]
    out = torch.empty(len(sums), hidden, dtype=torch.float32)
    call(weighing(sums, weights.contiguous(), None if residual is None else residual.contiguous(), out))
    return out


class Chosen(NamedTuple):
    """What `select` chose, int32 and int8 [T, N], and where the records are; None: in the sketches' own blobs."""

    neurons: Tensor
    fidelity: Tensor
    places: Tensor | None = None
    records: Tensor | None = None


@lru_cache(64)
def sizes_of(layout: Layout) -> dict[str, int]:
    return {name: getattr(layout, name) for name in SIZES}


def adding(blocks: Tensor, sketches: Tensor, place: Tensor, layout: Layout, gate: Gate, chosen: Chosen | None,
           bias: NeuronBias | None = None) -> tuple[list[Step], Tensor]:
    """The steps of `dense`, or of `apply` where neurons were chosen, and the sums float32 [T, k, H] that they make.
    blocks: of `blocks16`; place int32 [T, k]."""
    assert sketches.stride(1) == 1, sketches.stride()
    (tokens, routed), (neurons, fidelity, places, records) = place.shape, chosen or (None,) * 4
    (tables, addresses), n_ranks = bias_fields(bias), 0 if chosen is None else neurons.shape[1]
    pieces = (every_piece(tokens, routed, layout.neurons) if chosen is None else
              np.empty((most_pieces(n_ranks, tokens, routed), 4), np.int32))
    partial = torch.empty(len(pieces), layout.padded, dtype=torch.float32)
    out = torch.empty(tokens, routed, layout.padded, dtype=torch.float32)
    n_read = (tokens * n_ranks or tokens * routed * layout.neurons) * (layout.sketch_row + layout.record)
    record = pack(
        RECORD, len(pieces), n_read, **sizes_of(layout), pieces=pieces.ctypes.data, n_ranks=n_ranks, routed=routed,
        per_expert=layout.neurons, slots=address(place), n_slots=place.numel(), blobs=address(sketches),
        stride=sketches.stride(0), neurons=address(neurons), fidelity=address(fidelity), record_places=address(places),
        records=address(records), record_stride=0 if records is None else records.stride(0), x=address(blocks),
        x_bytes=blocks.stride(0), kind=kind_of(gate), weights_bytes=weights_bytes(layout.groups),
        partial=address(partial), out=address(out), alpha=gate.alpha, limit=gate.limit, **addresses)
    alive = (blocks, sketches, place, chosen, tables, pieces, partial, out)
    steps = [Step(_add_neurons, record, alive), Step(_add_pieces, record, alive, whole=True)]
    return ([] if chosen is None else [Step(_divide, record, alive, whole=True)]) + steps, out


def weighing(sums: Tensor, weights: Tensor, residual: Tensor | None, out: Tensor) -> Step:
    """The step of kernels/weigh.py, without a bias, into out float32 [T, H], on top of residual where there is one."""
    (tokens, routed, padded), hidden = sums.shape, out.shape[1]
    record = pack(WEIGH_RECORD, 1, tokens=tokens, routed=routed, padded=padded, hidden=hidden, sums=address(sums),
                  weights=address(weights), residual=address(residual), out=address(out))
    return Step(_weigh, record, (sums, weights, residual, out), whole=True)
