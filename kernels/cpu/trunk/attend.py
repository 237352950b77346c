"""Compiled twin of kernels/trunk/attend.py: the cache's new rows and the turned queries, then a piece a cached head.

Legend as there.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, float32, njit

from kernels.cpu.gate import exponential, scale
from kernels.cpu.rows import FLOATS, LINE, add_lines
from kernels.cpu.threads import Step, address, call, claim, fields, pack, pointer, task
from kernels.cpu.vectors import FLOAT, LANES, Code, Value, in_vectors, totals
from kernels.trunk.attend import Heads

Tensor = torch.Tensor

TOGETHER = 4    # lines of a row of values: so many sums are under way at once
VALUES = 64     # rows of values that all queries of a head read before the next ones: 16 to 32 KiB
RECORD = fields("tokens queries cached size turned width value projected turn keys values key_head value_head position "
                "query_norm key_norm value_norm query_span key_span window sinks out", floats="scale epsilon")


@in_vectors("void(i64, i64, i64, i64, i64) 1")
def _dots(code: Code, n: int, query: Value, keys: Value, row_bytes: Value, n_lines: Value, lines: Value) -> None:
    """A query times n rows of keys -> as many lines, whose lanes are still to be added."""
    sums = [code.variable(code.constant(FLOATS, 0.0)) for _ in range(n)]
    with code.loop(n_lines) as line:
        given = code.load(query + line * LINE, FLOATS)
        for row, total in enumerate(sums):
            key = code.load(keys + row_bytes * row + line * LINE, FLOATS)
            total.set(code.multiply_add(given, key, total.get()))
    for row, total in enumerate(sums):
        code.store(total.get(), lines + row * LINE)


@in_vectors("void(i64, i64)")
def _softmax(code: Code, row: Value, n_lines: Value) -> None:
    """In place; what is behind the last number of its line is -inf."""
    largest, total = code.variable(code.load(row, FLOATS)), code.variable(code.constant(FLOATS, 0.0))
    with code.loop(n_lines) as line:
        largest.set(code.load(row + line * LINE, FLOATS).at_least(largest.get()))
    most = code.splat(code.call("llvm.vector.reduce.fmax.v16f32", FLOAT, largest.get()))
    with code.loop(n_lines) as line:
        found = exponential(code, code.load(row + line * LINE, FLOATS) - most)
        code.store(found, row + line * LINE)
        total.set(total.get() + found)
    every = code.splat(totals([total.get()]).only())
    with code.loop(n_lines) as line:
        code.store(code.load(row + line * LINE, FLOATS) / every, row + line * LINE)


@in_vectors("void(i64, i64, i64, i64, i64) 1")
def _weighted(code: Code, n: int, values: Value, row_bytes: Value, shares: Value, n_rows: Value, out: Value) -> None:
    """out += n lines of each row times its share, rows in their order."""
    sums = [code.variable(code.load(out + line * LINE, FLOATS)) for line in range(n)]
    with code.loop(n_rows) as row:
        share, at = code.splat(code.load(shares + row * 4, FLOAT, 4)), values + row * row_bytes
        for line, total in enumerate(sums):
            total.set(code.multiply_add(share, code.load(at + line * LINE, FLOATS), total.get()))
    for line, total in enumerate(sums):
        code.store(total.get(), out + line * LINE)


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
    """Norms and rotation, in place; the new rows of the cache. width: of a row, value: where its values begin."""
    a = carray(pointer(table), 1, RECORD)[0]
    n_queries, n_cached = a.queries * a.size, a.cached * a.size
    projected = carray(pointer(a.projected), (a.tokens, a.width), float32)
    turn = carray(pointer(a.turn), (2, a.tokens, a.turned), float32)
    for t in range(a.tokens):
        query, key = projected[t, :n_queries], projected[t, n_queries:n_queries + n_cached]
        at = (a.position + t) * a.size * 4
        for head in range(a.cached):    # before the keys, which may be made of the same numbers
            row, first = carray(pointer(a.values + head * a.value_head + at), a.size, float32), a.value + head * a.size
            row[:] = projected[t, first:first + a.size]
            if a.value_norm:
                _norm(row, a.size, carray(pointer(a.value_norm), a.size, float32), a.epsilon)
        if a.query_norm:
            _norm(query, a.query_span, carray(pointer(a.query_norm), a.query_span, float32), a.epsilon)
            _norm(key, a.key_span, carray(pointer(a.key_norm), a.key_span, float32), a.epsilon)
        _turn(query, a.size, turn[0, t], turn[1, t])
        _turn(key, a.size, turn[0, t], turn[1, t])
        for head in range(a.cached):
            carray(pointer(a.keys + head * a.key_head + at), a.size, float32)[:] = key[head * a.size:
                                                                                       (head + 1) * a.size]


@njit(cache=True, nogil=True)
def _scores(query, keys, n, row_bytes, n_lines, scale, lines, shares):
    """A query times n rows of keys, LANES at most, times scale -> shares float32 [LANES]; -inf behind them."""
    if n == LANES:
        _dots(query, keys, row_bytes, n_lines, lines, LANES)
    else:
        for i in range(n):
            _dots(query, keys + i * row_bytes, row_bytes, n_lines, lines + i * LINE, 1)
    add_lines(lines, shares.ctypes.data)
    for i in range(LANES):
        shares[i] = shares[i] * scale if i < n else -np.inf


@njit(cache=True, nogil=True)
def _add_values(values, n, row_bytes, n_lines, shares, out):
    whole = n_lines // TOGETHER * TOGETHER
    for line in range(0, whole, TOGETHER):
        _weighted(values + line * LINE, row_bytes, shares, n, out + line * LINE, TOGETHER)
    for line in range(whole, n_lines):
        _weighted(values + line * LINE, row_bytes, shares, n, out + line * LINE, 1)


@task
def _attend(table):
    """Some rows at a time for all queries of a head, which find them in the cache."""
    a = carray(pointer(table), 1, RECORD)[0]
    n_lines, per, row_bytes = a.size // LANES, a.queries // a.cached, 4 * a.size
    shares = np.empty((per, (a.position + a.tokens + LANES) // LANES * LANES), np.float32)
    lines = np.empty(LANES * LINE, np.int8)
    sinks = carray(pointer(a.sinks), a.queries, float32)
    head = claim(table)
    while head < a.n_pieces:
        for t in range(a.tokens):
            query = a.projected + 4 * t * a.width + head * per * row_bytes
            out, n, first = a.out + (t * a.queries + head * per) * row_bytes, a.position + t + 1, 0
            if a.window:
                first = max(0, n - a.window)
                n -= first
            keys, values = (a.keys + head * a.key_head + first * row_bytes,
                            a.values + head * a.value_head + first * row_bytes)
            for row in range(0, n, LANES):
                for i in range(per):
                    _scores(query + i * row_bytes, keys + row * row_bytes, min(LANES, n - row), row_bytes, n_lines,
                            a.scale, lines.ctypes.data, shares[i, row:row + LANES])
            n_scores = n
            if a.sinks:         # one score more, of no value
                n_scores += 1
                for i in range(per):
                    if n % LANES == 0:
                        shares[i, n:n + LANES] = -np.inf
                    shares[i, n] = sinks[head * per + i]
            for i in range(per):
                _softmax(shares[i].ctypes.data, (n_scores + LANES - 1) // LANES)
            carray(pointer(out), per * a.size, float32)[:] = 0
            for row in range(0, n, VALUES):
                for i in range(per):
                    _add_values(values + row * row_bytes, min(VALUES, n - row), row_bytes, n_lines,
                                shares[i, row:].ctypes.data, out + i * row_bytes)
        head = claim(table)


def attend(projected: Tensor, turn: Tensor, keys: Tensor, values: Tensor, position: int | Tensor, heads: Heads,
           rows: Tensor | None = None) -> Tensor:
    """As kernels.trunk.attend.attend; what a device would be told by tensors is left to the reference."""
    if rows is not None or heads.held or not takes(heads, keys, values):
        return NotImplemented
    out = torch.empty(len(projected), heads.queries * heads.size, dtype=torch.float32)
    own = projected.contiguous() if heads.gated else projected.clone()
    for step in attending(own, turn, heads, out, **of_cache(keys, values, position, len(projected))):
        call(step)
    return out


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
    """The steps of `attend` into out float32 [T, Q * D]; they change projected, where there are no gates. The last but
    `heads.gated` has the record of the cache, which is as of `of_cache`, or set later."""
    if heads.gated:
        part, gate, projected = _gating(projected, heads, out)
        return [part, *attending(projected, turn, heads._replace(gated=False), out, n_bytes, **cache), gate]
    spans = {f"{name}_span": 0 if norm is None else norm.numel()
             for name, norm in (("query", heads.query_norm), ("key", heads.key_norm))}
    width = (heads.queries + (2 - heads.in_one) * heads.cached) * heads.size
    packed = pack(RECORD, heads.cached, n_bytes, tokens=len(projected), queries=heads.queries, cached=heads.cached,
                  size=heads.size, turned=turn.shape[-1], width=width, value=width - heads.cached * heads.size,
                  projected=address(projected), turn=address(turn), query_norm=address(heads.query_norm),
                  key_norm=address(heads.key_norm), value_norm=address(heads.value_norm), window=heads.window,
                  sinks=address(heads.sinks), out=address(out), scale=heads.scale, epsilon=heads.epsilon, **spans,
                  **dict.fromkeys(("keys", "values", "key_head", "value_head", "position"), 0) | cache)
    alive = (projected, turn, heads, out)
    return [Step(_enter, packed, alive, whole=True), Step(_attend, packed, alive)]


GATE_RECORD = fields("tokens queries size rest projected plain gates out")


@task
def _part(table):
    """Queries, keys and values as where there are no gates; gates [T, Q * D]."""
    a = carray(pointer(table), 1, GATE_RECORD)[0]
    n = a.queries * a.size
    projected = carray(pointer(a.projected), (a.tokens, 2 * n + a.rest), float32)
    plain, gates = carray(pointer(a.plain), (a.tokens, n + a.rest), float32), carray(pointer(a.gates), (a.tokens, n),
                                                                                     float32)
    for t in range(a.tokens):
        for head in range(a.queries):
            at, first = head * a.size, 2 * head * a.size
            plain[t, at:at + a.size] = projected[t, first:first + a.size]
            gates[t, at:at + a.size] = projected[t, first + a.size:first + 2 * a.size]
        plain[t, n:] = projected[t, 2 * n:]


@task
def _gate(table):
    a = carray(pointer(table), 1, GATE_RECORD)[0]
    scale(a.gates, a.out, a.tokens * a.queries * a.size, False)


def _gating(projected: Tensor, heads: Heads, out: Tensor) -> tuple[Step, Step, Tensor]:
    """What takes the gates out, what brings them in, and what is between them."""
    tokens, n = len(projected), heads.queries * heads.size
    rest = heads.width - 2 * n
    plain, gates = (torch.empty(tokens, width, dtype=torch.float32) for width in (n + rest, n))
    record = pack(GATE_RECORD, 1, tokens=tokens, queries=heads.queries, size=heads.size, rest=rest,
                  projected=address(projected), plain=address(plain), gates=address(gates), out=address(out))
    part, gate = (Step(what, record, (projected, plain, gates, out), whole=True) for what in (_part, _gate))
    return part, gate, plain
