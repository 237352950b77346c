"""Device version of kernels/dense.py's `whole_sums` and of kernels/apply.py's `chosen_sums`: the arithmetic that a
processor repeats bit by bit.

Groups one after the other, nothing joined to a fused operation (the launches say so), a division that rounds as IEEE
wants it, and integers wherever the order of adding is the hardware's. It takes more operations than `dense`; for who
lets a processor compute part of a layer.

Legend: T tokens, k routed experts, I neurons, H padded hidden, N ranks in the list of neurons (of whole experts k * I),
G groups along H.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import dense
from kernels.activation import KINDS, FixedPoint, Gate, NeuronBias
from kernels.gpu import apply as product
from kernels.gpu.gate import NAN, bias_tables, biased, kind_of
from kernels.gpu.planes import scale_offset, words_of
from kernels.layout import Layout

Tensor = torch.Tensor

SILU, GELU_TANH, RELU = (tl.constexpr(KINDS.index(kind)) for kind in ("silu", "gelu_tanh", "relu"))
MOST, NO_NUMBER, ONE = tl.constexpr(dense.MOST), tl.constexpr(dense.NO_NUMBER), tl.constexpr(2.0 ** dense.SHIFT)
LOG2E, LN2_HIGH, LN2_LOW = map(tl.constexpr, (dense.LOG2E, dense.LN2_HIGH, dense.LN2_LOW))
C0, C1, C2, C3, C4 = map(tl.constexpr, dense.EXPONENTIAL[:5])
_gate_and_up, _listed, _locate = product._gate_and_up, product._listed, product._locate


@triton.jit
def _sigmoid(x):
    z = tl.minimum(tl.maximum(-x, -87.0, propagate_nan=NAN), 87.0, propagate_nan=NAN)
    n = tl.floor(z * LOG2E + 0.5)
    r = (z - n * LN2_HIGH) - n * LN2_LOW
    total = (((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + 1.0) * r + 1.0
    power = ((tl.where(n == n, n, 0.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.div_rn(1.0, 1.0 + total * power)


@triton.jit
def _gated(gate, up, alpha, limit, KIND: tl.constexpr):
    if KIND == SILU:
        return gate * _sigmoid(gate) * up
    if KIND == RELU:
        return tl.maximum(gate, 0, propagate_nan=NAN) * up
    if KIND == GELU_TANH:
        return gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    gate = tl.minimum(gate, limit, propagate_nan=NAN)
    up = tl.minimum(tl.maximum(up, -limit, propagate_nan=NAN), limit, propagate_nan=NAN)
    return (up + 1) * gate * _sigmoid(gate * alpha)


@triton.jit
def _strict_products(high, low, x_scale, x_sum, blobs, place, records, record_place, neurons, fidelity, gate_bias,
                     up_bias, bias_ids, products, n_ranks, n_routed, blob16, record16, alpha, limit,
                     NEURONS: tl.constexpr, ROW: tl.constexpr, RECORD: tl.constexpr, RECORDS_AT: tl.constexpr,
                     PLANE: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, SCALES_AT: tl.constexpr,
                     RECORD_SCALES_AT: tl.constexpr, REFINE_AT: tl.constexpr, KIND: tl.constexpr,
                     BIASED: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr):
    """Grid: blocks of ranks, T. -> products [T, N]."""
    token = tl.program_id(1)
    rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rank < n_ranks
    index, kind = _listed(neurons, fidelity, token, rank, n_ranks, DENSE)
    valid = index >= 0
    row, record = _locate(index, rank, token, blobs, place, records, record_place, n_ranks, n_routed, blob16, record16,
                          NEURONS, ROW, RECORD, RECORDS_AT, DENSE)
    gate, up = _gate_and_up(row, record, kind, valid, high + token * (4 * PLANE), low + token * (4 * PLANE),
                            x_scale + token * GROUPS, x_sum + token * GROUPS, PLANE, GROUPS, WORDS, 1, SCALES_AT,
                            RECORD_SCALES_AT, REFINE_AT, ROWS)
    if BIASED:
        gate, up = biased(gate, up, gate_bias, up_bias, bias_ids + token * n_routed, index, valid, NEURONS)
    tl.store(products + token * n_ranks + rank, _gated(gate, up, alpha, limit, KIND), mask=there)


@triton.jit
def _fixed(values):
    return tl.floor(values * ONE + 0.5).to(tl.int64)


@triton.jit
def _times(words, factor, SHIFT: tl.constexpr):
    """Codes [R, S, W] times factors int64 [R, S] -> their sums [S, W]."""
    return tl.sum(((words >> SHIFT) & 15).to(tl.int64) * factor[:, :, None], axis=0)


@triton.jit
def _down_sums(products, blobs, place, records, record_place, starts, out, n_ranks, n_routed, blob16, record16,
               NEURONS: tl.constexpr, RECORD: tl.constexpr, RECORDS_AT: tl.constexpr, GROUPS: tl.constexpr,
               WORDS4: tl.constexpr, STEP: tl.constexpr, RECORD_SCALES_AT: tl.constexpr, DENSE: tl.constexpr,
               ROWS: tl.constexpr):
    """Grid: blocks of H, k, T. out int64 [T, k, H]; starts [T, k + 1]: the first rank of each expert. WORDS4: words of
    4-bit codes of a group."""
    token, routed = tl.program_id(2), tl.program_id(1)
    group = tl.program_id(0) * STEP + tl.arange(0, STEP)
    word = group[:, None] * WORDS4 + tl.arange(0, WORDS4)[None]
    blob = blobs + tl.load(place + token * n_routed + routed).to(tl.int64) * blob16 * 4
    low, high = routed * NEURONS, (routed + 1) * NEURONS
    if not DENSE:
        low = tl.load(starts + token * (n_routed + 1) + routed)
        high = tl.load(starts + token * (n_routed + 1) + routed + 1)
    t0 = tl.zeros((STEP, WORDS4), tl.int64)
    t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
    offsets = tl.zeros((STEP,), tl.int64)
    strange = tl.zeros((STEP,), tl.int32)
    for start in range(low, high, ROWS):
        rank = start + tl.arange(0, ROWS)
        valid = rank < high
        weight = tl.load(products + token * n_ranks + rank, mask=valid, other=0)
        if DENSE:
            record = blob + (RECORDS_AT + (rank - low) * RECORD)
        else:
            at = tl.load(record_place + token * n_ranks + rank, mask=valid, other=0).to(tl.int64)
            record = records + at * record16 * 4
        words = tl.load(record[:, None, None] + word[None], mask=valid[:, None, None], other=0)
        scale, offset = scale_offset(tl.load(record[:, None] + (RECORD_SCALES_AT + group[None]), mask=valid[:, None],
                                             other=0))
        factor = weight[:, None] * scale
        offset = weight[:, None] * offset
        fits = (tl.abs(factor) <= MOST) & (tl.abs(offset) <= MOST)
        strange += tl.sum(tl.where(fits, 0, 1), axis=0)
        factor = _fixed(tl.where(fits, factor, 0.0))
        offsets += tl.sum(_fixed(tl.where(fits, offset, 0.0)), axis=0)
        t0 += _times(words, factor, 0)
        t1 += _times(words, factor, 8)
        t2 += _times(words, factor, 16)
        t3 += _times(words, factor, 24)
        t4 += _times(words, factor, 4)
        t5 += _times(words, factor, 12)
        t6 += _times(words, factor, 20)
        t7 += _times(words, factor, 28)
    out += (token * n_routed + routed) * (GROUPS * WORDS4 * 8)
    add = offsets[:, None]
    whole = (strange == 0)[:, None]
    tl.store(out + word * 8, tl.where(whole, t0 + add, NO_NUMBER))
    tl.store(out + word * 8 + 1, tl.where(whole, t1 + add, NO_NUMBER))
    tl.store(out + word * 8 + 2, tl.where(whole, t2 + add, NO_NUMBER))
    tl.store(out + word * 8 + 3, tl.where(whole, t3 + add, NO_NUMBER))
    tl.store(out + word * 8 + 4, tl.where(whole, t4 + add, NO_NUMBER))
    tl.store(out + word * 8 + 5, tl.where(whole, t5 + add, NO_NUMBER))
    tl.store(out + word * 8 + 6, tl.where(whole, t6 + add, NO_NUMBER))
    tl.store(out + word * 8 + 7, tl.where(whole, t7 + add, NO_NUMBER))


def whole_sums(x: FixedPoint, blobs: Tensor, place: Tensor, layout: Layout, gate: Gate,
               bias: NeuronBias | None = None) -> Tensor:
    """As kernels.dense.whole_sums."""
    assert blobs.shape[1] >= layout.blob_bytes, (blobs.shape, layout.blob_bytes)
    return _launch(x, blobs, place, (blobs, place, place, place), place.shape[1] * layout.neurons, place, layout, gate,
                   bias, DENSE=True)


def chosen_sums(x: FixedPoint, sketches: Tensor, place: Tensor, records: Tensor, record_place: Tensor, neurons: Tensor,
                fidelity: Tensor, layout: Layout, gate: Gate, bias: NeuronBias | None = None) -> Tensor:
    """As kernels.apply.chosen_sums."""
    assert neurons.dtype == record_place.dtype == torch.int32 and fidelity.dtype == torch.int8
    assert all(table.is_contiguous() for table in (record_place, neurons, fidelity))
    n_tokens, n_routed = place.shape
    ends = torch.arange(n_routed + 1, dtype=torch.int32, device=neurons.device) * layout.neurons
    listed = torch.where(neurons < 0, n_routed * layout.neurons, neurons)
    starts = torch.searchsorted(listed, ends.expand(n_tokens, -1).contiguous(), out_int32=True)
    return _launch(x, sketches, place, (records, record_place, neurons, fidelity), neurons.shape[1], starts, layout,
                   gate, bias, DENSE=False)


def _launch(x: FixedPoint, sketches: Tensor, place: Tensor, chosen: tuple[Tensor, ...], n_ranks: int, starts: Tensor,
            layout: Layout, gate: Gate, bias: NeuronBias | None, DENSE: bool) -> Tensor:
    assert gate.kind in dense.STRICT and place.is_contiguous(), gate.kind
    (n_tokens, n_routed), device = place.shape, sketches.device
    (records, record_place, neurons, fidelity), words = chosen, words_of(sketches)
    record_words = words_of(records)
    products = torch.empty(n_tokens, n_ranks, dtype=torch.float32, device=device)
    out = torch.empty(n_tokens, n_routed, layout.padded, dtype=torch.int64, device=device)
    sizes = {"n_ranks": n_ranks, "n_routed": n_routed, "blob16": sketches.stride(0) // 16,
             "record16": records.stride(0) // 16, "NEURONS": layout.neurons, "RECORD": layout.record // 4,
             "RECORDS_AT": layout.sketch_bytes // 4, "GROUPS": layout.groups,
             "RECORD_SCALES_AT": layout.record_scales_at // 4, "DENSE": DENSE, "enable_fp_fusion": False}
    _strict_products[(triton.cdiv(max(1, n_ranks), product.PRODUCT_ROWS), n_tokens)](
        x.high.view(torch.int32), x.low.view(torch.int32), x.scale, x.sums, words, place, record_words, record_place,
        neurons, fidelity, *bias_tables(bias, place.shape, layout.neurons, products), products,
        alpha=float(gate.alpha), limit=float(gate.limit), ROW=layout.sketch_row // 4, PLANE=layout.plane2 // 4,
        WORDS=layout.group // 16, SCALES_AT=layout.sketch_scales_at // 4, REFINE_AT=layout.refine_at // 4,
        KIND=kind_of(gate), BIASED=bias is not None, ROWS=product.PRODUCT_ROWS, num_warps=4, **sizes)
    _down_sums[(layout.padded // product.DOWN_CODES, n_routed, n_tokens)](
        products, words, place, record_words, record_place, starts, out, WORDS4=layout.group // 8,
        STEP=product.DOWN_CODES // layout.group, ROWS=product.DOWN_ROWS, num_warps=8, **sizes)
    return out
