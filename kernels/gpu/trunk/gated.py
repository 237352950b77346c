"""Device version of kernels/trunk/gated.py."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

BLOCK = 256


@triton.jit
def _gated(x, out, size, stride, LOGIT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: blocks of S, T. LOGIT: columns of it, 1 or 0."""
    token = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    x += token * stride
    gate = tl.load(x + LOGIT + at, mask=there, other=0)
    product = gate * tl.sigmoid(gate) * tl.load(x + LOGIT + size + at, mask=there, other=0)
    if LOGIT:
        product *= tl.sigmoid(tl.load(x))
    tl.store(out + token * size + at, product, mask=there)


def gated(x: Tensor) -> Tensor:
    """As kernels.trunk.gated.gated."""
    n_tokens, size = len(x), x.shape[1] // 2
    assert x.stride(1) == 1 and x.dtype == torch.float32, x.shape
    out = torch.empty(n_tokens, size, dtype=torch.float32, device=x.device)
    _gated[(triton.cdiv(size, BLOCK), n_tokens)](x, out, size, x.stride(0), LOGIT=x.shape[1] % 2, BLOCK=BLOCK,
                                                    num_warps=2)
    return out
