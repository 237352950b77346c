"""Compiled twin of kernels/apply.py and kernels/dense.py: one pass over the chosen neurons, 32 at a time.

Of 32 neurons first gate(g, u) from sketch rows and records with the activation in 16-bit fixed point, then their down
rows (`down.py`) while those lie in the cache. A piece of work is up to PIECE neurons of one expert in the order of the
list; pieces are added in their order at the end. So what is summed with what depends on the list of neurons alone.

Legend: T tokens, k routed experts, I neurons, H padded hidden, N ranks in the list of neurons (dense: k * I).
"""
from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import carray, float32, int8, int32, njit

from kernels.activation import KINDS, Gate
from kernels.cpu.activation import blocks16
from kernels.cpu.down import NEURONS, TILE, add_rows, weigh_rows, weights_bytes
from kernels.cpu.gate import gated, kind_of
from kernels.cpu.rows import CODES, ask_for, coarse_row, fine_row
from kernels.cpu.threads import address, call, claim, fields, pack, pointer, task
from kernels.layout import Layout
from kernels.select import DOWN_ONLY, REFINED

Tensor = torch.Tensor

PIECE = 4 * NEURONS     # neurons
AHEAD = 2               # neurons whose rows are asked for before their turn
SIZES = ("plane2", "scales", "group", "groups", "padded", "sketch_row", "sketch_bytes", "record", "prefix",
         "record_scales_at", "refine_at")       # of a layout
RECORD = fields(" ".join(SIZES) + " pieces n_ranks routed per_expert slots n_slots blobs stride neurons fidelity "
                "record_places records record_stride x x_bytes kind gate_bias up_bias weights_bytes partial out",
                floats="alpha limit")


@njit(cache=True, nogil=True)
def _dot(row, record, fine, which, x, a):
    """Gate's (which 0) or up's (1) dot product of a neuron, at 4 or at 2 bits."""
    at, n_blocks = row + which * a.plane2, a.padded // CODES
    if fine:
        pairs, rest = record + a.record_scales_at + (1 + which) * a.scales, record + a.refine_at + which * a.plane2
        if a.group == 128:
            return fine_row(at, rest, pairs, x, n_blocks, 128)
        return fine_row(at, rest, pairs, x, n_blocks, 64)
    pairs = row + 2 * a.plane2 + which * a.scales
    return coarse_row(at, pairs, x, n_blocks, 128) if a.group == 128 else coarse_row(at, pairs, x, n_blocks, 64)


@njit(cache=True, nogil=True)
def _locate(a, token, expert, start, n, row, record, fidelity, index):
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
        index[i] = neurons[i]
        row[i] = blob + (neurons[i] - expert * a.per_expert) * a.sketch_row
        record[i], fidelity[i] = a.records + places[i] * a.record_stride, kinds[i]


@njit(cache=True, nogil=True)
def _products(a, token, n, row, record, fidelity, index, products):
    """gate(g, u) of n located neurons."""
    x, biases = a.x + token * a.x_bytes, a.routed * a.per_expert
    gate_bias = carray(pointer(a.gate_bias + 4 * token * biases), biases, float32)
    up_bias = carray(pointer(a.up_bias + 4 * token * biases), biases, float32)
    for i in range(n):
        for j in range(0 if i == 0 else AHEAD, AHEAD + 1):
            if i + j < n:
                ask_for(row[i + j], a.sketch_row)
                ask_for(record[i + j], a.prefix if fidelity[i + j] == DOWN_ONLY else a.record)
        gate = _dot(row[i], record[i], fidelity[i] != DOWN_ONLY, 0, x, a)
        up = _dot(row[i], record[i], fidelity[i] == REFINED, 1, x, a)
        if a.gate_bias:
            gate += gate_bias[index[i]]
            up += up_bias[index[i]]
        products[i] = gated(gate, up, a.kind, a.alpha, a.limit)


