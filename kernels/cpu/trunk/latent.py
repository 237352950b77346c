"""Compiled twin of kernels/trunk/latent.py: the cache's new rows, then some heads a piece.

A piece decodes its heads' part of the expanding matrix row by row, once for all tokens, and reads the cache some rows
at a time for all of its queries.

Legend as there.
"""
from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import carray, float32, int8, njit, uint8

from kernels.cpu.rows import LINE
from kernels.cpu.threads import address, claim, fields, pointer, run, task
from kernels.cpu.trunk.attend import VALUES, _add_values, _norm, _scores, _softmax
from kernels.cpu.vectors import LANES
from kernels.trunk.latent import Latent
from kernels.trunk.linear import Matrices

Tensor = torch.Tensor

HEADS = 8   # of a piece: a row of the cache comes once for all of them
RECORD = fields("tokens heads rank still turning values neighbours cached_neighbours query new turn turn_row norm "
                "codes scales bits groups rows keys position out", floats="scale epsilon")
_float_scales: WeakKeyDictionary[Matrices, Tensor] = WeakKeyDictionary()    # numba reads no float16


@njit(cache=True, nogil=True)
def _decode(a, row, out):
    """A row of the expanding matrix, float32 [R]."""
    if a.bits == 32:
        out[:] = carray(pointer(a.codes + 4 * row * a.rank), a.rank, float32)
        return
    group = a.rank // a.groups
    if a.bits == 8:
        codes = carray(pointer(a.codes + row * a.rank), a.rank, int8)
        scales = carray(pointer(a.scales + 4 * row * a.groups), a.groups, float32)
        for g in range(a.groups):
            for i in range(g * group, (g + 1) * group):
                out[i] = scales[g] * codes[i]
        return
    pairs = carray(pointer(a.codes + row * (a.rank // 2)), a.rank // 2, uint8)
    scales = carray(pointer(a.scales + 8 * row * a.groups), 2 * a.groups, float32)
    for g in range(a.groups):
        scale, offset = scales[2 * g], scales[2 * g + 1]
        for i in range(g * group // 2, (g + 1) * group // 2):
            out[2 * i] = scale * float32(pairs[i] & 15) + offset
            out[2 * i + 1] = scale * float32(pairs[i] >> 4) + offset


@njit(cache=True, nogil=True)
def _turn(source, a, t, out):
    """float32 [P] -> the same turned by token t's position."""
    half = a.turning // 2
    cosines = carray(pointer(a.turn + 4 * t * a.turn_row), half, float32)
    sines = carray(pointer(a.turn + 4 * (a.tokens + t) * a.turn_row), half, float32)
    for i in range(half):
        first, second = (source[2 * i], source[2 * i + 1]) if a.neighbours else (source[i], source[half + i])
        at, beyond = (2 * i, 2 * i + 1) if a.cached_neighbours else (i, half + i)
        out[at] = first * cosines[i] - second * sines[i]
        out[beyond] = second * cosines[i] + first * sines[i]


@task
def _enter(table):
    """The new rows and keys of the cache."""
    a = carray(pointer(table), 1, RECORD)[0]
    norm = carray(pointer(a.norm), a.rank, float32)
    for t in range(a.tokens):
        new = carray(pointer(a.new + 4 * t * (a.rank + a.turning)), a.rank + a.turning, float32)
        row = carray(pointer(a.rows + 4 * (a.position + t) * a.rank), a.rank, float32)
        row[:] = new[:a.rank]
        _norm(row, a.rank, norm, a.epsilon)
        _turn(new[a.rank:], a, t, carray(pointer(a.keys + 4 * (a.position + t) * a.turning), a.turning, float32))


@njit(cache=True, nogil=True)
def _queries(a, head, weights, absorbed, turned):
    """What meets the cache for all tokens: float32 [T, R] and [T, P]."""
    width = a.still + a.turning
    absorbed[:] = 0
    for t in range(a.tokens):
        query = carray(pointer(a.query + 4 * (t * a.heads + head) * width), width, float32)
        _turn(query[a.still:], a, t, turned[t])
    for i in range(a.still):
        _decode(a, head * (a.still + a.values) + i, weights)
        for t in range(a.tokens):
            query = carray(pointer(a.query + 4 * (t * a.heads + head) * width), width, float32)
            for column in range(a.rank):
                absorbed[t, column] += query[i] * weights[column]


@njit(cache=True, nogil=True)
def _meet(a, n, absorbed, turned, lines, more, shares):
    """One token's queries, float32 [heads, R] and [heads, P], times n rows of the cache -> shares [heads, n]."""
    for first in range(0, n, LANES):
        for i in range(len(absorbed)):
            found, own = min(LANES, n - first), shares[i, first:first + LANES]
            _scores(turned[i].ctypes.data, a.keys + 4 * first * a.turning, found, 4 * a.turning, a.turning // LANES,
                    a.scale, lines.ctypes.data, more)
            _scores(absorbed[i].ctypes.data, a.rows + 4 * first * a.rank, found, 4 * a.rank, a.rank // LANES, a.scale,
                    lines.ctypes.data, own)
            own += more
    for i in range(len(absorbed)):
        _softmax(shares[i].ctypes.data, (n + LANES - 1) // LANES)


@njit(cache=True, nogil=True)
def _values(a, head, mixed, weights):
    """What all tokens found, float32 [T, R], through the head's values' part."""
    lanes = np.empty(LANES, np.float32)
    for i in range(a.values):
        _decode(a, head * (a.still + a.values) + a.still + i, weights)
        for t in range(a.tokens):
            lanes[:] = 0
            for first in range(0, a.rank, LANES):
                for lane in range(LANES):
                    lanes[lane] += weights[first + lane] * mixed[t, first + lane]
            carray(pointer(a.out + 4 * (t * a.heads + head) * a.values), a.values, float32)[i] = lanes.sum()


@task
def _attend(table):
    a = carray(pointer(table), 1, RECORD)[0]
    absorbed = np.empty((a.tokens, HEADS, a.rank), np.float32)
    turned, mixed = np.empty((a.tokens, HEADS, a.turning), np.float32), np.empty_like(absorbed)
    shares = np.empty((HEADS, (a.position + a.tokens + LANES - 1) // LANES * LANES), np.float32)
    lines, more, weights = np.empty(LANES * LINE, np.int8), np.empty(LANES, np.float32), np.empty(a.rank, np.float32)
    piece = claim(table)
    while piece < a.n_pieces:
        first = piece * HEADS
        n_heads = min(HEADS, a.heads - first)
        for i in range(n_heads):
            _queries(a, first + i, weights, absorbed[:, i], turned[:, i])
        mixed[:] = 0
        for t in range(a.tokens):
            n = a.position + t + 1
            _meet(a, n, absorbed[t, :n_heads], turned[t, :n_heads], lines, more, shares)
            for row in range(0, n, VALUES):
                for i in range(n_heads):
                    _add_values(a.rows + 4 * row * a.rank, min(VALUES, n - row), 4 * a.rank, a.rank // LANES,
                                shares[i, row:].ctypes.data, mixed[t, i].ctypes.data)
        for i in range(n_heads):
            _values(a, first + i, mixed[:, i], weights)
        piece = claim(table)


def attend_latent(query: Tensor, new: Tensor, turn: Tensor, rows: Tensor, keys: Tensor, position: int | Tensor,
                  latent: Latent, places: Tensor | None = None) -> Tensor:
    """As kernels.trunk.latent.attend_latent; what a device would be told by tensors is left to the reference."""
    heads, rank, still, turning, values, scale, norm, epsilon, expand, neighbours, cached_neighbours = latent
    codes, scales, _ = expand.parts[0]
    plain = (query, new, turn, rows, keys, norm, *((codes,) if scales is None else ()))
    if (places is not None or rank % LANES or turning % LANES or not codes.is_contiguous()
            or any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in plain)):
        return NotImplemented
    out, scales = torch.empty(len(query), heads * values, dtype=torch.float32), _scales_of(expand)
    told = dict(tokens=len(query), heads=heads, rank=rank, still=still, turning=turning, values=values,
                neighbours=neighbours, cached_neighbours=cached_neighbours, query=address(query), new=address(new),
                turn=address(turn), turn_row=turn.shape[2], norm=address(norm), codes=address(codes),
                scales=address(scales), bits=32 if scales is None else 4 if codes.dtype == torch.uint8 else 8,
                groups=1 if scales is None else scales.shape[1], rows=address(rows), keys=address(keys),
                position=position, out=address(out), scale=scale, epsilon=epsilon)
    run(_enter, RECORD, 1, 0, **told)
    n_pieces = -(-heads // HEADS)
    read = n_pieces * 4 * (position + len(query)) * (rank + turning) + codes.nbytes
    run(_attend, RECORD, n_pieces, read, **told)
    return out


def _scales_of(expand: Matrices) -> Tensor | None:
    """Of the expanding matrix, float32: a sixteenth of what its codes take at 8 bits."""
    _, scales, _ = expand.parts[0]
    if scales is not None and expand not in _float_scales:
        _float_scales[expand] = scales.float().contiguous()
    return _float_scales.get(expand)
