"""Device version of kernels/apply.py and kernels/dense.py: two launches, the second in neuron order.

First one number per chosen neuron, gate(g, u), from its sketch row and refinement with the activation in 16-bit fixed
point; then the down rows, weighted by those numbers, summed per expert. Neither depends on where a record lies, and the
second one's partition depends only on the list of neurons, so hits and misses give the same bits. Long lists are split
over several blocks; of all blocks of the same columns the last to finish adds their sums, in order, together with all
that follows (`_weighed`, kernels/weigh.py). A mixture of chosen neurons is weighed by the first launch, and the second
divides the list by ranks, whosever they are: the budget is the layer's, and one expert may have most of it.

Legend: T tokens, k routed experts, I neurons, H padded hidden, N ranks in the list of neurons, G groups along H.
Byte counts of kernels/layout.py are words (int32) here.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import select
from kernels.activation import FixedPoint, Gate, NeuronBias
from kernels.gpu.activation import fixed_point
from kernels.gpu.gate import bias_tables, biased, check_gate, gated, kind_of
from kernels.gpu.planes import add_splits, dot2, groups_at_once, scale_offset, words_of, x_words
from kernels.gpu.trunk.last import counters, is_last
from kernels.layout import Layout
from kernels.weigh import Mixture

Tensor = torch.Tensor

PRODUCT_ROWS = 8         # neurons of a block of four warps
DOWN_ROWS = 32           # neurons a block of eight warps adds at a time
DOWN_CODES = 256         # elements of H of such a block
RANKS_OF_BLOCK = 256     # longer lists are split

DOWN_ONLY = tl.constexpr(select.DOWN_ONLY)
REFINED = tl.constexpr(select.REFINED)


@triton.jit
def _locate(index, rank, token, sketches, place, records, record_place, n_ranks, n_routed, sketch16, record16,
            NEURONS: tl.constexpr, ROW: tl.constexpr, RECORD: tl.constexpr, RECORDS_AT: tl.constexpr,
            DENSE: tl.constexpr):
    """Addresses of the sketch row and of the record of neurons `index` [R], which stand at `rank` in the list."""
    valid = index >= 0
    neuron = tl.where(valid, index % NEURONS, 0)
    slot = tl.load(place + token * n_routed + index // NEURONS, mask=valid, other=0).to(tl.int64)
    blob = sketches + slot * sketch16 * 4
    if DENSE:
        return blob + neuron * ROW, blob + (RECORDS_AT + neuron * RECORD)
    at = tl.load(record_place + token * n_ranks + rank, mask=valid, other=0).to(tl.int64)
    return blob + neuron * ROW, records + at * record16 * 4


@triton.jit
def _dot16(words, h0, h1, h2, h3, l0, l1, l2, l3):
    """Words of 2-bit codes [R, G, P] times 16-bit activations -> int32 [R, G]; below 2**24 for a group of 128."""
    return dot2(words, h0, h1, h2, h3) * 256 + dot2(words, l0, l1, l2, l3)


@triton.jit
def _gate_and_up(row, record, fidelity, valid, high, low, x_scale, x_sum, PLANE: tl.constexpr, GROUPS: tl.constexpr,
                 WORDS: tl.constexpr, STEP: tl.constexpr, SCALES_AT: tl.constexpr, RECORD_SCALES_AT: tl.constexpr,
                 REFINE_AT: tl.constexpr, ROWS: tl.constexpr):
    """Both products of neurons at their fidelity -> float32 [R] twice. Code = 4 * sketch + refinement, or sketch."""
    fine_gate = valid & (fidelity != DOWN_ONLY)
    fine_up = valid & (fidelity == REFINED)
    gate_pairs = tl.where(fine_gate, record + (RECORD_SCALES_AT + GROUPS), row + SCALES_AT)
    up_pairs = tl.where(fine_up, record + (RECORD_SCALES_AT + 2 * GROUPS), row + (SCALES_AT + GROUPS))
    gate_weight = tl.where(fine_gate, 4, 1)[:, None]
    up_weight = tl.where(fine_up, 4, 1)[:, None]
    gate = tl.zeros((ROWS, STEP), tl.float32)
    up = tl.zeros((ROWS, STEP), tl.float32)
    known = valid[:, None, None]
    for first in tl.static_range(0, GROUPS, STEP):
        group = first + tl.arange(0, STEP)
        word = (group[:, None] * WORDS + tl.arange(0, WORDS)[None])[None]
        h0, h1, h2, h3 = x_words(high, 0, first, STEP, WORDS)
        l0, l1, l2, l3 = x_words(low, 0, first, STEP, WORDS)
        scale_x = tl.load(x_scale + group)[None]
        sum_x = tl.load(x_sum + group)[None]
        at = row[:, None, None] + word
        refine = record[:, None, None] + (REFINE_AT + word)
        coarse = _dot16(tl.load(at, mask=known, other=0), h0, h1, h2, h3, l0, l1, l2, l3)
        rest = _dot16(tl.load(refine, mask=fine_gate[:, None, None], other=0), h0, h1, h2, h3, l0, l1, l2, l3)
        scale, offset = scale_offset(tl.load(gate_pairs[:, None] + group[None], mask=valid[:, None], other=0))
        gate += scale * ((coarse * gate_weight + rest).to(tl.float32) * scale_x) + offset * sum_x
        coarse = _dot16(tl.load(at + PLANE, mask=known, other=0), h0, h1, h2, h3, l0, l1, l2, l3)
        rest = _dot16(tl.load(refine + PLANE, mask=fine_up[:, None, None], other=0), h0, h1, h2, h3, l0, l1, l2, l3)
        scale, offset = scale_offset(tl.load(up_pairs[:, None] + group[None], mask=valid[:, None], other=0))
        up += scale * ((coarse * up_weight + rest).to(tl.float32) * scale_x) + offset * sum_x
    return tl.sum(gate, axis=1), tl.sum(up, axis=1)


@triton.jit
def _listed(neurons, fidelity, token, rank, n_ranks, DENSE: tl.constexpr):
    """-> neurons and fidelity at the ranks of a token's list; -1 and 0 behind its end. DENSE: every neuron, refined."""
    there = rank < n_ranks
    if DENSE:
        return tl.where(there, rank, -1), tl.full(rank.shape, REFINED, tl.int32)
    at = token * n_ranks + rank
    return tl.load(neurons + at, mask=there, other=-1), tl.load(fidelity + at, mask=there, other=0).to(tl.int32)


