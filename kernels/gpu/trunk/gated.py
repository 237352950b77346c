"""Device version of kernels/trunk/gated.py."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

BLOCK = 256


@triton.jit
def _gated(x, out, size, stride, BLOCK: tl.constexpr):
    """Grid: blocks of S, T."""
    token = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    x += token * stride
    gate = tl.load(x + 1 + at, mask=there, other=0)
    up = tl.load(x + 1 + size + at, mask=there, other=0)
    tl.store(out + token * size + at, tl.sigmoid(tl.load(x)) * (gate * tl.sigmoid(gate)) * up, mask=there)


def gated(x: Tensor) -> Tensor:
    """As kernels.trunk.gated.gated."""
    n_tokens, size = len(x), x.shape[1] // 2
    assert x.stride(1) == 1 and x.dtype == torch.float32 and x.shape[1] == 1 + 2 * size, x.shape
    out = torch.empty(n_tokens, size, dtype=torch.float32, device=x.device)
    _gated[(triton.cdiv(size, BLOCK), n_tokens)](x, out, size, x.stride(0), BLOCK=BLOCK, num_warps=2)
    return out
