"""The last of a layer's experts: their sums by the router's weights."""
from __future__ import annotations

import torch

from kernels.dispatch import twin

Tensor = torch.Tensor


@twin("kernels.gpu.weigh", "kernels.cpu.apply")
def weigh(sums: Tensor, weights: Tensor, hidden: int) -> Tensor:
    """sums float32 [T, k, padded H], weights float32 [T, k] -> [T, hidden]."""
    return (sums[..., :hidden] * weights[..., None]).sum(1)
