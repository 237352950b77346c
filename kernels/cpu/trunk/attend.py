"""Compiled twin of kernels/trunk/attend.py: the cache's new rows and the turned queries, then a piece a cached head.

Legend as there.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, float32, njit

from kernels.cpu.rows import FLOATS, LINE
from kernels.cpu.threads import Step, address, call, claim, fields, pack, pointer, task
from kernels.cpu.vectors import LANES, Code, Value, in_vectors, totals
from kernels.trunk.attend import Heads

Tensor = torch.Tensor

RECORD = fields("tokens queries cached size turned projected turn keys values key_head value_head position query_norm "
                "key_norm query_span key_span out", floats="scale epsilon")


@in_vectors("f32(i64, i64, i64)")
def _dot(code: Code, a: Value, b: Value, n_lines: Value) -> Value:
    total = code.variable(code.constant(FLOATS, 0.0))
    with code.loop(n_lines) as line:
        total.set(code.multiply_add(code.load(a + line * LINE, FLOATS), code.load(b + line * LINE, FLOATS),
                                    total.get()))
    return totals([total.get()]).only()


@in_vectors("void(i64, i64, i64, f32)")
def _add(code: Code, out: Value, row: Value, n_lines: Value, weight: Value) -> None:
    """out += weight * row"""
    every = code.splat(weight)
    with code.loop(n_lines) as line:
        at = out + line * LINE
        code.store(code.multiply_add(every, code.load(row + line * LINE, FLOATS), code.load(at, FLOATS)), at)


@njit(cache=True, nogil=True)
def _norm(row, span, norm, epsilon):
    """Every `span` numbers of a row by themselves."""
    for first in range(0, len(row), span):
        total = float32(0)
        for i in range(span):
            total += row[first + i] * row[first + i]
        one = float32(1) / math.sqrt(total / float32(span) + epsilon)
        for i in range(span):
            row[first + i] = norm[i] * (row[first + i] * one)


@njit(cache=True, nogil=True)
def _turn(row, size, cosines, sines):
    """The first len(cosines) numbers of heads of `size`, one behind the other."""
    half = len(cosines) // 2
    for first in range(0, len(row), size):
        for i in range(half):
            a, b = row[first + i], row[first + half + i]
            row[first + i] = a * cosines[i] - b * sines[i]
            row[first + half + i] = b * cosines[half + i] + a * sines[half + i]


@task
def _enter(table):
    """Norms and rotation, in place; the new rows of the cache."""
    a = carray(pointer(table), 1, RECORD)[0]
    n_queries, n_cached = a.queries * a.size, a.cached * a.size
    projected = carray(pointer(a.projected), (a.tokens, n_queries + 2 * n_cached), float32)
    turn = carray(pointer(a.turn), (2, a.tokens, a.turned), float32)
    for t in range(a.tokens):
        query, key = projected[t, :n_queries], projected[t, n_queries:n_queries + n_cached]
        if a.query_norm:
            _norm(query, a.query_span, carray(pointer(a.query_norm), a.query_span, float32), a.epsilon)
            _norm(key, a.key_span, carray(pointer(a.key_norm), a.key_span, float32), a.epsilon)
        _turn(query, a.size, turn[0, t], turn[1, t])
        _turn(key, a.size, turn[0, t], turn[1, t])
        at = (a.position + t) * a.size * 4
        for head in range(a.cached):
            carray(pointer(a.keys + head * a.key_head + at), a.size, float32)[:] = key[head * a.size:
                                                                                       (head + 1) * a.size]
            first = n_queries + n_cached + head * a.size
            carray(pointer(a.values + head * a.value_head + at), a.size, float32)[:] = projected[t, first:
                                                                                                 first + a.size]


@njit(cache=True, nogil=True)
def _softmax(row):
    largest, total = row[0], float32(0)
    for value in row:
        largest = value if value > largest else largest
    for i, value in enumerate(row):
        row[i] = math.exp(value - largest)
        total += row[i]
    for i in range(len(row)):
        row[i] /= total


@task
def _attend(table):
    a = carray(pointer(table), 1, RECORD)[0]
    n_lines, per, row_bytes = a.size // LANES, a.queries // a.cached, 4 * a.size
    shares = np.empty((per, a.position + a.tokens), np.float32)
    head = claim(table)
    while head < a.n_pieces:
        keys, values = a.keys + head * a.key_head, a.values + head * a.value_head
        for t in range(a.tokens):
            query = a.projected + (t * (a.queries + 2 * a.cached) + head * per) * row_bytes
            out = a.out + (t * a.queries + head * per) * row_bytes
            n = a.position + t + 1
            for row in range(n):
                for i in range(per):
                    shares[i, row] = _dot(query + i * row_bytes, keys + row * row_bytes, n_lines) * a.scale
            for i in range(per):
                _softmax(shares[i, :n])
            carray(pointer(out), per * a.size, float32)[:] = 0
            for row in range(n):
                for i in range(per):
                    _add(out + i * row_bytes, values + row * row_bytes, n_lines, shares[i, row])
        head = claim(table)


def attend(projected: Tensor, turn: Tensor, keys: Tensor, values: Tensor, position: int | Tensor, heads: Heads,
           rows: Tensor | None = None) -> Tensor:
    """As kernels.trunk.attend.attend; what a device would be told by tensors is left to the reference."""
    if rows is not None or not takes(heads, keys, values):
        return NotImplemented
    out = torch.empty(len(projected), heads.queries * heads.size, dtype=torch.float32)
    projected, gate = _without_gates(projected, heads) if heads.gated else (projected.clone(), None)
    for step in attending(projected, turn, heads, out, **of_cache(keys, values, position, len(projected))):
        call(step)
    return out if gate is None else out.mul_(gate.sigmoid_())


def takes(heads: Heads, keys: Tensor, values: Tensor) -> bool:
    """Whether a cache's rows are such as are read here."""
    return heads.size % LANES == 0 and all(kept.dtype == torch.float32 and kept.stride()[2:] == (heads.size, 1)
                                           for kept in (keys, values))


