"""Device version of kernels/trunk/latent.py: queries to what meets the rows, the cache in splits, back and joined.

The grid is fixed, so a recorded step serves every position, and what is read are the rows that are seen. All heads'
queries are the rows of tiles of matrix products, whose operands are 16-bit where the cache is. A block sums up a part
of a row's numbers, which fits the registers of every card; the blocks of one split score the same rows at the same
time, out of the second cache. The expanding matrix is read in its codes.

Legend as there; M queries of a tile, N rows under way.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.planes import scale_offset
from kernels.trunk.latent import Latent
from kernels.trunk.linear import MOST_TOKENS

Tensor = torch.Tensor

BLOCKS = 64         # of tiles times parts times splits: twice the multiprocessors of the smallest cards
TILE, ROWS = 16, 32     # queries of a block, rows of the cache under way
PART, STEP = 128, 64    # numbers of a row that a block sums up, and that meet a query at a time
COLUMNS, DEPTH = 64, 32  # of the expanding matrix, under way at a time
NOTHING = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _weights(codes, scales, row, column, there, RANK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """float32 [rows, columns] of a matrix with RANK columns, as kernels/trunk/linear.py has it."""
    at = row.to(tl.int64)[:, None]
    if BITS == 16:
        value = tl.load(codes + at * RANK + column[None], mask=there, other=0).to(tl.float32)
    else:
        pair = tl.load(scales + at * (RANK // GROUP) + (column // GROUP)[None], mask=there, other=0)
        if BITS == 8:
            code = tl.load(codes + at * RANK + column[None], mask=there, other=0)
            value = pair.to(tl.float32) * code.to(tl.float32)
        else:
            code = tl.load(codes + at * (RANK // 2) + (column // 2)[None], mask=there, other=0).to(tl.int32)
            scale, offset = scale_offset(pair)
            value = scale * ((code >> (4 * (column % 2))[None]) & 15).to(tl.float32) + offset
    return value


@triton.jit
def _turn(source, target, cosines, sines, pair, there, scale, HALF: tl.constexpr, APART: tl.constexpr,
          CACHED_APART: tl.constexpr):
    """HALF pairs, their numbers so far apart (1: neighbours) -> the same turned, times scale, so far apart."""
    first = pair * (2 if APART == 1 else 1)
    a = tl.load(source + first, mask=there, other=0)
    b = tl.load(source + first + APART, mask=there, other=0)
    cosine, sine = tl.load(cosines + pair, mask=there, other=0), tl.load(sines + pair, mask=there, other=0)
    first = pair * (2 if CACHED_APART == 1 else 1)
    kind: tl.constexpr = target.dtype.element_ty
    tl.store(target + first, ((a * cosine - b * sine) * scale).to(kind), mask=there)
    tl.store(target + first + CACHED_APART, ((b * cosine + a * sine) * scale).to(kind), mask=there)


@triton.jit
def _enter(query, new, turn, norm, codes, scales, queries, fresh, n_tokens, turn_row, scale, epsilon,
           HEADS: tl.constexpr, RANK: tl.constexpr, STILL: tl.constexpr, TURNING: tl.constexpr, VALUES: tl.constexpr,
           BITS: tl.constexpr, GROUP: tl.constexpr, APART: tl.constexpr, CACHED_APART: tl.constexpr,
           COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PAIRS: tl.constexpr, WHOLE: tl.constexpr):
    """Grid: Q + 1, blocks of R, T. -> queries [T, Q, R + P], times scale; fresh [T, R + P], as the cache keeps them: by
    the last head's first block. PAIRS, WHOLE: the next powers of two to P/2 and R."""
    head, token = tl.program_id(0), tl.program_id(2)
    width: tl.constexpr = RANK + TURNING
    half: tl.constexpr = TURNING // 2
    pair = tl.arange(0, PAIRS)
    cosines = turn + token * turn_row
    sines = cosines + n_tokens * turn_row
    if head < HEADS:
        own = query + (token * HEADS + head) * (STILL + TURNING)
        to = queries + (token * HEADS + head) * width
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, STILL, DEPTH):
            row = start + tl.arange(0, DEPTH)
            there = (row < STILL)[:, None] & (column < RANK)[None]
            weights = _weights(codes, scales, head * (STILL + VALUES) + row, column, there, RANK, BITS, GROUP)
            total += tl.sum(weights * tl.load(own + row, mask=row < STILL, other=0)[:, None], axis=0)
        tl.store(to + column, (total * scale).to(queries.dtype.element_ty), mask=column < RANK)
        if tl.program_id(1) == 0:
            _turn(own + STILL, to + RANK, cosines, sines, pair, pair < half, scale, half, APART, CACHED_APART)
    elif tl.program_id(1) == 0:
        column = tl.arange(0, WHOLE)
        value = tl.load(new + token * width + column, mask=column < RANK, other=0)
        factor = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / RANK + epsilon)
        weight = tl.load(norm + column, mask=column < RANK, other=0).to(tl.float32)
        to = fresh + token * width
        tl.store(to + column, (weight * (value * factor)).to(fresh.dtype.element_ty), mask=column < RANK)
        _turn(new + token * width + RANK, to + RANK, cosines, sines, pair, pair < half, 1.0, half, APART, CACHED_APART)


