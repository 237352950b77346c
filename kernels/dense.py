"""Level `exact`, and prefill: every neuron of the routed experts at 4 bits, from whole blobs. No scoring, no selection.

`whole_sums` is the same product in an arithmetic that has one answer: a card and a processor may each compute some of a
layer's experts, and nobody sees in the text which. Codes meet the activation as integers; scales come in the order of
the groups, every operation rounded by itself, the exponential from a polynomial of its own; what is added over neurons
are integers again, whose order does not matter.

Legend: T tokens, k routed experts, I neurons, H padded hidden, S slots of whole blobs; of prefill n experts of
a tile, or n picks: tokens, once for each expert that they go to; t picks of a tile.
"""
from __future__ import annotations

import torch

from kernels.activation import FixedPoint, Gate, NeuronBias, widened
from kernels.dispatch import twin
from kernels.layout import Layout
from kernels.planes import codes_of, decode_down, decode_gate, decode_up
from kernels.weigh import Mixture, weigh

Tensor = torch.Tensor


@twin("kernels.gpu.apply", "kernels.cpu.apply")
def dense(x: Tensor, blobs: Tensor, place: Tensor, layout: Layout, gate: Gate, bias: NeuronBias | None = None,
          mixture: Mixture | None = None) -> Tensor:
    """-> per-expert sums float32 [T, k, H], before the router's weight and the bias of down; or what `mixture` makes
    of them, [T, hidden].

    x float32 [T, H], or without its padding; blobs uint8 [S, blob_bytes], place int32 [T, k]; bias: its ids [T, k], the
    routed experts.
    """
    x = widened(x, layout.padded)
    out = torch.empty(*place.shape, layout.padded, dtype=torch.float32, device=x.device)
    for slot in place.unique().tolist():
        gate_rows, up_rows, down = decode_blob(blobs[slot], layout)
        for i, j in (place == slot).nonzero().tolist():
            g, u = gate_rows @ x[i], up_rows @ x[i]
            if bias is not None:
                g, u = (product + own[i, j] for product, own in zip((g, u), bias.rows, strict=True))
            out[i, j] = gate(g, u) @ down
    return out if mixture is None else weigh(out, mixture)


SHIFT = 32              # of `whole_sums`: bits behind the point
MOST = 4096.0           # and the largest product of a neuron and a scale that it can add
NO_NUMBER = -2**63      # where something was larger, or not finite
STRICT = ("silu", "gelu_tanh", "relu", "clamped_swiglu")    # gates that need no function but a sigmoid
LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
EXPONENTIAL = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)  # of r, to 2e-7 for |r| up to ln 2 / 2


@twin("kernels.gpu.whole_sums", "kernels.cpu.whole_sums")
def whole_sums(x: FixedPoint, blobs: Tensor, place: Tensor, layout: Layout, gate: Gate,
               bias: NeuronBias | None = None) -> Tensor:
    """As `dense`, of one of STRICT -> per-expert sums int64 [T, k, H] in 2**-SHIFTths, whose bits depend neither on who
    computes nor on what is computed beside. x: of `quantize`."""
    out = torch.zeros(*place.shape, layout.padded, dtype=torch.int64, device=blobs.device)
    every = torch.ones(layout.neurons, dtype=torch.bool, device=blobs.device)
    for i, j in torch.cartesian_prod(*map(torch.arange, place.shape)).view(-1, 2).tolist():
        biases = (None, None) if bias is None else (side[i, j] for side in bias.rows)
        rows = _rows(blobs[int(place[i, j])], layout)
        out[i, j] = strict_sum(FixedPoint(*(part[i] for part in x)), *rows, (every, every), layout, gate, *biases)
    return out


