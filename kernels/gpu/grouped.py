"""Device version of `multiply_tile` (kernels/dense.py): prefill's products read packed planes, no matrix is written.
And of `dequantize`, which writes one, where that is not possible.

Three kernels. `_halve` makes 16-bit floats of the activations once, each row divided by a power of two of its own, so
that no activation and no partial sum overflows 16 bits. `_grouped_gate_up` multiplies them with the 4-bit codes
themselves, less 8, which 16-bit floats hold exactly: a group (or half of one) is summed in 16 bits, which cards for
games do at twice the rate of 32, then scale and offset are applied in float32. `_grouped_down` decodes down rows, whose
scales run across the sum, to 16-bit floats; its activations are the products, divided likewise for each stretch of
neurons that one block made.

A block takes rows of one expert only. Which, it finds in `ends`, so that one grid serves any routing.

Legend: T tokens, t rows of all experts, n experts, I neurons, H hidden; M rows, N columns of a block, K of a step.
Sizes and places of kernels/layout.py are words (int32) here.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import Gate, NeuronBias
from kernels.gpu.gate import bias_tables, check_gate, gated, kind_of
from kernels.gpu.planes import scale_offset, words_of
from kernels.layout import Layout

Tensor = torch.Tensor

ROWS = 64               # of a block
NEURONS = 32            # of a block of `_grouped_gate_up`, and of a step of `_grouped_down`
COLUMNS = 64            # of hidden that a block of `_grouped_down` makes: part of a group
DEPTH = 64              # of hidden in a step of `_grouped_gate_up`: a group or half of one


@triton.jit
def _power_below(values, AXIS: tl.constexpr):
    """The largest power of two that is no larger than the largest of `values`, and infinite where one is no number."""
    size = tl.abs(values)
    size = tl.where(size <= 3.4028234663852886e38, size, float("inf"))     # a maximum passes over NaN
    bits = tl.maximum(tl.max(size, axis=AXIS), 1e-30).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _divided(values, power):
    """values / power as float16, 0 where the power is infinite: the power itself then says that there is no number."""
    finite = power < float("inf")
    return tl.where(finite, values * (1.0 / tl.where(finite, power, 1.0)), 0.0).to(tl.float16)


@triton.jit
def _piece(x, token, step, HIDDEN: tl.constexpr, K: tl.constexpr):
    """float32 [P, K] of a token's row, and where they stand in it."""
    column = step[:, None] * K + tl.arange(0, K)[None]
    return tl.load(x + token * HIDDEN + column, mask=column < HIDDEN, other=0).to(tl.float32), column