@njit(cache=True, nogil=True)
def _add_down(a, records, products, weights, out):
    """out float32 [H] += the 32 down rows, each times its product. Addresses all."""
    weigh_rows(records, products, a.record_scales_at, (a.groups + 15) // 16, weights)
    if a.group == 128:
        add_rows(records, weights, a.padded // TILE, out, 128)
    else:
        add_rows(records, weights, a.padded // TILE, out, 64)


@task
def _add_neurons(table):
    a = carray(pointer(table), 1, RECORD)[0]
    pieces = carray(pointer(a.pieces), (a.n_pieces, 4), int32)
    row, record, index = np.empty(NEURONS, np.int64), np.empty(NEURONS, np.int64), np.empty(NEURONS, np.int64)
    fidelity, products = np.empty(NEURONS, np.int8), np.empty(NEURONS, np.float32)
    weights = np.empty(a.weights_bytes, np.int8)
    piece = claim(table)
    while piece < a.n_pieces:
        token, expert, first, last = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2], pieces[piece, 3]
        out = a.partial + piece * 4 * a.padded
        carray(pointer(out), a.padded, float32)[:] = 0
        for start in range(first, last, NEURONS):
            n = min(NEURONS, last - start)
            _locate(a, token, expert, start, n, row, record, fidelity, index)
            record[n:] = record[0]
            products[n:] = 0
            _products(a, token, n, row, record, fidelity, index, products)
            _add_down(a, record.ctypes.data, products.ctypes.data, weights.ctypes.data, out)
        piece = claim(table)


@njit("int32[:,::1](int32[:,::1], int64, int64)", cache=True, nogil=True)
def _pieces_of(neurons, routed, per_expert):
    """neurons int32 [T, N] ascending, then -1 -> int32 [pieces, 4]: token, expert, first rank, and the one behind."""
    pieces = np.empty((neurons.size // PIECE + len(neurons) * routed, 4), np.int32)
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
    return pieces[:n]


@lru_cache(64)
def _every_piece(tokens: int, routed: int, per_expert: int) -> np.ndarray:
    """As `_pieces_of`, where every neuron is in the list."""
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


def apply(x: Tensor, sketches: Tensor, place: Tensor, records: Tensor, record_place: Tensor, neurons: Tensor,
          fidelity: Tensor, layout: Layout, gate: Gate, gate_bias: Tensor | None = None,
          up_bias: Tensor | None = None) -> Tensor:
    """As kernels.apply.apply."""
    if gate.kind not in KINDS:
        return NotImplemented
    neurons, record_place, fidelity = neurons.int().contiguous(), record_place.int().contiguous(), fidelity.contiguous()
    assert neurons.shape == record_place.shape == fidelity.shape and fidelity.dtype == torch.int8
    assert records.stride(1) == 1 and records.shape[1] >= layout.record, (records.shape, layout.record)
    pieces = _pieces_of(neurons.numpy(), place.shape[1], layout.neurons)
    return _launch(x, sketches, place, (neurons, fidelity, record_place, records), pieces, layout, gate, gate_bias,
                   up_bias)


def dense(x: Tensor, blobs: Tensor, place: Tensor, layout: Layout, gate: Gate, gate_bias: Tensor | None = None,
          up_bias: Tensor | None = None) -> Tensor:
    """As kernels.dense.dense."""
    if gate.kind not in KINDS:
        return NotImplemented
    assert blobs.shape[1] >= layout.blob_bytes, (blobs.shape, layout.blob_bytes)
    pieces = _every_piece(*place.shape, layout.neurons)
    return _launch(x, blobs, place, (None, None, None, None), pieces, layout, gate, gate_bias, up_bias)


@lru_cache(64)
def _sizes(layout: Layout) -> dict[str, int]:
    return {name: getattr(layout, name) for name in SIZES}


def _launch(x: Tensor, sketches: Tensor, place: Tensor, sparse: tuple[Tensor | None, ...], pieces: np.ndarray,
            layout: Layout, gate: Gate, gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    neurons, fidelity, record_place, records = sparse
    tokens, routed = place.shape
    assert x.shape == (tokens, layout.padded) and sketches.stride(1) == 1, (x.shape, sketches.stride())
    place, blocks = place.int().contiguous(), blocks16(x, layout.group)
    gate_bias, up_bias = (None if bias is None else bias.contiguous() for bias in (gate_bias, up_bias))
    partial = torch.empty(len(pieces), layout.padded, dtype=torch.float32)
    out = torch.empty(tokens, routed, layout.padded, dtype=torch.float32)
    n_bytes = len(pieces) * min(PIECE, layout.neurons) * (layout.sketch_row + layout.record)
    packed = pack(
        RECORD, len(pieces), **_sizes(layout), pieces=pieces.ctypes.data,
        n_ranks=0 if neurons is None else neurons.shape[1], routed=routed, per_expert=layout.neurons,
        slots=address(place), n_slots=place.numel(), blobs=address(sketches), stride=sketches.stride(0),
        neurons=address(neurons), fidelity=address(fidelity), record_places=address(record_place),
        records=address(records), record_stride=0 if records is None else records.stride(0), x=address(blocks),
        x_bytes=blocks.stride(0), kind=kind_of(gate), gate_bias=address(gate_bias), up_bias=address(up_bias),
        weights_bytes=weights_bytes(layout.groups), partial=address(partial), out=address(out), alpha=gate.alpha,
        limit=gate.limit)
    call(_add_neurons, packed, len(pieces), n_bytes)
    call(_add_pieces, packed)
    return out
