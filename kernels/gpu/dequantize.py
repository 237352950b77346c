"""Device version of `dequantize` (kernels/dense.py): one block a neuron and stretch of hidden, one element a thread.

Plain shifts instead of four codes at once: what waits in prefill is the link, and of 33 billion weights on a card of 28
multiprocessors this is some 50 ms (ten instructions a weight, computed) beside the 700 ms that they take to arrive.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.planes import scale_offset, words_of
from kernels.layout import Layout

Tensor = torch.Tensor

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