@triton.jit
def _products(high, low, x_scale, x_sum, sketches, place, records, record_place, neurons, fidelity, gate_bias, up_bias,
              bias_ids, weights, products, starts, n_ranks, n_routed, sketch16, record16, alpha, limit,
              NEURONS: tl.constexpr, ROW: tl.constexpr, RECORD: tl.constexpr, RECORDS_AT: tl.constexpr,
              PLANE: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, STEP: tl.constexpr,
              SCALES_AT: tl.constexpr, RECORD_SCALES_AT: tl.constexpr, REFINE_AT: tl.constexpr, KIND: tl.constexpr,
              BIASED: tl.constexpr, DENSE: tl.constexpr, WEIGHED: tl.constexpr, ROWS: tl.constexpr):
    """Grid: blocks of ranks (one more than there are), T. -> products [T, N]; starts [T, k+1]: first rank of each.
    WEIGHED: times the router's weights [T, k]."""
    token = tl.program_id(1)
    rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rank < n_ranks
    index, kind = _listed(neurons, fidelity, token, rank, n_ranks, DENSE)
    if not DENSE:
        before = tl.load(neurons + token * n_ranks + rank - 1, mask=there & (rank > 0), other=-1)
        last = tl.load(neurons + token * n_ranks + rank - 1, mask=(rank == n_ranks) & (rank > 0), other=-1)
        before = tl.where(rank == n_ranks, last, before)
        expert = tl.where(index >= 0, index // NEURONS, n_routed)
        previous = tl.where(rank == 0, -1, tl.where(before >= 0, before // NEURONS, n_routed))
        for e in range(n_routed + 1):
            first = (previous < e) & (e <= expert) & (rank <= n_ranks)
            tl.store(starts + token * (n_routed + 1) + e + tl.zeros_like(rank), rank, mask=first)
    row, record = _locate(index, rank, token, sketches, place, records, record_place, n_ranks, n_routed, sketch16,
                          record16, NEURONS, ROW, RECORD, RECORDS_AT, DENSE)
    valid = index >= 0
    gate, up = _gate_and_up(row, record, kind, valid, high + token * (4 * PLANE), low + token * (4 * PLANE),
                            x_scale + token * GROUPS, x_sum + token * GROUPS, PLANE, GROUPS, WORDS, STEP, SCALES_AT,
                            RECORD_SCALES_AT, REFINE_AT, ROWS)
    if BIASED:
        gate, up = biased(gate, up, gate_bias, up_bias, bias_ids + token * n_routed, index, valid, NEURONS)
    product = gated(gate, up, alpha, limit, KIND)
    if WEIGHED:
        product *= tl.load(weights + token * n_routed + index // NEURONS, mask=valid, other=0)
    tl.store(products + token * n_ranks + rank, product, mask=there)


@triton.jit
def _nibble(words, SHIFT: tl.constexpr):
    """Four-bit codes as float32, without the conversion unit, which these cards have at a quarter of the rate."""
    return (((words >> SHIFT) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0     # 2**23 + code - 2**23


@triton.jit
def _summed(parts, first, at, there, padded, SPLITS: tl.constexpr):
    """Columns `at` of SPLITS parts, in order, which other blocks of this launch wrote."""
    total = tl.zeros(at.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (first + split) * padded + at, mask=there, other=0, cache_modifier=".cg")
    return total


@triton.jit
def _weighed(parts, weights, residual, bias, ids, out, token, at, n_routed, padded, hidden, SPLITS: tl.constexpr,
             BY_RANK: tl.constexpr, ADDED: tl.constexpr, BIASED: tl.constexpr):
    """Columns `at` of one token. parts [T, k, SPLITS, padded], or BY_RANK, weighed already, [T, SPLITS, padded]."""
    there = at < hidden
    total = tl.zeros(at.shape, tl.float32)
    if BY_RANK:
        total = _summed(parts, token * SPLITS, at, there, padded, SPLITS)
    if BIASED or not BY_RANK:
        for routed in range(n_routed):
            pick = token * n_routed + routed
            summed = tl.zeros(at.shape, tl.float32)
            if not BY_RANK:
                summed = _summed(parts, pick * SPLITS, at, there, padded, SPLITS)
            if BIASED:
                summed += tl.load(bias + tl.load(ids + pick) * hidden + at, mask=there, other=0)
            total += tl.load(weights + pick) * summed
    if ADDED:
        total = tl.load(residual + token * hidden + at, mask=there, other=0) + total
    tl.store(out + token * hidden + at, total, mask=there)


@triton.jit
def _down(products, starts, sketches, place, records, record_place, out, counter, weights, residual, bias, ids, mixed,
          n_ranks, n_routed, sketch16, record16, hidden,
          NEURONS: tl.constexpr, ROW: tl.constexpr, RECORD: tl.constexpr, RECORDS_AT: tl.constexpr,
          GROUPS: tl.constexpr, WORDS4: tl.constexpr, STEP: tl.constexpr, RECORD_SCALES_AT: tl.constexpr,
          SPLITS: tl.constexpr, BY_RANK: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr, MIXED: tl.constexpr,
          ADDED: tl.constexpr, BIASED_DOWN: tl.constexpr):
    """Grid: blocks of H, k*SPLITS, T. out float32 [T, k, SPLITS, H]; BY_RANK SPLITS alone, of all experts. WORDS4:
    words of 4-bit codes of a group. MIXED: mixed float32 [T, hidden] as well, by the last block of each of H."""
    token = tl.program_id(2)
    routed = tl.program_id(1) // SPLITS
    if DENSE:
        low = routed * NEURONS
        high = low + NEURONS
    elif BY_RANK:
        low = 0
        high = tl.load(starts + token * (n_routed + 1) + n_routed)
    else:
        low = tl.load(starts + token * (n_routed + 1) + routed)
        high = tl.load(starts + token * (n_routed + 1) + routed + 1)
    share = tl.cdiv(tl.cdiv(high - low, SPLITS), ROWS) * ROWS
    begin = low + tl.program_id(1) % SPLITS * share
    end = tl.minimum(begin + share, high)
    group = tl.program_id(0) * STEP + tl.arange(0, STEP)
    word = group[:, None] * WORDS4 + tl.arange(0, WORDS4)[None]
    # One accumulator for each of the eight codes of a word: a lane then adds what it loaded, without any exchange.
    t0 = tl.zeros((ROWS, STEP, WORDS4), tl.float32)
    t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
    offsets = tl.zeros((ROWS, STEP), tl.float32)
    # Where the next rows lie is asked for beside these rows, so that only one trip to memory waits for another.
    lane, ranks = tl.arange(0, ROWS), token * n_ranks
    at, weight = lane, tl.zeros((ROWS,), tl.float32)
    if not DENSE:
        at = tl.load(record_place + ranks + begin + lane, mask=begin + lane < end, other=0)
        weight = tl.load(products + ranks + begin + lane, mask=begin + lane < end, other=0)
    for start in range(begin, end, ROWS):
        rank = start + lane
        valid = rank < end
        after = rank + ROWS
        at_next, weight_next = at, weight
        if DENSE:
            weight = tl.load(products + ranks + rank, mask=valid, other=0)
            _, record = _locate(tl.where(valid, rank, -1), rank, token, sketches, place, records, record_place, n_ranks,
                                n_routed, sketch16, record16, NEURONS, ROW, RECORD, RECORDS_AT, True)
        else:
            record = records + at.to(tl.int64) * record16 * 4
            at_next = tl.load(record_place + ranks + after, mask=after < end, other=0)
            weight_next = tl.load(products + ranks + after, mask=after < end, other=0)
        words = tl.load(record[:, None, None] + word[None], mask=valid[:, None, None], other=0)
        pairs = tl.load(record[:, None] + (RECORD_SCALES_AT + group[None]), mask=valid[:, None], other=0)
        scale, offset = scale_offset(pairs)
        factor = (weight[:, None] * scale)[:, :, None]
        offsets += weight[:, None] * offset
        t0 += factor * _nibble(words, 0)
        t1 += factor * _nibble(words, 8)
        t2 += factor * _nibble(words, 16)
        t3 += factor * _nibble(words, 24)
        t4 += factor * _nibble(words, 4)
        t5 += factor * _nibble(words, 12)
        t6 += factor * _nibble(words, 20)
        t7 += factor * _nibble(words, 28)
        at = at_next
        weight = weight_next
    constant = tl.sum(offsets, axis=0)[:, None]
    parts = out
    out += (token * tl.num_programs(1) + tl.program_id(1)) * (GROUPS * WORDS4 * 8)
    tl.store(out + word * 8, tl.sum(t0, axis=0) + constant)
    tl.store(out + word * 8 + 1, tl.sum(t1, axis=0) + constant)
    tl.store(out + word * 8 + 2, tl.sum(t2, axis=0) + constant)
    tl.store(out + word * 8 + 3, tl.sum(t3, axis=0) + constant)
    tl.store(out + word * 8 + 4, tl.sum(t4, axis=0) + constant)
    tl.store(out + word * 8 + 5, tl.sum(t5, axis=0) + constant)
    tl.store(out + word * 8 + 6, tl.sum(t6, axis=0) + constant)
    tl.store(out + word * 8 + 7, tl.sum(t7, axis=0) + constant)
    if MIXED:
        if is_last(counter + token * tl.num_programs(0) + tl.program_id(0), tl.num_programs(1)):
            columns: tl.constexpr = STEP * WORDS4 * 8
            _weighed(parts, weights, residual, bias, ids, mixed, token, tl.program_id(0) * columns +
                    tl.arange(0, columns), n_routed, GROUPS * WORDS4 * 8, hidden, SPLITS, BY_RANK, ADDED, BIASED_DOWN)


def apply(x: Tensor, sketches: Tensor, place: Tensor, records: Tensor, record_place: Tensor, neurons: Tensor,
          fidelity: Tensor, layout: Layout, gate: Gate, bias: NeuronBias | None = None,
          mixture: Mixture | None = None, fixed: FixedPoint | None = None) -> Tensor:
    """As kernels.apply.apply."""
    assert neurons.dtype == record_place.dtype == torch.int32 and fidelity.dtype == torch.int8
    for table in (record_place, neurons, fidelity):
        assert table.is_contiguous() and table.shape == neurons.shape
    assert records.dim() == 2 and records.shape[1] >= layout.record
    return _launch(x, sketches, place, (records, record_place, neurons, fidelity), neurons.shape[1], layout, gate, bias,
                   mixture, fixed)


def dense(x: Tensor, blobs: Tensor, place: Tensor, layout: Layout, gate: Gate, bias: NeuronBias | None = None,
          mixture: Mixture | None = None) -> Tensor:
    """As kernels.dense.dense."""
    assert blobs.shape[1] >= layout.blob_bytes, (blobs.shape, layout.blob_bytes)
    return _launch(x, blobs, place, None, place.shape[1] * layout.neurons, layout, gate, bias, mixture)


def _launch(x: Tensor, sketches: Tensor, place: Tensor, sparse: tuple[Tensor, ...] | None, n_ranks: int,
            layout: Layout, gate: Gate, bias: NeuronBias | None, mixture: Mixture | None,
            fixed: FixedPoint | None = None) -> Tensor:
    check_gate(gate)
    n_tokens, n_routed = place.shape
    assert len(x) == n_tokens and x.shape[1] in (layout.hidden, layout.padded), (x.shape, layout)
    assert x.dtype == torch.float32, x.dtype
    assert place.dtype in (torch.int32, torch.int64) and place.is_contiguous() and sketches.dim() == 2
    products = torch.empty(n_tokens, n_ranks, dtype=torch.float32, device=x.device)
    starts = torch.empty(n_tokens, n_routed + 1, dtype=torch.int32, device=x.device)
    records, record_place, neurons, fidelity = sparse or (sketches, place, place, place)
    blob_words, record_words = words_of(sketches), words_of(records)
    sizes = {"n_ranks": n_ranks, "n_routed": n_routed, "sketch16": sketches.stride(0) // 16,
             "record16": records.stride(0) // 16, "NEURONS": layout.neurons, "ROW": layout.sketch_row // 4,
             "RECORD": layout.record // 4, "RECORDS_AT": layout.sketch_bytes // 4, "GROUPS": layout.groups,
             "RECORD_SCALES_AT": layout.record_scales_at // 4, "DENSE": sparse is None}
    by_rank = sparse is not None and mixture is not None
    fixed = fixed or fixed_point(x, layout.group, layout.padded)
    _products[(triton.cdiv(n_ranks + 1, PRODUCT_ROWS), n_tokens)](
        fixed.high.view(torch.int32), fixed.low.view(torch.int32), fixed.scale, fixed.sums, blob_words, place,
        record_words, record_place, neurons, fidelity, *bias_tables(bias, place.shape, layout.neurons, products),
        products if mixture is None else mixture.weights, products, starts, alpha=float(gate.alpha),
        limit=float(gate.limit),
        PLANE=layout.plane2 // 4, WORDS=layout.group // 16, STEP=groups_at_once(layout.groups, 2048 // layout.group),
        SCALES_AT=layout.sketch_scales_at // 4, REFINE_AT=layout.refine_at // 4, KIND=kind_of(gate),
        BIASED=bias is not None, WEIGHED=by_rank, ROWS=PRODUCT_ROWS, num_warps=4, **sizes)
    parts = 1 if by_rank else n_routed
    splits = min(16, triton.next_power_of_2(max(1, triton.cdiv(n_ranks, parts * RANKS_OF_BLOCK))))
    partial = torch.empty(n_tokens, parts, splits, layout.padded, dtype=torch.float32, device=x.device)
    tables, mixes = _mixing(mixture, n_tokens, n_routed, partial)
    _down[(layout.padded // DOWN_CODES, parts * splits, n_tokens)](
        products, starts, blob_words, place, record_words, record_place, partial, counters(x.device), *tables,
        WORDS4=layout.group // 8, STEP=DOWN_CODES // layout.group, SPLITS=splits, BY_RANK=by_rank, ROWS=DOWN_ROWS,
        num_warps=8, **sizes, **mixes)
    if mixture is not None:
        return tables[-1]
    if splits == 1:
        return partial[:, :, 0]
    out = torch.empty(n_tokens, n_routed, layout.padded, dtype=torch.float32, device=x.device)
    add_splits(partial, out)
    return out


def _mixing(mixture: Mixture | None, n_tokens: int, n_routed: int, none: Tensor,
            ) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    """What `_weighed` reads and, last, what it writes, float32 [T, hidden]; its constants. none: for what there is not.
    """
    if mixture is None:
        return (none,) * 5, {"hidden": 0, "MIXED": False, "ADDED": False, "BIASED_DOWN": False}
    weights, hidden, residual, bias, ids = mixture
    assert weights.is_contiguous() and weights.shape == (n_tokens, n_routed), (weights.shape, n_tokens, n_routed)
    assert residual is None or residual.is_contiguous() and residual.shape == (n_tokens, hidden), residual.shape
    assert residual is None or residual.dtype == torch.float32
    assert bias is None or bias.is_contiguous() and bias.shape[1] == hidden and ids.is_contiguous(), bias.shape
    out = torch.empty(n_tokens, hidden, dtype=torch.float32, device=weights.device)
    tables = (none if table is None else table for table in (weights, residual, bias, ids))
    return (*tables, out), {"hidden": hidden, "MIXED": True, "ADDED": residual is not None,
                            "BIASED_DOWN": bias is not None}
