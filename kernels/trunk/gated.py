"""What a shared expert, or a layer's only one, makes of its two projections, and how much of it counts for a token."""
from __future__ import annotations

import torch

from kernels.activation import Gate
from kernels.dispatch import twin
from kernels.trunk.linear import Matrices, linears

Tensor = torch.Tensor


@twin(None, "kernels.cpu.trunk.gated")
def gated(x: Tensor, kind: str = "silu") -> Tensor:
    """x float32 [T, 2S], any stride between rows: gate, up -> their product as a Gate of this kind makes it, [T, S]; of
    an odd number of columns the first is a logit, whose sigmoid all is times."""
    size = x.shape[1] // 2
    logit, gate, up = x.split((x.shape[1] % 2, size, size), 1)
    product = Gate(kind)(gate, up)
    return logit.sigmoid() * product if logit.shape[1] else product


@twin("kernels.gpu.linear")
def gated_linears(x: Tensor, matrices: Matrices, residual: Tensor | None = None, kind: str = "silu") -> Tensor:
    """What `gated` makes of x, through an expert's way back: residual + it @ weights.T + biases, [T, sum of R]."""
    return linears(gated(x, kind), matrices, None, 0.0, residual)[0]
