"""Level `exact`, and prefill: every neuron of the routed experts at 4 bits, from whole blobs. No scoring, no selection.

Legend: T tokens, k routed experts, I neurons, H padded hidden, S slots of whole blobs; of prefill n experts of
a tile, or n picks: tokens, once for each expert that they go to; t picks of a tile.
"""
from __future__ import annotations

import torch

from kernels.activation import Gate
from kernels.dispatch import twin
from kernels.layout import Layout
from kernels.planes import decode_down, decode_gate, decode_up
from kernels.weigh import Mixture, weigh

Tensor = torch.Tensor


@twin("kernels.gpu.apply", "kernels.cpu.apply")
def dense(x: Tensor, blobs: Tensor, place: Tensor, layout: Layout, gate: Gate, gate_bias: Tensor | None = None,
          up_bias: Tensor | None = None, mixture: Mixture | None = None) -> Tensor:
    """-> per-expert sums float32 [T, k, H], before the router's weight and the bias of down; or what `mixture` makes
    of them, [T, hidden].

    x float32 [T, H]; blobs uint8 [S, blob_bytes], place int32 [T, k]; gate_bias, up_bias float32 [T, k, I] or None.
    """
    out = torch.empty(*place.shape, layout.padded, dtype=torch.float32, device=x.device)
    for slot in place.unique().tolist():
        gate_rows, up_rows, down = decode_blob(blobs[slot], layout)
        for i, j in (place == slot).nonzero().tolist():
            g, u = gate_rows @ x[i], up_rows @ x[i]
            if gate_bias is not None:
                g, u = g + gate_bias[i, j], u + up_bias[i, j]
            out[i, j] = gate(g, u) @ down
    return out if mixture is None else weigh(out, mixture)


@twin(None, "kernels.cpu.prefill.grouped")
def grouped(x: Tensor, blobs: list[Tensor], counts: list[int], layout: Layout, gate: Gate,
            gate_bias: Tensor | None = None, up_bias: Tensor | None = None) -> Tensor:
    """Prefill on a processor: each expert over its own tokens, which follow one another -> its sums, float32 [n, H], as
    of `dense`.

    x float32 [n, H]; blobs: an expert each, uint8 [blob_bytes]; counts: of its tokens; gate_bias, up_bias: a row an
    expert, float32 [.., I], or None.
    """
    out = []
    for i, (blob, rows) in enumerate(zip(blobs, x.split(counts), strict=True)):
        gate_rows, up_rows, down = decode_blob(blob, layout)
        g, u = rows @ gate_rows.T, rows @ up_rows.T
        if gate_bias is not None:
            g, u = g + gate_bias[i], u + up_bias[i]
        out.append(gate(g, u) @ down)
    return torch.cat(out)


@twin("kernels.gpu.grouped")
def multiply_tile(x: Tensor, tokens: Tensor, ends: Tensor, blobs: Tensor, layout: Layout, gate: Gate,
            gate_bias: Tensor | None = None, up_bias: Tensor | None = None) -> Tensor:
    """Prefill on a card: each expert of a tile over its own picks -> [t, hidden] like x, before the bias of down.

    x float [T, hidden]; tokens integers [t], the token of each pick, one expert's behind another's; ends int32 [n],
    behind the picks of each expert; blobs uint8 [n, blob_bytes]; gate_bias, up_bias float32 [n, I] or None.
    """
    out, begin = torch.empty(len(tokens), layout.hidden, dtype=x.dtype, device=x.device), 0
    for at, end in enumerate(ends.tolist()):
        rows = x[tokens[begin:end].long()].float()
        gate_rows, up_rows, down = (matrix[:, :layout.hidden] for matrix in decode_blob(blobs[at], layout))
        g, u = rows @ gate_rows.T, rows @ up_rows.T
        if gate_bias is not None:
            g, u = g + gate_bias[at], u + up_bias[at]
        out[begin:end] = gate(g, u) @ down
        begin = end
    return out


@twin("kernels.gpu.dequantize")
def dequantize(blobs: Tensor, gate_up: Tensor, down: Tensor, layout: Layout) -> None:
    """Into 16-bit matrices, for the matrix products of prefill: blobs uint8 [n, blob_bytes] -> gate_up [n, 2I, hidden]
    (rows of gate, then of up) and down [n, I, hidden], in their dtype and without the padding of hidden."""
    half = layout.neurons
    for blob, both, last in zip(blobs, gate_up, down, strict=True):
        for target, values in zip((both[:half], both[half:], last), decode_blob(blob, layout), strict=True):
            target.copy_(values[:, :layout.hidden])


def decode_blob(blob: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [blob_bytes] -> gate, up, down float32 [I, H] at 4 bits."""
    sketch = blob[:layout.neurons * layout.sketch_row].view(layout.neurons, layout.sketch_row)
    records = blob[layout.sketch_bytes:layout.blob_bytes].view(layout.neurons, layout.record)
    return decode_gate(sketch, records, layout), decode_up(sketch, records, layout), decode_down(records, layout)
