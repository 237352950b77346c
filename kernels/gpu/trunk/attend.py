"""Device version of kernels/trunk/attend.py: the cache is read in splits of its rows up to the position, which the last
of a head's splits to finish joins, in their order.

The grid is fixed, so a recorded step serves every position, and what is read are the rows that are seen, whatever the
planned context. The heads of queries that share a cached head are, token by token, the rows of a tile of matrix
products, whose operands are 16-bit where the cache is; all else is float32. Norms and rotation are done by every block
for itself. Of a wide head each warp multiplies a piece, and the scores are added: so none keeps all of the queries in
its registers. The new rows are folded in from where they were projected, rounded as the cache keeps them, by the split
that writes them: nothing is read that another block writes. Where they are held, it reads them in the cache.

Legend as there; M rows of a tile, of T * Q/C and padding (for heads above WIDE a part of them, as no more fits the
registers), HALF: the next power of two to D/2.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.trunk.last import MOST, counters, is_last
from kernels.trunk.attend import Heads
from kernels.trunk.linear import MOST_TOKENS

Tensor = torch.Tensor

BLOCKS = 64             # of the cached heads times splits: twice the multiprocessors of the smallest cards
LEAST_TILE = 16         # rows and depth of a matrix product
WIDE = 128              # numbers of a head, above which a tile has LEAST_TILE rows, and a warp a piece of the head
WARPS = 8               # with four it spills on sm_75, whose matrix products are made of additions (Triton 3.7)
ROWS = 32               # of the cache, under way at a time
NORM_STEP = 64          # numbers of a norm over all heads, at a time
NO_NORM, OF_HEAD, OF_ALL = 0, 1, 2
NOTHING = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _heads_of(projected, norm, turn, token, head, first, is_row, n_tokens, width, epsilon, HEADS: tl.constexpr,
              STRIDE: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, TURNED: tl.constexpr,
              M: tl.constexpr, NORM_STEP: tl.constexpr):
    """Both halves, float32 [M, HALF], of heads `head` of `token`s [M], of HEADS that begin at column `first`, STRIDE
    numbers apart; normed, and the first TURNED numbers turned: all of a head, or at most a half."""
    side = tl.arange(0, HALF)
    inside = is_row[:, None] & (side < SIZE // 2)[None]
    row = projected + token * width + first
    at = row[:, None] + head[:, None] * STRIDE + side[None]
    low = tl.load(at, mask=inside, other=0)
    high = tl.load(at + SIZE // 2, mask=inside, other=0)
    if NORM > 0:
        if NORM == 1:
            squares, n = tl.sum(low * low + high * high, axis=1), SIZE
            weight = norm + side[None]
        else:
            squares, n = tl.zeros((M,), tl.float32), HEADS * SIZE
            for start in range(0, HEADS * SIZE, NORM_STEP):
                column = start + tl.arange(0, NORM_STEP)
                value = tl.load(row[:, None] + column[None], mask=is_row[:, None] & (column < HEADS * SIZE)[None],
                                other=0)
                squares += tl.sum(value * value, axis=1)
            weight = norm + head[:, None].to(tl.int64) * SIZE + side[None]
        factor = (1.0 / tl.sqrt_rn(squares / n + epsilon))[:, None]
        weighed = inside if NORM == 2 else (side < SIZE // 2)[None]
        low = tl.load(weight, mask=weighed, other=0).to(tl.float32) * (low * factor)
        high = tl.load(weight + SIZE // 2, mask=weighed, other=0).to(tl.float32) * (high * factor)
    angle = turn + token[:, None] * TURNED + side[None]
    sines = angle + n_tokens * TURNED
    if TURNED == SIZE:
        turned = low * tl.load(angle, mask=inside, other=0) - high * tl.load(sines, mask=inside, other=0)
        high = (high * tl.load(angle + SIZE // 2, mask=inside, other=0)
                + low * tl.load(sines + SIZE // 2, mask=inside, other=0))
        low = turned
    elif TURNED > 0:
        turning = inside & (side < TURNED)[None]
        to_other = tl.where(side < TURNED // 2, TURNED // 2, -(TURNED // 2))[None]
        other = tl.load(at + to_other, mask=turning, other=0)
        if NORM > 0:
            weighed = turning if NORM == 2 else (side < TURNED)[None]
            other = tl.load(weight + to_other, mask=weighed, other=0).to(tl.float32) * (other * factor)
        other = tl.where((side < TURNED // 2)[None], -other, other)
        low = (low * tl.load(angle, mask=turning, other=1)
               + other * tl.load(sines, mask=turning, other=0))
    return low, high


@triton.jit
def _pieces(x, PIECES: tl.constexpr):
    """[n, HALF] -> [PIECES, n, HALF / PIECES]"""
    return x.reshape(x.shape[0], PIECES, x.shape[1] // PIECES).permute(1, 0, 2)


@triton.jit
def _fold(low, high, k_low, k_high, v_low, v_high, seen, scale, most, total, out_low, out_high, OPERAND: tl.constexpr,
          PIECES: tl.constexpr):
    """Rows of the cache [N, HALF] into what M queries have so far: the largest score, the sum of shares, the values.
    PIECES: of a half, each in a warp of its own; else every warp keeps all of the queries in its registers."""
    k_low, k_high = k_low.to(OPERAND), k_high.to(OPERAND)
    if PIECES > 1:
        score = tl.dot(_pieces(low, PIECES), _pieces(k_low, PIECES).permute(0, 2, 1), input_precision="ieee")
        score = tl.dot(_pieces(high, PIECES), _pieces(k_high, PIECES).permute(0, 2, 1), score, input_precision="ieee")
        score = tl.sum(score, axis=0) * scale
    else:
        score = tl.dot(low, tl.trans(k_low), input_precision="ieee")
        score = tl.dot(high, tl.trans(k_high), score, input_precision="ieee") * scale
    score = tl.where(seen, score, float("-inf"))
    largest = tl.maximum(most, tl.maximum(tl.max(score, axis=1), NOTHING))
    share, before = tl.exp(score - largest[:, None]), tl.exp(most - largest)
    total = total * before + tl.sum(share, axis=1)
    share = share.to(OPERAND)
    out_low = tl.dot(share, v_low.to(OPERAND), out_low * before[:, None], input_precision="ieee")
    out_high = tl.dot(share, v_high.to(OPERAND), out_high * before[:, None], input_precision="ieee")
    return largest, total, out_low, out_high


@triton.jit
def _join(parts, stats, projected, sinks, out, cached, row, token, n_tokens, QUERIES: tl.constexpr,
          CACHED: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, GATED: tl.constexpr, SUNK: tl.constexpr,
          SPLITS: tl.constexpr, M: tl.constexpr):
    """The splits of rows [m] of one cached head's M, in order -> out [T, Q * D]."""
    per: tl.constexpr = QUERIES // CACHED
    side, there = tl.arange(0, HALF), token < n_tokens
    head = cached * per + row % per
    inside = there[:, None] & (side < SIZE // 2)[None]
    at = cached * SPLITS * M + row
    largest = tl.full(row.shape, NOTHING, tl.float32)
    if SUNK:
        sink = tl.load(sinks + head, mask=there, other=0).to(tl.float32)
        largest = tl.maximum(largest, sink)
    for split in range(SPLITS):
        largest = tl.maximum(largest, tl.load(stats + at + split * M, mask=there, other=0, cache_modifier=".cg"))
    total = tl.exp(sink - largest) if SUNK else tl.where(there, 0.0, 1.0)
    low = tl.zeros((row.shape[0], HALF), tl.float32)
    high = tl.zeros((row.shape[0], HALF), tl.float32)
    for split in range(SPLITS):
        own = at + split * M
        weight = tl.exp(tl.load(stats + own, mask=there, other=0, cache_modifier=".cg") - largest)
        total += weight * tl.load(stats + CACHED * SPLITS * M + own, mask=there, other=0, cache_modifier=".cg")
        part = parts + own[:, None] * SIZE + side[None]
        low += weight[:, None] * tl.load(part, mask=inside, other=0, cache_modifier=".cg")
        high += weight[:, None] * tl.load(part + SIZE // 2, mask=inside, other=0, cache_modifier=".cg")
    low, high = low / total[:, None], high / total[:, None]
    if GATED:
        gate = projected + (token * (2 * QUERIES + 2 * CACHED) + 2 * head + 1)[:, None] * SIZE + side[None]
        low *= tl.sigmoid(tl.load(gate, mask=inside, other=0))
        high *= tl.sigmoid(tl.load(gate + SIZE // 2, mask=inside, other=0))
    to = out + (token * QUERIES + head)[:, None] * SIZE + side[None]
    tl.store(to, low, mask=inside)
    tl.store(to + SIZE // 2, high, mask=inside)


@triton.jit
def _attend(projected, turn, keys, values, position, rows, query_norm, key_norm, value_norm, sinks, parts, stats, out,
            counters, n_tokens, length, head_stride, scale, epsilon, QUERIES: tl.constexpr, CACHED: tl.constexpr,
            SIZE: tl.constexpr, HALF: tl.constexpr, STRIDE: tl.constexpr, TURNED: tl.constexpr, NORM: tl.constexpr,
            VALUE_NORM: tl.constexpr, IN_ONE: tl.constexpr, HELD: tl.constexpr, WINDOW: tl.constexpr,
            SUNK: tl.constexpr, SPLITS: tl.constexpr, OPERAND: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr,
            M: tl.constexpr, N: tl.constexpr, NORM_STEP: tl.constexpr):
    """Grid: C * TILES, SPLITS. parts [C, SPLITS, TILES * M, D], sums of values; stats [2, C, SPLITS, TILES * M]:
    largest score, sum; the last of the splits joins them. length: of the cache's rows, where its positions turn
    round."""
    cached, tile, split = tl.program_id(0) // TILES, tl.program_id(0) % TILES, tl.program_id(1)
    per: tl.constexpr = QUERIES // CACHED
    before: tl.constexpr = QUERIES * STRIDE  # columns of queries
    first_value: tl.constexpr = before if IN_ONE else before + CACHED * SIZE
    width: tl.constexpr = before if HELD else first_value + CACHED * SIZE
    row, side = tile * M + tl.arange(0, M), tl.arange(0, HALF)
    token, inside = row // per, (side < SIZE // 2)[None]
    low, high = _heads_of(projected, query_norm, turn, token, cached * per + row % per, 0, token < n_tokens, n_tokens,
                          width, epsilon, QUERIES, STRIDE, SIZE, HALF, NORM, TURNED, M, NORM_STEP)
    low, high = low.to(OPERAND), high.to(OPERAND)
    most, total = tl.full((M,), NOTHING, tl.float32), tl.zeros((M,), tl.float32)
    out_low, out_high = tl.zeros((M, HALF), tl.float32), tl.zeros((M, HALF), tl.float32)
    keys += cached.to(tl.int64) * head_stride
    values += cached.to(tl.int64) * head_stride
    now = tl.load(position).to(tl.int32)
    oldest = tl.maximum(now - (WINDOW - 1), 0) if WINDOW > 0 else 0
    share = tl.cdiv(tl.cdiv(now - oldest, SPLITS), N) * N
    begin = oldest + split * share
    end = tl.minimum(begin + share, now)
    for start in range(begin, end, N):
        index = start + tl.arange(0, N)
        there, seen = (index < end)[:, None] & inside, (index < end)[None]
        if WINDOW > 0:
            at = (index % length)[:, None] * SIZE + side[None]
            seen = seen & (index[None] > (now + token)[:, None] - WINDOW)
        else:
            at = index[:, None] * SIZE + side[None]
        most, total, out_low, out_high = _fold(
            low, high, tl.load(keys + at, mask=there, other=0), tl.load(keys + at + SIZE // 2, mask=there, other=0),
            tl.load(values + at, mask=there, other=0), tl.load(values + at + SIZE // 2, mask=there, other=0),
            seen, scale, most, total, out_low, out_high, OPERAND, PIECES)
    if split == 0:
        new, here = tl.arange(0, 16), tl.arange(0, 16) < n_tokens
        if HELD:
            at = tl.load(rows + new, mask=here, other=0)[:, None] * SIZE + side[None]
            there = here[:, None] & inside
            k_low = tl.load(keys + at, mask=there, other=0)
            k_high = tl.load(keys + at + SIZE // 2, mask=there, other=0)
            v_low = tl.load(values + at, mask=there, other=0)
            v_high = tl.load(values + at + SIZE // 2, mask=there, other=0)
        else:
            head = tl.zeros_like(new) + cached
            k_low, k_high = _heads_of(projected, key_norm, turn, new, head, before, here, n_tokens, width, epsilon,
                                      CACHED, SIZE, SIZE, HALF, NORM, TURNED, 16, NORM_STEP)
            kept: tl.constexpr = keys.dtype.element_ty
            k_low, k_high = k_low.to(kept), k_high.to(kept)
            v_low, v_high = _heads_of(projected, value_norm, turn, new, head, first_value, here, n_tokens, width,
                                      epsilon, CACHED, SIZE, SIZE, HALF, VALUE_NORM, 0, 16, NORM_STEP)
            v_low, v_high = v_low.to(kept), v_high.to(kept)
            at = tl.load(rows + new, mask=here, other=0)[:, None] * SIZE + side[None]
            there = here[:, None] & inside & (tile == 0)
            tl.store(keys + at, k_low, mask=there)
            tl.store(keys + at + SIZE // 2, k_high, mask=there)
            tl.store(values + at, v_low, mask=there)
            tl.store(values + at + SIZE // 2, v_high, mask=there)
        seen = here[None] & (new[None] <= token[:, None])
        if WINDOW > 0:
            seen = seen & (new[None] > token[:, None] - WINDOW)
        most, total, out_low, out_high = _fold(low, high, k_low, k_high, v_low, v_high, seen, scale, most, total,
                                               out_low, out_high, OPERAND, PIECES)
    at = (cached * SPLITS + split) * (TILES * M) + row
    tl.store(stats + at, most)
    tl.store(stats + CACHED * SPLITS * TILES * M + at, total)
    tl.store(parts + at[:, None] * SIZE + side[None], out_low, mask=inside)
    tl.store(parts + at[:, None] * SIZE + SIZE // 2 + side[None], out_high, mask=inside)
    if is_last(counters + tl.program_id(0), SPLITS):
        _join(parts, stats, projected, sinks, out, cached, row, token, n_tokens, QUERIES, CACHED, SIZE, HALF,
              STRIDE > SIZE, SUNK, SPLITS, TILES * M)


def attend(projected: Tensor, turn: Tensor, keys: Tensor, values: Tensor, position: int | Tensor, heads: Heads,
           rows: Tensor | None = None) -> Tensor:
    """As kernels.trunk.attend.attend."""
    length = keys.shape[2] - (rows is not None)
    if rows is None:
        rows = torch.arange(position, position + len(projected), device=keys.device)
        position = rows[0]
    n_tokens, size, (queries, cached) = len(projected), heads.size, (heads.queries, heads.cached)
    turned, norm = turn.shape[-1], _norm_kind(heads)
    assert n_tokens <= MOST_TOKENS and projected.shape[1] == heads.width, projected.shape
    assert keys.stride() == values.stride() and keys.stride()[2:] == (size, 1) and projected.is_contiguous()
    assert turn.shape[:2] == (2, n_tokens) and turn.is_contiguous() and turn.dtype == torch.float32
    assert turned == size or turned <= size // 2 and norm != OF_ALL and turned % 2 == 0, turn.shape
    assert not (heads.gated and norm == OF_ALL) and position.dtype == rows.dtype == torch.int64 and size % 2 == 0
    tile = max(LEAST_TILE, triton.next_power_of_2(n_tokens * queries // cached))
    tiles = tile // LEAST_TILE if size > WIDE else 1
    splits = max(1, triton.next_power_of_2(BLOCKS // cached))
    assert cached * tiles <= MOST, (cached, tiles)
    parts = torch.empty(cached, splits, tile, size, dtype=torch.float32, device=projected.device)
    stats = torch.empty(2, cached, splits, tile, dtype=torch.float32, device=projected.device)
    out = torch.empty(n_tokens, queries * size, dtype=projected.dtype, device=projected.device)
    norms = [projected if norm is None else norm for norm in (heads.query_norm, heads.key_norm, heads.value_norm)]
    _attend[(cached * tiles, splits)](
        projected, turn, keys, values, position, rows, *norms, projected if heads.sinks is None else heads.sinks, parts,
        stats, out, counters(projected.device), n_tokens, length, keys.stride(1), heads.scale, heads.epsilon,
        QUERIES=queries, CACHED=cached, SIZE=size, HALF=max(LEAST_TILE, triton.next_power_of_2(size // 2)),
        STRIDE=size * (1 + heads.gated), TURNED=turned, NORM=norm,
        VALUE_NORM=NO_NORM if heads.value_norm is None else OF_HEAD, IN_ONE=heads.in_one, HELD=heads.held,
        WINDOW=heads.window, SUNK=heads.sinks is not None, SPLITS=splits,
        OPERAND=tl.float32 if keys.dtype == torch.float32 else tl.float16, PIECES=WARPS if size > WIDE else 1,
        TILES=tiles, M=tile // tiles, N=ROWS, NORM_STEP=NORM_STEP, num_stages=2 if size > WIDE else 3,
        num_warps=WARPS)
    return out


def _norm_kind(heads: Heads) -> int:
    if heads.query_norm is None:
        return NO_NORM
    return OF_HEAD if heads.query_norm.numel() == heads.size else OF_ALL