def strict_sum(x: FixedPoint, sketch: Tensor, records: Tensor, fine: tuple[Tensor, Tensor], layout: Layout, gate: Gate,
               gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    """What neurons of one expert, as of `codes_of`, add for one token -> int64 [H]; biases float32 [R] or None."""
    assert gate.kind in STRICT, gate.kind
    activation = (x.high.int() * 256 + x.low.int()).unflatten(0, (layout.groups, layout.group))
    *both, (down, pairs) = codes_of(sketch, records, fine, layout)
    g, u = (_in_order((codes * activation).sum(-1), own_pairs, x.scale, x.sums) for codes, own_pairs in both)
    if gate_bias is not None:
        g, u = g + gate_bias, u + up_bias
    product = strict_gate(gate, g, u)[:, None]
    factors, offsets = product * pairs[..., 0], product * pairs[..., 1]
    fits = ((factors.abs() <= MOST) & (offsets.abs() <= MOST)).all(0)
    total = (_fixed(factors)[..., None] * down).sum(0) + _fixed(offsets).sum(0)[:, None]
    return torch.where(fits[:, None], total, NO_NUMBER).flatten()


def together(sums: Tensor, others: Tensor) -> Tensor:
    """What two sides added of the same experts, int64."""
    return torch.where((sums == NO_NUMBER) | (others == NO_NUMBER), NO_NUMBER, sums + others)


def _in_order(dots: Tensor, pairs: Tensor, scale: Tensor, sums: Tensor) -> Tensor:
    """int32 [I, G] and float32 [I, G, 2], [G], [G] -> float32 [I], group after group."""
    total = torch.zeros(len(dots), dtype=torch.float32, device=dots.device)
    for group in range(dots.shape[1]):
        part = pairs[:, group, 0] * (dots[:, group].float() * scale[group])
        total = total + (part + pairs[:, group, 1] * sums[group])
    return total


def _fixed(values: Tensor) -> Tensor:
    return (values.nan_to_num(0, 0, 0).clamp(-MOST, MOST) * 2.0 ** SHIFT + 0.5).floor().long()


def strict_sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) in float32, one rounding an operation, none of which a compiler may join."""
    z = (-x).clamp(-87, 87)
    n = (z * LOG2E + 0.5).floor()
    r = (z - n * LN2_HIGH) - n * LN2_LOW
    total = torch.full_like(r, EXPONENTIAL[0])
    for coefficient in EXPONENTIAL[1:]:
        total = total * r + coefficient
    return 1 / (1 + total * ((n.nan_to_num(0).int() + 127) << 23).view(torch.float32))


def strict_gate(gate: Gate, g: Tensor, u: Tensor) -> Tensor:
    """As Gate, with `strict_sigmoid`."""
    if gate.kind == "silu":
        return g * strict_sigmoid(g) * u
    if gate.kind == "relu":
        return g.clamp(min=0) * u
    if gate.kind == "gelu_tanh":
        return g * strict_sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * u
    g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return (u + 1) * g * strict_sigmoid(g * gate.alpha)


def from_sums(sums: Tensor) -> Tensor:
    """int64 of `whole_sums` -> float32; NaN where there is no number."""
    return torch.where(sums == NO_NUMBER, torch.nan, (sums.double() * 2.0 ** -SHIFT).float())


@twin(None, "kernels.cpu.prefill.grouped")
def grouped(x: Tensor, blobs: list[Tensor], counts: list[int], layout: Layout, gate: Gate,
            bias: NeuronBias | None = None) -> Tensor:
    """Prefill on a processor: each expert over its own tokens, which follow one another -> its sums, float32 [n, H], as
    of `dense`.

    x float32 [n, H], or without its padding; blobs: an expert each, uint8 [blob_bytes]; counts: of its tokens; bias:
    its ids are the experts'.
    """
    out = []
    for i, (blob, rows) in enumerate(zip(blobs, widened(x, layout.padded).split(counts), strict=True)):
        gate_rows, up_rows, down = decode_blob(blob, layout)
        g, u = rows @ gate_rows.T, rows @ up_rows.T
        if bias is not None:
            g, u = (product + own[i] for product, own in zip((g, u), bias.rows, strict=True))
        out.append(gate(g, u) @ down)
    return torch.cat(out)


@twin("kernels.gpu.grouped")
def multiply_tile(x: Tensor, tokens: Tensor, ends: Tensor, blobs: Tensor, layout: Layout, gate: Gate,
                  bias: NeuronBias | None = None) -> Tensor:
    """Prefill on a card: each expert of a tile over its own picks -> [t, hidden] like x, before the bias of down.

    x float [T, hidden]; tokens integers [t], the token of each pick, one expert's behind another's; ends int32 [n],
    behind the picks of each expert; blobs uint8 [n, blob_bytes]; bias: its ids [n] are the experts'.
    """
    out, begin = torch.empty(len(tokens), layout.hidden, dtype=x.dtype, device=x.device), 0
    for at, end in enumerate(ends.tolist()):
        rows = x[tokens[begin:end].long()].float()
        gate_rows, up_rows, down = (matrix[:, :layout.hidden] for matrix in decode_blob(blobs[at], layout))
        g, u = rows @ gate_rows.T, rows @ up_rows.T
        if bias is not None:
            g, u = (product + own[at] for product, own in zip((g, u), bias.rows, strict=True))
        out[begin:end] = gate(g, u) @ down
        begin = end
    return out


@twin("kernels.gpu.grouped")
def dequantize(blobs: Tensor, gate_up: Tensor, down: Tensor, layout: Layout) -> None:
    """Into 16-bit matrices, for the matrix products of prefill: blobs uint8 [n, blob_bytes] -> gate_up [n, 2I, hidden]
    (rows of gate, then of up) and down [n, I, hidden], in their dtype and without the padding of hidden."""
    half = layout.neurons
    for blob, both, last in zip(blobs, gate_up, down, strict=True):
        for target, values in zip((both[:half], both[half:], last), decode_blob(blob, layout), strict=True):
            target.copy_(values[:, :layout.hidden])


def decode_blob(blob: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [blob_bytes] -> gate, up, down float32 [I, H] at 4 bits."""
    sketch, records = _rows(blob, layout)
    return decode_gate(sketch, records, layout), decode_up(sketch, records, layout), decode_down(records, layout)


def _rows(blob: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """uint8 [blob_bytes] -> sketch rows and records."""
    return (blob[:layout.neurons * layout.sketch_row].view(layout.neurons, layout.sketch_row),
            blob[layout.sketch_bytes:layout.blob_bytes].view(layout.neurons, layout.record))
