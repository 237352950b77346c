"""Compiled twin of kernels/dense.py's `whole_sums` and of kernels/apply.py's `chosen_sums`: the arithmetic that a card
repeats bit by bit.

A piece of work is as in apply.py; what is added are integers, so that no order matters.

Legend: T tokens, k routed experts, H padded hidden, N ranks in the list of neurons.
"""
from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import carray, float32, int8, int32, int64, njit, uint8, uint16

from kernels.activation import KINDS, FixedPoint, Gate, NeuronBias
from kernels.cpu.apply import PIECE, SIZES, Chosen, every_piece, list_pieces, locate, most_pieces, sizes_of
from kernels.cpu.gate import BIAS, bias_fields, biases_of, kind_of
from kernels.cpu.threads import Step, address, call, claim, fields, pack, pointer, task
from kernels.dense import EXPONENTIAL, LN2_HIGH, LN2_LOW, LOG2E, MOST, NO_NUMBER, SHIFT, STRICT
from kernels.layout import Layout
from kernels.select import DOWN_ONLY, REFINED

Tensor = torch.Tensor

SUMS_RECORD = fields(" ".join(SIZES) + " pieces n_ranks routed per_expert slots n_slots blobs stride neurons fidelity "
                     "record_places records record_stride codes x_scale x_sum kind halves partial strange "
                     + " ".join(BIAS), floats="alpha limit")
SILU, GELU_TANH, RELU = (KINDS.index(kind) for kind in ("silu", "gelu_tanh", "relu"))
POWERS = 2.0 ** np.arange(-126, 127, dtype=np.float32)
ONE, HALF_ONE, LARGEST, TIMES, HIGH, LOW = map(float32, (1, 0.5, MOST, LOG2E, LN2_HIGH, LN2_LOW))
C0, C1, C2, C3, C4 = map(float32, EXPONENTIAL[:5])
UNIT, TANH, CUBE = map(float32, (2.0 ** SHIFT, 1.5957691216057308, 0.044715))


