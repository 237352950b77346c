"""What a shared expert makes of its two projections, and how much of it counts for a token."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import twin

Tensor = torch.Tensor


@twin("kernels.gpu.trunk.gated")
def gated(x: Tensor) -> Tensor:
    """x float32 [T, 1 + 2S], any stride between rows: logit, gate, up -> sigmoid(logit) * silu(gate) * up, [T, S]."""
    logit, gate, up = x.split((1, x.shape[1] // 2, x.shape[1] // 2), 1)
    return logit.sigmoid() * F.silu(gate) * up