def of_cache(keys: Tensor, values: Tensor, position: int, tokens: int) -> dict[str, int]:
    """What a record says of a cache, whose tensors the caller keeps: float32 [1, C, N, D] each."""
    cached, size = keys.shape[1], keys.shape[3]
    return dict(keys=address(keys), values=address(values), key_head=4 * keys.stride(1),
                value_head=4 * values.stride(1), position=position, n_bytes=8 * (position + tokens) * cached * size)


def attending(projected: Tensor, turn: Tensor, heads: Heads, out: Tensor, n_bytes: int = 0, **cache: int) -> list[Step]:
    """The steps of `attend`, which change projected, without gates, into out float32 [T, Q * D]. cache: as of
    `of_cache`, or later."""
    spans = {f"{name}_span": 0 if norm is None else norm.numel()
             for name, norm in (("query", heads.query_norm), ("key", heads.key_norm))}
    packed = pack(RECORD, heads.cached, n_bytes, tokens=len(projected), queries=heads.queries, cached=heads.cached,
                  size=heads.size, turned=turn.shape[-1], projected=address(projected), turn=address(turn),
                  query_norm=address(heads.query_norm), key_norm=address(heads.key_norm), out=address(out),
                  scale=heads.scale, epsilon=heads.epsilon, **spans,
                  **dict.fromkeys(("keys", "values", "key_head", "value_head", "position"), 0) | cache)
    alive = (projected, turn, heads, out)
    return [Step(_enter, packed, alive, whole=True), Step(_attend, packed, alive)]


def _without_gates(projected: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """-> queries, keys and values; gates [T, Q * D]. Both are copies."""
    n, end = len(projected), heads.queries * 2 * heads.size
    query, gate = projected[:, :end].view(n, heads.queries, 2, heads.size).unbind(2)
    return torch.cat((query.reshape(n, -1), projected[:, end:]), 1), gate.reshape(n, -1)
