"""The sparse expert product: chosen neurons only, gate and up at the fidelity that was chosen, down at 4 bits.

Legend: T tokens, k routed experts, I neurons, H padded hidden, K chosen neurons, S sketch slots, R record slots.
Neurons come in ascending order and are summed in that order, so the result does not depend on the cache.
"""
from __future__ import annotations

import torch

from kernels.activation import FixedPoint, Gate, NeuronBias, widened
from kernels.dense import strict_sum
from kernels.dispatch import twin
from kernels.layout import Layout
from kernels.planes import decode_down, decode_gate, decode_sketch, decode_up
from kernels.select import DOWN_ONLY, REFINED
from kernels.weigh import Mixture, weigh

Tensor = torch.Tensor


def neuron_products(x: Tensor, sketch: Tensor, records: Tensor, fidelity: Tensor, layout: Layout, gate: Gate,
                    gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    """gate(g, u) of the chosen neurons of one token -> float32 [K].

    x float32 [H]; sketch uint8 [K, sketch_row], records uint8 [K, record] of the neurons; fidelity int8 [K];
    biases float32 [K] or None. DOWN_ONLY takes both from the sketch, FLOE gate at 4 and up at 2 bits.
    """
    coarse_gate, coarse_up = decode_sketch(sketch, layout)
    g = torch.where(fidelity == DOWN_ONLY, coarse_gate @ x, decode_gate(sketch, records, layout) @ x)
    u = torch.where(fidelity == REFINED, decode_up(sketch, records, layout) @ x, coarse_up @ x)
    if gate_bias is not None:
        g, u = g + gate_bias, u + up_bias
    return gate(g, u)


@twin("kernels.gpu.apply", "kernels.cpu.apply")
def apply(x: Tensor, sketches: Tensor, place: Tensor, records: Tensor, record_place: Tensor, neurons: Tensor,
          fidelity: Tensor, layout: Layout, gate: Gate, bias: NeuronBias | None = None,
          mixture: Mixture | None = None, fixed: FixedPoint | None = None) -> Tensor:
    """-> per-expert sums float32 [T, k, H], before the router's weight and the bias of down; or what `mixture` makes
    of them, [T, hidden].

    x float32 [T, H], or without its padding; sketches uint8 [S, sketch_bytes], place int [T, k]; records uint8
    [R, record], record_place int [T, K]; neurons int32 [T, K] in 0..k*I-1, -1 pads; fidelity int8 [T, K]; bias: its ids
    [T, k], the routed experts; fixed: x as `quantize` gave it, which spares a device one launch.
    """
    x, (t, k) = widened(x, layout.padded), place.shape
    out = torch.zeros(t, k, layout.padded, dtype=torch.float32, device=x.device)
    rows = sketches[:, :layout.neurons * layout.sketch_row].unflatten(1, (layout.neurons, layout.sketch_row))
    for i in range(t):
        chosen = neurons[i] >= 0
        index = neurons[i][chosen].long()
        expert, neuron = index // layout.neurons, index % layout.neurons
        sketch = rows[place[i].long()[expert], neuron]
        record = records[record_place[i][chosen].long()]
        own = (None, None) if bias is None else (rows[i].flatten()[index] for rows in bias.rows)
        product = neuron_products(x[i], sketch, record, fidelity[i][chosen], layout, gate, *own)
        out[i].index_add_(0, expert, product[:, None] * decode_down(record, layout))
    return out if mixture is None else weigh(out, mixture)


@twin("kernels.gpu.whole_sums", "kernels.cpu.whole_sums")
def chosen_sums(x: FixedPoint, sketches: Tensor, place: Tensor, records: Tensor, record_place: Tensor, neurons: Tensor,
                fidelity: Tensor, layout: Layout, gate: Gate, bias: NeuronBias | None = None) -> Tensor:
    """As `apply`, in the arithmetic of kernels.dense.whole_sums -> per-expert sums int64 [T, k, H]: a card may compute
    some of the neurons and a processor the others. x: of `quantize`."""
    out = torch.zeros(*place.shape, layout.padded, dtype=torch.int64, device=sketches.device)
    rows = sketches[:, :layout.neurons * layout.sketch_row].unflatten(1, (layout.neurons, layout.sketch_row))
    for i, j in torch.cartesian_prod(*map(torch.arange, place.shape)).view(-1, 2).tolist():
        own = ((neurons[i] >= 0) & (neurons[i] // layout.neurons == j)).nonzero()[:, 0]
        neuron, kinds = (neurons[i, own] % layout.neurons).long(), fidelity[i, own]
        biases = (None, None) if bias is None else (side[i, j, neuron] for side in bias.rows)
        out[i, j] = strict_sum(FixedPoint(*(part[i] for part in x)), rows[int(place[i, j]), neuron],
                               records[record_place[i, own].long()], (kinds != DOWN_ONLY, kinds == REFINED), layout,
                               gate, *biases)
    return out