@triton.jit
def _fold(queries, at, rows, row_at, keys, key_at, there, seen, part, most, total, out, RANK: tl.constexpr,
          TURNING: tl.constexpr, STEP: tl.constexpr, TURN: tl.constexpr):
    """Rows of the cache, at row_at and key_at [N], into what the queries at `at` [M] have so far: the largest score,
    the sum of shares, and of the values the numbers `part`."""
    operand: tl.constexpr = queries.dtype.element_ty
    side = tl.arange(0, TURN)
    inside = (side < TURNING)[None]
    query = tl.load(queries + at[:, None] + RANK + side[None], mask=inside, other=0)
    key = tl.load(keys + key_at[:, None] + side[None], mask=there[:, None] & inside, other=0).to(operand)
    score = tl.dot(query, tl.trans(key), input_precision="ieee")
    for start in range(0, RANK, STEP):
        column = start + tl.arange(0, STEP)
        inside = (column < RANK)[None]
        query = tl.load(queries + at[:, None] + column[None], mask=inside, other=0)
        row = tl.load(rows + row_at[:, None] + column[None], mask=there[:, None] & inside, other=0).to(operand)
        score = tl.dot(query, tl.trans(row), score, input_precision="ieee")
    score = tl.where(seen, score, float("-inf"))
    largest = tl.maximum(most, tl.maximum(tl.max(score, axis=1), NOTHING))
    share, before = tl.exp(score - largest[:, None]), tl.exp(most - largest)
    value = tl.load(rows + row_at[:, None] + part[None], mask=there[:, None] & (part < RANK)[None], other=0)
    out = tl.dot(share.to(operand), value.to(operand), out * before[:, None], input_precision="ieee")
    return largest, total * before + tl.sum(share, axis=1), out


@triton.jit
def _attend(queries, fresh, rows, keys, position, places, out, stats, n_tokens, HEADS: tl.constexpr,
            RANK: tl.constexpr, TURNING: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, M: tl.constexpr,
            N: tl.constexpr, PART: tl.constexpr, STEP: tl.constexpr, TURN: tl.constexpr):
    """Grid: TILES, parts of R, SPLITS. -> out [SPLITS, TILES * M, R], sums of values; stats [2, SPLITS, TILES * M]."""
    tile, split = tl.program_id(0), tl.program_id(2)
    part = tl.program_id(1) * PART + tl.arange(0, PART)
    query = tile * M + tl.arange(0, M)
    width: tl.constexpr = RANK + TURNING
    at = tl.minimum(query, n_tokens * HEADS - 1) * width   # what is behind the last one repeats it
    most, total = tl.full((M,), NOTHING, tl.float32), tl.zeros((M,), tl.float32)
    summed = tl.zeros((M, PART), tl.float32)
    end = tl.load(position).to(tl.int32)
    share = tl.cdiv(tl.cdiv(end, SPLITS), N) * N
    begin = split * share
    end = tl.minimum(begin + share, end)
    for start in range(begin, end, N):
        index = start + tl.arange(0, N)
        most, total, summed = _fold(queries, at, rows, index.to(tl.int64) * RANK, keys, index.to(tl.int64) * TURNING,
                                    index < end, (index < end)[None], part, most, total, summed, RANK, TURNING, STEP,
                                    TURN)
    if split == 0:
        index = tl.arange(0, 16)
        here, token = index < n_tokens, query // HEADS
        most, total, summed = _fold(queries, at, fresh, index * width, fresh + RANK, index * width, here,
                                    here[None] & (index[None] <= token[:, None]), part, most, total, summed, RANK,
                                    TURNING, STEP, TURN)
        if tile == 0:
            place = tl.load(places + index, mask=here, other=0)[:, None]
            there = here[:, None] & (part < RANK)[None]
            new = tl.load(fresh + index[:, None] * width + part[None], mask=there, other=0)
            tl.store(rows + place * RANK + part[None], new, mask=there)
            if tl.program_id(1) == 0:
                side = tl.arange(0, TURN)
                turned = here[:, None] & (side < TURNING)[None]
                key = tl.load(fresh + index[:, None] * width + RANK + side[None], mask=turned, other=0)
                tl.store(keys + place * TURNING + side[None], key, mask=turned)
    to = split * (TILES * M) + query
    tl.store(out + to[:, None] * RANK + part[None], summed, mask=(part < RANK)[None])
    if tl.program_id(1) == 0:
        tl.store(stats + to, most)
        tl.store(stats + SPLITS * TILES * M + to, total)


