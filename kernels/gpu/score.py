"""Device version of kernels/score.py: the sketch rows of all routed experts against the int8 activation, four codes a
multiplication, and on the way out a histogram of the scores that spares `select` half of its work.

A block takes 32 neurons of one routed expert. Legend as in kernels/score.py; words are int32.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import Gate, NeuronBias
from kernels.gpu.gate import bias_tables, check_gate, gated, kind_of
from kernels.gpu.planes import dot2, groups_at_once, scale_offset, sum_x, words_of, x_words
from kernels.layout import Layout
from kernels.select import BINS, KEY_SHIFT

Tensor = torch.Tensor

ROWS, WARPS = 32, 8     # neurons and warps of a block: four warps take 128 registers a lane and more, eight 48
BIN_SHIFT = tl.constexpr(KEY_SHIFT + 12)


@triton.jit
def _products(row, rows_valid, x, scales, PLANE: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
              STEP: tl.constexpr, SCALES_AT: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr):
    """Sketch rows (int32 pointers [R]) times one token -> gate, up float32 [R]; only up when UP."""
    gate = tl.zeros((ROWS, STEP), tl.float32)
    up = tl.zeros((ROWS, STEP), tl.float32)
    valid = rows_valid[:, None]
    for first in tl.static_range(0, GROUPS, STEP):
        group = first + tl.arange(0, STEP)
        word = group[:, None] * WORDS + tl.arange(0, WORDS)[None]
        s0, s1, s2, s3 = x_words(x, 0, first, STEP, WORDS)
        x_scale = tl.load(scales + group)
        x_sum = sum_x(s0, s1, s2, s3).to(tl.float32) * x_scale
        at = row[:, None, None] + word[None]
        pair_at = row[:, None] + (SCALES_AT + group[None])
        codes = tl.load(at + PLANE, mask=valid[:, :, None], other=0)
        scale, offset = scale_offset(tl.load(pair_at + GROUPS, mask=valid, other=0))
        up += scale * (dot2(codes, s0, s1, s2, s3).to(tl.float32) * x_scale[None]) + offset * x_sum[None]
        if not UP:
            codes = tl.load(at, mask=valid[:, :, None], other=0)
            scale, offset = scale_offset(tl.load(pair_at, mask=valid, other=0))
            gate += scale * (dot2(codes, s0, s1, s2, s3).to(tl.float32) * x_scale[None]) + offset * x_sum[None]
    return tl.sum(gate, axis=1), tl.sum(up, axis=1)


@triton.jit
def _score(x, scales, sketches, place, weight, gate_bias, up_bias, bias_ids, scores, histogram, n_routed, sketch16,
           alpha, limit, NEURONS: tl.constexpr, PLANE: tl.constexpr, ROW: tl.constexpr, GROUPS: tl.constexpr,
           WORDS: tl.constexpr, STEP: tl.constexpr, SCALES_AT: tl.constexpr, KIND: tl.constexpr, BIASED: tl.constexpr,
           UP: tl.constexpr, COUNTED: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    """Grid: blocks of neurons, T*k. x int32 [T, 4*PLANE]; PLANE, ROW, SCALES_AT in words; sketch16 in 16 bytes."""
    routed = tl.program_id(1)
    token = routed // n_routed
    neuron = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = neuron < NEURONS
    slot = tl.load(place + routed).to(tl.int64)
    row = sketches + slot * sketch16 * 4 + neuron * ROW
    gate, up = _products(row, valid, x + token * (4 * PLANE), scales + token * GROUPS, PLANE, GROUPS, WORDS, STEP,
                         SCALES_AT, UP, ROWS)
    if BIASED:
        of_expert = tl.load(bias_ids + routed) * NEURONS + neuron
        up += tl.load(up_bias + of_expert, mask=valid, other=0)
        if not UP:
            gate += tl.load(gate_bias + of_expert, mask=valid, other=0)
    if UP:
        value = tl.abs(up)
    else:
        value = tl.abs(gated(gate, up, alpha, limit, KIND) * tl.load(weight + routed))
    tl.store(scores + routed * NEURONS + neuron, value, mask=valid)
    if COUNTED:
        tl.atomic_add(histogram + token * BINS + (value.to(tl.int32, bitcast=True) >> BIN_SHIFT), 1, mask=valid,
                      sem="relaxed")


def score(codes: Tensor, scales: Tensor, sketches: Tensor, place: Tensor, weight: Tensor, layout: Layout, gate: Gate,
          bias: NeuronBias | None = None, histogram: Tensor | None = None) -> Tensor:
    """As kernels.score.score."""
    assert weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape == place.shape
    check_gate(gate)
    return _launch(codes, scales, sketches, place, weight, layout, gate, bias, histogram, False)


def score_up(codes: Tensor, scales: Tensor, sketches: Tensor, place: Tensor, layout: Layout,
             bias: NeuronBias | None = None) -> Tensor:
    """As kernels.score.score_up."""
    return _launch(codes, scales, sketches, place, scales, layout, Gate(), bias, None, True)


def _launch(codes: Tensor, scales: Tensor, sketches: Tensor, place: Tensor, weight: Tensor, layout: Layout, gate: Gate,
            bias: NeuronBias | None, histogram: Tensor | None, up_only: bool) -> Tensor:
    n_tokens, n_routed = place.shape
    assert codes.dtype == torch.int8 and codes.shape == (n_tokens, layout.padded) and codes.is_contiguous()
    assert scales.dtype == torch.float32 and scales.shape == (n_tokens, layout.groups) and scales.is_contiguous()
    assert place.dtype in (torch.int32, torch.int64) and place.is_contiguous() and sketches.dim() == 2
    assert histogram is None or (histogram.dtype == torch.int32 and histogram.shape == (n_tokens, BINS))
    scores = torch.empty(n_tokens, n_routed * layout.neurons, dtype=torch.float32, device=codes.device)
    _score[(triton.cdiv(layout.neurons, ROWS), n_tokens * n_routed)](
        codes.view(torch.int32), scales, words_of(sketches), place, weight,
        *bias_tables(bias, place.shape, layout.neurons, scores), scores, place if histogram is None else histogram,
        n_routed, sketches.stride(0) // 16, float(gate.alpha), float(gate.limit),
        NEURONS=layout.neurons, PLANE=layout.plane2 // 4, ROW=layout.sketch_row // 4, GROUPS=layout.groups,
        WORDS=layout.group // 16, STEP=groups_at_once(layout.groups, 2048 // layout.group),
        SCALES_AT=layout.sketch_scales_at // 4, KIND=kind_of(gate), BIASED=bias is not None, UP=up_only,
        COUNTED=histogram is not None, BINS=BINS, ROWS=ROWS, num_warps=WARPS)
    return scores