@njit(cache=True, nogil=True, error_model="numpy")
def _strict_sigmoid(x):
    if x != x:
        return x
    z = min(max(-x, float32(-87)), float32(87))
    n = np.floor(z * TIMES + HALF_ONE)
    r = (z - n * HIGH) - n * LOW
    total = (((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + ONE) * r + ONE
    return ONE / (ONE + total * POWERS[int64(n) + 126])


@njit(cache=True, nogil=True)
def _strict_gate(g, u, kind, alpha, limit):
    if kind == SILU:
        return g * _strict_sigmoid(g) * u
    if kind == RELU:
        return (g if g > 0 or g != g else float32(0)) * u
    if kind == GELU_TANH:
        return g * _strict_sigmoid(TANH * (g + CUBE * g * g * g)) * u
    g = limit if g > limit else g
    u = limit if u > limit else -limit if u < -limit else u
    return (u + ONE) * g * _strict_sigmoid(g * alpha)


@njit(cache=True, nogil=True)
def _strict_sum(coarse, fine, is_fine, pairs, a, codes, scale, sums, halves):
    """Group after group: a row of gate, or of up, times the activation; without `is_fine` at 2 bits."""
    total = float32(0)
    for group in range(a.groups):
        dot = int32(0)
        for word in range(group * a.group // 16, (group + 1) * a.group // 16):
            for b in range(4):
                high, low = int32(coarse[4 * word + b]), int32(fine[4 * word + b])
                for s in range(4):
                    code = (high >> (2 * s) & 3) * 4 + (low >> (2 * s) & 3) if is_fine else high >> (2 * s) & 3
                    dot += int32(code) * codes[16 * word + 4 * s + b]
        part = halves[pairs[2 * group]] * (float32(dot) * scale[group])
        total = total + (part + halves[pairs[2 * group + 1]] * sums[group])
    return total


@njit(cache=True, nogil=True)
def _strict_down(plane, pairs, a, product, halves, out, strange):
    for group in range(a.groups):
        factor, offset = product * halves[pairs[2 * group]], product * halves[pairs[2 * group + 1]]
        if not (abs(factor) <= LARGEST and abs(offset) <= LARGEST):
            strange[group] = 1
            continue
        times, add = int64(np.floor(factor * UNIT + HALF_ONE)), int64(np.floor(offset * UNIT + HALF_ONE))
        for word in range(group * a.group // 8, (group + 1) * a.group // 8):
            for b in range(4):
                byte = int64(plane[4 * word + b])
                out[8 * word + b] += (byte & 15) * times + add
                out[8 * word + 4 + b] += (byte >> 4) * times + add


@njit(cache=True, nogil=True)
def _strict_row(row, record, which, is_fine, a, codes, scale, sums, halves):
    """Gate (0) or up (1) of a neuron, at 4 or at 2 bits, times the activation. row, record: addresses."""
    at = (record + a.record_scales_at + (which + 1) * a.scales if is_fine else
          row + 2 * a.plane2 + which * a.scales)
    return _strict_sum(carray(pointer(row + which * a.plane2), a.plane2, uint8),
                       carray(pointer(record + a.refine_at + which * a.plane2), a.plane2, uint8), is_fine,
                       carray(pointer(at), 2 * a.groups, uint16), a, codes, scale, sums, halves)


@task
def _sum_strictly(table):
    a = carray(pointer(table), 1, SUMS_RECORD)[0]
    pieces, halves = carray(pointer(a.pieces), (a.n_pieces, 4), int32), carray(pointer(a.halves), 1 << 16, float32)
    row, record, index = np.empty(PIECE, np.int64), np.empty(PIECE, np.int64), np.empty(PIECE, np.int64)
    fidelity = np.empty(PIECE, np.int8)
    piece = claim(table)
    while piece < a.n_pieces:
        token, expert, first, last = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2], pieces[piece, 3]
        gate_bias, up_bias = biases_of(a, token * a.routed + expert, a.per_expert)
        locate(a, token, expert, first, last - first, row, record, fidelity, index)
        codes = carray(pointer(a.codes + 4 * token * a.padded), a.padded, int32)
        scale = carray(pointer(a.x_scale + 4 * token * a.groups), a.groups, float32)
        sums = carray(pointer(a.x_sum + 4 * token * a.groups), a.groups, float32)
        out = carray(pointer(a.partial + 8 * piece * a.padded), a.padded, int64)
        strange = carray(pointer(a.strange + piece * a.groups), a.groups, int8)
        for i in range(last - first):
            g = _strict_row(row[i], record[i], 0, fidelity[i] != DOWN_ONLY, a, codes, scale, sums, halves)
            u = _strict_row(row[i], record[i], 1, fidelity[i] == REFINED, a, codes, scale, sums, halves)
            if a.bias_ids:
                neuron = index[i] - expert * a.per_expert
                g, u = g + gate_bias[neuron], u + up_bias[neuron]
            product = _strict_gate(g, u, a.kind, a.alpha, a.limit)
            _strict_down(carray(pointer(record[i]), 2 * a.plane2, uint8),
                         carray(pointer(record[i] + a.record_scales_at), 2 * a.groups, uint16), a, product, halves, out,
                         strange)
        piece = claim(table)


def whole_sums(x: FixedPoint, blobs: Tensor, place: Tensor, layout: Layout, gate: Gate,
               bias: NeuronBias | None = None) -> Tensor:
    """As kernels.dense.whole_sums."""
    pieces = every_piece(*place.shape, layout.neurons)
    return _strictly(x, blobs, place, layout, gate, None, pieces, bias)


def chosen_sums(x: FixedPoint, sketches: Tensor, place: Tensor, records: Tensor, record_place: Tensor, neurons: Tensor,
                fidelity: Tensor, layout: Layout, gate: Gate, bias: NeuronBias | None = None) -> Tensor:
    """As kernels.apply.chosen_sums."""
    chosen = Chosen(neurons.int().contiguous(), fidelity.contiguous(), record_place.int().contiguous(), records)
    pieces = np.empty((most_pieces(neurons.shape[1], *place.shape), 4), np.int32)
    n = list_pieces(chosen.neurons.numpy(), place.shape[1], layout.neurons, pieces)
    return _strictly(x, sketches, place, layout, gate, chosen, pieces[:n], bias)


def _strictly(x: FixedPoint, sketches: Tensor, place: Tensor, layout: Layout, gate: Gate, chosen: Chosen | None,
              pieces: np.ndarray, bias: NeuronBias | None) -> Tensor:
    if gate.kind not in STRICT:
        return NotImplemented
    place, (tables, addresses) = place.int().contiguous(), bias_fields(bias)
    (neurons, fidelity, places, records), routed = chosen or (None,) * 4, place.shape[1]
    n, codes = len(pieces), x.high.int() * 256 + x.low.int()
    partial = torch.zeros(n, layout.padded, dtype=torch.int64)
    strange = torch.zeros(n, layout.groups, dtype=torch.int8)
    scale, sums = x.scale.contiguous(), x.sums.contiguous()
    alive = codes, scale, sums, place, sketches, chosen, tables, pieces, partial, strange
    n_read = int((pieces[:, 3] - pieces[:, 2]).sum()) * (layout.sketch_row + layout.record)
    call(Step(_sum_strictly, pack(
        SUMS_RECORD, n, n_read, **sizes_of(layout), pieces=pieces.ctypes.data,
        n_ranks=0 if chosen is None else neurons.shape[1], routed=routed, per_expert=layout.neurons,
        slots=address(place), n_slots=place.numel(), blobs=address(sketches), stride=sketches.stride(0),
        neurons=address(neurons), fidelity=address(fidelity), record_places=address(places), records=address(records),
        record_stride=0 if records is None else records.stride(0), codes=address(codes), x_scale=address(scale),
        x_sum=address(sums), kind=kind_of(gate), halves=address(_halves()), partial=address(partial),
        strange=address(strange), alpha=gate.alpha, limit=gate.limit, **addresses), alive))
    expert = torch.from_numpy(pieces[:, 0] * np.int64(routed) + pieces[:, 1])
    out = torch.zeros(place.numel(), layout.padded, dtype=torch.int64).index_add_(0, expert, partial)
    bad = torch.zeros(place.numel(), layout.groups, dtype=torch.int64).index_add_(0, expert, strange.long()) > 0
    return torch.where(bad.repeat_interleave(layout.group, 1), NO_NUMBER, out).view(*place.shape, layout.padded)


@lru_cache(1)
def _halves() -> Tensor:
    """float32 [65536]: every float16."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