@triton.jit
def _expand(parts, stats, codes, scales, out, HEADS: tl.constexpr, RANK: tl.constexpr, STILL: tl.constexpr,
            VALUES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
            COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Grid: Q, blocks of values, T. The splits of one head in order, through its values' part -> out [T, Q * values].
    PADDED: queries of a split."""
    head, token = tl.program_id(0), tl.program_id(2)
    at = tl.arange(0, SPLITS) * PADDED + token * HEADS + head
    most = tl.load(stats + at)
    weight = tl.exp(most - tl.max(most, axis=0))
    weight = weight / tl.sum(weight * tl.load(stats + SPLITS * PADDED + at), axis=0)
    value = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    total = tl.zeros((DEPTH,), tl.float32)
    for start in range(0, RANK, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < RANK)[None]
        row = tl.sum(tl.load(parts + at[:, None] * RANK + column[None], mask=inside, other=0) * weight[:, None], axis=0)
        weights = _weights(codes, scales, head * (STILL + VALUES) + STILL + value, column,
                           (value < VALUES)[:, None] & inside, RANK, BITS, GROUP)
        total += tl.sum(weights * row[None], axis=1)
    tl.store(out + (token * HEADS + head) * VALUES + value, total, mask=value < VALUES)


def attend_latent(query: Tensor, new: Tensor, turn: Tensor, rows: Tensor, keys: Tensor, position: int | Tensor,
                  latent: Latent, places: Tensor | None = None) -> Tensor:
    """As kernels.trunk.latent.attend_latent."""
    if places is None:
        places = torch.arange(position, position + len(query), device=rows.device)
        position = places[0]
    n_tokens, heads, rank, turning = len(query), latent.heads, latent.rank, latent.turning
    assert n_tokens <= MOST_TOKENS and query.shape[1] == heads * (latent.still + turning), query.shape
    assert new.shape[1] == rank + turning and query.is_contiguous() and new.is_contiguous(), new.shape
    assert rows.is_contiguous() and keys.is_contiguous() and rows.dtype == keys.dtype, (rows.shape, keys.shape)
    assert turn.is_contiguous() and turn.shape[1] == n_tokens and position.dtype == places.dtype == torch.int64
    tiles, parts = triton.cdiv(n_tokens * heads, TILE), triton.cdiv(rank, PART)
    splits = max(1, triton.next_power_of_2(BLOCKS // (tiles * parts)))
    like = dict(device=query.device, dtype=torch.float32)
    operand = torch.float32 if rows.dtype == torch.float32 else torch.float16
    queries = torch.empty(n_tokens, heads, rank + turning, device=query.device, dtype=operand)
    fresh = torch.empty(n_tokens, rank + turning, device=query.device, dtype=rows.dtype)
    sums, stats = torch.empty(splits, tiles * TILE, rank, **like), torch.empty(2, splits, tiles * TILE, **like)
    out = torch.empty(n_tokens, heads * latent.values, **like)
    codes, scales, matrix = _matrix(latent)
    sizes = dict(HEADS=heads, RANK=rank, STILL=latent.still, VALUES=latent.values, COLUMNS=COLUMNS, DEPTH=DEPTH)
    _enter[(heads + 1, triton.cdiv(rank, COLUMNS), n_tokens)](
        query, new, turn, latent.norm, codes, scales, queries, fresh, n_tokens, turn.shape[2], latent.scale,
        latent.epsilon, TURNING=turning, APART=1 if latent.neighbours else turning // 2,
        CACHED_APART=1 if latent.cached_neighbours else turning // 2, PAIRS=triton.next_power_of_2(turning // 2),
        WHOLE=triton.next_power_of_2(rank), **sizes, **matrix, num_warps=4)
    _attend[(tiles, parts, splits)](
        queries, fresh, rows, keys, position, places, sums, stats, n_tokens, HEADS=heads, RANK=rank, TURNING=turning,
        SPLITS=splits, TILES=tiles, M=TILE, N=ROWS, PART=PART, STEP=STEP, TURN=max(16, triton.next_power_of_2(turning)),
        num_warps=8)
    _expand[(heads, triton.cdiv(latent.values, DEPTH), n_tokens)](
        sums, stats, codes, scales, out, SPLITS=splits, PADDED=tiles * TILE, **sizes, **matrix, num_warps=4)
    return out


def _matrix(latent: Latent) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Codes and scales as the kernels read them, and their kind."""
    codes, scales, bias = latent.expand.parts[0]
    assert codes.is_contiguous() and bias is None
    if scales is None:
        return codes, codes, dict(BITS=16, GROUP=1)
    assert scales.is_contiguous() and scales.dtype == torch.float16
    four, group = codes.dtype == torch.uint8, latent.rank // scales.shape[1]
    return codes, scales.view(torch.int32)[..., 0] if four else scales, dict(BITS=4 if four else 8, GROUP=group)