@triton.jit
def _halve(x, halves, powers, sums, HIDDEN: tl.constexpr, STEPS: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    """Grid: T. x [T, H] -> halves float16 [T, H], powers float32 [T], sums of halves float32 [T, H/K]. P steps a time:
    a whole row does not fit the registers."""
    token, power = tl.program_id(0).to(tl.int64), tl.zeros((1,), tl.float32)
    for first in range(0, STEPS, P):
        values, _ = _piece(x, token, first + tl.arange(0, P), HIDDEN, K)
        power = tl.maximum(power, _power_below(tl.reshape(values, 1, P * K), 1))
    for first in range(0, STEPS, P):
        step = first + tl.arange(0, P)
        values, column = _piece(x, token, step, HIDDEN, K)
        divided = _divided(values, power[:, None])
        tl.store(halves + token * HIDDEN + column, divided, mask=column < HIDDEN)
        tl.store(sums + token * (HIDDEN // K) + step, tl.sum(divided.to(tl.float32), axis=1), mask=step < HIDDEN // K)
    tl.store(powers + token + tl.arange(0, 1), power)


@triton.jit
def _rows_of(ends, block, n, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The block's expert, and its rows from `first` to `end`; behind the last block an empty range."""
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < n, other=0)
    begin = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < n), other=0)
    blocks = tl.where(expert < n, tl.cdiv(end - begin, ROWS), 0)
    behind = tl.cumsum(blocks, axis=0)
    mine = (block < behind) & (block >= behind - blocks)
    first = tl.sum(tl.where(mine, begin + (block - behind + blocks) * ROWS, 0), axis=0)
    return tl.sum(tl.where(mine, expert, 0), axis=0), first, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def _small(codes):
    """Integers 0..15 -> float16 -8..7, without the conversion unit: 1024 + code is a pattern of bits."""
    return (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1032.0


@triton.jit
def _codes(coarse, fine):
    """int32 [N, words] of 2-bit codes and of their refinement -> float16 [16 * words, N], less 8."""
    element = tl.arange(0, 16)
    shift = (8 * (element % 4) + 2 * (element // 4))[None, None]
    codes = ((coarse[:, :, None] >> shift) & 3) * 4 + ((fine[:, :, None] >> shift) & 3)
    return tl.trans(_small(codes).reshape(coarse.shape[0], 16 * coarse.shape[1]))


@triton.jit
def _added(total, x, sum_x, codes, pair):
    """total [M, N] and a step of it: x float16 [M, K], its sums [M], codes float16 [K, N], pair [N] of their group."""
    scale, offset = scale_offset(pair)
    part = tl.dot(x, codes, out_dtype=tl.float16).to(tl.float32)
    return total + part * scale[None] + sum_x[:, None] * (offset + 8 * scale)[None]


@triton.jit
def _grouped_gate_up(halves, powers, sums, tokens, ends, blobs, gate_bias, up_bias, bias_ids, products, product_powers,
                     n, blob16, alpha, limit, NEURONS: tl.constexpr, HIDDEN: tl.constexpr, GROUP: tl.constexpr,
                     SKETCH_ROW: tl.constexpr, SKETCHES: tl.constexpr, RECORD: tl.constexpr, PLANE: tl.constexpr,
                     SCALES: tl.constexpr, SCALES_AT: tl.constexpr, REFINE_AT: tl.constexpr, KIND: tl.constexpr,
                     BIASED: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Grid: blocks of I, blocks of rows. products float16 [t, I], product_powers float32 [t, blocks of I]."""
    expert, first, end = _rows_of(ends, tl.program_id(1), n, EXPERTS, M)
    if first >= end:
        return
    row, neuron = first + tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    there, valid = row < end, neuron < NEURONS
    token = tl.load(tokens + row, mask=there, other=0).to(tl.int64)
    near = tl.minimum(neuron, NEURONS - 1)      # what is made of it behind the last is not stored
    blob = blobs + expert.to(tl.int64) * blob16 * 4
    sketch, record = blob + near * SKETCH_ROW, blob + SKETCHES + near * RECORD
    gate, up = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    for step in range(HIDDEN // K):
        at = step * (K // 16) + tl.arange(0, K // 16)[None]
        x = tl.load(halves + token[:, None] * HIDDEN + step * K + tl.arange(0, K)[None], mask=there[:, None], other=0)
        sum_x = tl.load(sums + token * (HIDDEN // K) + step, mask=there, other=0)
        pair = record + SCALES_AT + step * K // GROUP
        codes = _codes(tl.load(sketch[:, None] + at), tl.load(record[:, None] + REFINE_AT + at))
        gate = _added(gate, x, sum_x, codes, tl.load(pair + SCALES))
        codes = _codes(tl.load(sketch[:, None] + PLANE + at), tl.load(record[:, None] + REFINE_AT + PLANE + at))
        up = _added(up, x, sum_x, codes, tl.load(pair + 2 * SCALES))
    power = tl.load(powers + token, mask=there, other=0)[:, None]
    gate, up = gate * power, up * power
    if BIASED:
        at = tl.load(bias_ids + expert) * NEURONS + near
        gate += tl.load(gate_bias + at)[None]
        up += tl.load(up_bias + at)[None]
    product = tl.where(valid[None], gated(gate, up, alpha, limit, KIND), 0.0)
    power = _power_below(product, 1)
    here = row.to(tl.int64)
    tl.store(products + here[:, None] * NEURONS + neuron[None], _divided(product, power[:, None]),
             mask=there[:, None] & valid[None])
    tl.store(product_powers + here * tl.num_programs(0) + tl.program_id(0), power, mask=there)


@triton.jit
def _grouped_down(products, powers, ends, blobs, out, n, blob16, NEURONS: tl.constexpr, HIDDEN: tl.constexpr,
                  GROUP: tl.constexpr, SKETCHES: tl.constexpr, RECORD: tl.constexpr, SCALES_AT: tl.constexpr,
                  EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Grid: blocks of H, blocks of rows. products, powers: as `_grouped_gate_up` left them; out [t, H]."""
    expert, first, end = _rows_of(ends, tl.program_id(1), n, EXPERTS, M)
    if first >= end:
        return
    row = first + tl.arange(0, M)
    there, here = row < end, row.to(tl.int64)
    records = blobs + expert.to(tl.int64) * blob16 * 4 + SKETCHES
    word = tl.program_id(0) * (N // 8) + tl.arange(0, N // 8)
    element = tl.arange(0, 8)
    shift = (8 * (element % 4) + 4 * (element // 4))[None, None]
    stretches: tl.constexpr = (NEURONS + K - 1) // K
    total = tl.zeros((M, N), tl.float32)
    for stretch in range(stretches):
        neuron = stretch * K + tl.arange(0, K)
        valid = neuron < NEURONS
        x = tl.load(products + here[:, None] * NEURONS + neuron[None], mask=there[:, None] & valid[None], other=0)
        record = records + neuron * RECORD
        words = tl.load(record[:, None] + word[None], mask=valid[:, None], other=0)
        scale, offset = scale_offset(tl.load(record + SCALES_AT + tl.program_id(0) * N // GROUP, mask=valid, other=0))
        codes = _small((words[:, :, None] >> shift) & 15).to(tl.float32)
        rows = (codes * scale[:, None, None] + (offset + 8 * scale)[:, None, None]).to(tl.float16).reshape(K, N)
        part = tl.dot(x, rows, out_dtype=tl.float16)
        power = tl.load(powers + here * stretches + stretch, mask=there, other=0)
        total += part.to(tl.float32) * power[:, None]
    column = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + here[:, None] * HIDDEN + column[None], total.to(out.dtype.element_ty), mask=there[:, None])


def multiply_tile(x: Tensor, tokens: Tensor, ends: Tensor, blobs: Tensor, layout: Layout, gate: Gate,
                  bias: NeuronBias | None = None) -> Tensor:
    """As kernels.dense.multiply_tile."""
    check_gate(gate)
    n_tokens, hidden, neurons, n_rows, n = len(x), layout.hidden, layout.neurons, len(tokens), len(blobs)
    assert x.shape[1] == hidden and x.is_contiguous() and ends.shape == (n,) and ends.dtype == torch.int32
    assert blobs.shape[1] >= layout.blob_bytes, (blobs.shape, layout.blob_bytes)
    assert hidden % DEPTH == 0 and layout.group % DEPTH == 0 and layout.group % COLUMNS == 0, layout
    blocks = triton.cdiv(neurons, NEURONS)
    halves = torch.empty(n_tokens, hidden, dtype=torch.float16, device=x.device)
    powers = torch.empty(n_tokens, dtype=torch.float32, device=x.device)
    sums = torch.empty(n_tokens, hidden // DEPTH, dtype=torch.float32, device=x.device)
    _halve[(n_tokens,)](x, halves, powers, sums, HIDDEN=hidden, STEPS=hidden // DEPTH, K=DEPTH, P=16, num_warps=4)
    words, row_blocks = words_of(blobs), triton.cdiv(n_rows, ROWS) + n      # a block more where an expert's is not full
    products = torch.empty(n_rows, neurons, dtype=torch.float16, device=x.device)
    product_powers = torch.empty(n_rows, blocks, dtype=torch.float32, device=x.device)
    sizes = {"n": n, "blob16": words.stride(0) // 4, "NEURONS": neurons, "HIDDEN": hidden, "GROUP": layout.group,
             "SKETCHES": layout.sketch_bytes // 4, "RECORD": layout.record // 4,
             "SCALES_AT": layout.record_scales_at // 4, "EXPERTS": triton.next_power_of_2(n), "M": ROWS}
    _grouped_gate_up[(blocks, row_blocks)](
        halves, powers, sums, tokens, ends, words, *bias_tables(bias, (n,), neurons, sums), products, product_powers,
        alpha=float(gate.alpha),
        limit=float(gate.limit), SKETCH_ROW=layout.sketch_row // 4, PLANE=layout.plane2 // 4, SCALES=layout.groups,
        REFINE_AT=layout.refine_at // 4, KIND=kind_of(gate), BIASED=bias is not None, N=NEURONS, K=DEPTH,
        num_warps=4, **sizes)
    out = torch.empty(n_rows, hidden, dtype=x.dtype, device=x.device)
    _grouped_down[(hidden // COLUMNS, row_blocks)](products, product_powers, ends, words, out, N=COLUMNS, K=NEURONS,
                                           num_warps=4, **sizes)
    return out


# --- into 16-bit matrices ------------------------------------------------------------------------------------
# One block a neuron and stretch of hidden, one element a thread. Plain shifts instead of four codes at once: what waits
# in prefill is the link, and of 33 billion weights on a card of 28 multiprocessors this is some 50 ms (ten instructions
# a weight, computed) beside the 700 ms that they take to arrive.
STRETCH = 1024          # elements of a row that a block turns


@triton.jit
def _code2(plane, h, valid):
    """2-bit codes of the elements h of a row whose plane begins at int32 pointer `plane`."""
    words = tl.load(plane + h // 16, mask=valid, other=0)
    return (words >> (8 * (h % 4) + 2 * (h % 16 // 4))) & 3


@triton.jit
def _store(target, row, h, codes, pair, valid, HIDDEN: tl.constexpr):
    scale, offset = scale_offset(pair)
    value = scale * codes.to(tl.float32) + offset
    tl.store(target + row * HIDDEN + h, value.to(target.dtype.element_ty), mask=valid)


@triton.jit
def _dequantize(blobs, gate_up, down, blob16, NEURONS: tl.constexpr, HIDDEN: tl.constexpr, GROUP: tl.constexpr,
                SKETCH_ROW: tl.constexpr, SKETCHES: tl.constexpr, RECORD: tl.constexpr, PLANE: tl.constexpr,
                SCALES: tl.constexpr, SCALES_AT: tl.constexpr, REFINE_AT: tl.constexpr, STRETCH: tl.constexpr):
    """Grid: n*I, stretches of H. Sizes and places in words, blob16 in 16 bytes; PLANE of 2-bit codes."""
    expert = (tl.program_id(0) // NEURONS).to(tl.int64)
    neuron = tl.program_id(0) % NEURONS
    h = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    valid = h < HIDDEN
    blob = blobs + expert * blob16 * 4
    sketch = blob + neuron * SKETCH_ROW
    record = blob + SKETCHES + neuron * RECORD
    pair = record + SCALES_AT + h // GROUP
    words = tl.load(record + h // 8, mask=valid, other=0)
    codes = (words >> (8 * (h % 4) + 4 * (h % 8 // 4))) & 15
    _store(down, expert * NEURONS + neuron, h, codes, tl.load(pair, mask=valid, other=0), valid, HIDDEN)
    row = expert * (2 * NEURONS) + neuron
    codes = _code2(sketch, h, valid) * 4 + _code2(record + REFINE_AT, h, valid)
    _store(gate_up, row, h, codes, tl.load(pair + SCALES, mask=valid, other=0), valid, HIDDEN)
    codes = _code2(sketch + PLANE, h, valid) * 4 + _code2(record + REFINE_AT + PLANE, h, valid)
    _store(gate_up, row + NEURONS, h, codes, tl.load(pair + 2 * SCALES, mask=valid, other=0), valid, HIDDEN)


def dequantize(blobs: Tensor, gate_up: Tensor, down: Tensor, layout: Layout) -> None:
    """As kernels.dense.dequantize."""
    n, neurons, hidden = len(blobs), layout.neurons, layout.hidden
    assert gate_up.shape == (n, 2 * neurons, hidden) and down.shape == (n, neurons, hidden), (gate_up.shape, down.shape)
    assert gate_up.is_contiguous() and down.is_contiguous() and gate_up.dtype == down.dtype
    words = words_of(blobs)
    _dequantize[(n * neurons, triton.cdiv(hidden, STRETCH))](
        words, gate_up, down, words.stride(0) // 4, NEURONS=neurons, HIDDEN=hidden, GROUP=layout.group,
        SKETCH_ROW=layout.sketch_row // 4, SKETCHES=layout.sketch_bytes // 4, RECORD=layout.record // 4,
        PLANE=layout.plane2 // 4, SCALES=layout.groups, SCALES_AT=layout.record_scales_at // 4,
        REFINE_AT=layout.refine_at // 4, STRETCH=STRETCH, num_warps=4)
