"""Score every neuron of the routed experts by its sketch: |gate(g, u)| times the router's weight.

One score per neuron of every routed expert, so that one budget per layer can choose among all of them.
Legend: T tokens, k routed experts, I neurons, H padded hidden, S slots of the sketch pool.
"""
from __future__ import annotations

import torch

from kernels.activation import Gate, NeuronBias
from kernels.dispatch import twin
from kernels.layout import Layout
from kernels.planes import decode_sketch
from kernels.select import histogram_of

Tensor = torch.Tensor


def sketch_products(codes: Tensor, scales: Tensor, sketches: Tensor, place: Tensor, layout: Layout) -> tuple:
    """Dot products of the quantised activation with both sketch planes -> gate, up float32 [T, k, I].

    codes int8 [T, H], scales float32 [T, G]; sketches uint8 [S, sketch_bytes]; place int [T, k] slot of each expert.
    """
    x = (codes.unflatten(1, (layout.groups, layout.group)).float() * scales[..., None]).flatten(1)
    rows = sketches[place.flatten().long(), :layout.neurons * layout.sketch_row]
    gate, up = decode_sketch(rows.reshape(-1, layout.sketch_row), layout)
    shape = (*place.shape, layout.neurons, layout.padded)
    return (torch.einsum("tkih,th->tki", gate.view(shape), x), torch.einsum("tkih,th->tki", up.view(shape), x))


@twin("kernels.gpu.score", "kernels.cpu.score")
def score(codes: Tensor, scales: Tensor, sketches: Tensor, place: Tensor, weight: Tensor, layout: Layout,
          gate: Gate, bias: NeuronBias | None = None, histogram: Tensor | None = None) -> Tensor:
    """-> scores float32 [T, k*I], all >= 0, or NaN without a sign.

    weight float32 [T, k] router weights; bias: its ids [T, k], the routed experts.
    histogram int32 [T, BINS], zero before: receives the counts of the scores' upper 12 bits, for `select`.
    """
    g, u = sketch_products(codes, scales, sketches, place, layout)
    if bias is not None:
        g, u = (product + own for product, own in zip((g, u), bias.rows, strict=True))
    scores = (gate(g, u) * weight[..., None]).abs().flatten(1)
    if histogram is not None:
        histogram += histogram_of(scores)
    return scores


@twin("kernels.gpu.score", "kernels.cpu.score")
def score_up(codes: Tensor, scales: Tensor, sketches: Tensor, place: Tensor, layout: Layout,
             bias: NeuronBias | None = None) -> Tensor:
    """FloE's score, |u| alone, per expert and without the router's weight -> float32 [T, k*I]."""
    _, u = sketch_products(codes, scales, sketches, place, layout)
    return (u if bias is None else u + bias.rows[1]).abs().flatten(1)
