"""Device version of kernels/trunk/gated.py."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import Gate
from kernels.gpu.gate import gated as product_of
from kernels.gpu.gate import kind_of

Tensor = torch.Tensor

BLOCK = 256


@triton.jit
def _gated(x, out, size, stride, alpha, limit, LOGIT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: blocks of S, T. LOGIT: columns of it, 1 or 0."""
    token = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    x += token * stride
    gate = tl.load(x + LOGIT + at, mask=there, other=0)
    product = product_of(gate, tl.load(x + LOGIT + size + at, mask=there, other=0), alpha, limit, KIND)
    if LOGIT:
        product *= tl.sigmoid(tl.load(x))
    tl.store(out + token * size + at, product, mask=there)


def gated(x: Tensor, kind: str = "silu") -> Tensor:
    """As kernels.trunk.gated.gated."""
    n_tokens, size, gate = len(x), x.shape[1] // 2, Gate(kind)
    assert x.stride(1) == 1 and x.dtype == torch.float32, x.shape
    out = torch.empty(n_tokens, size, dtype=torch.float32, device=x.device)
    _gated[(triton.cdiv(size, BLOCK), n_tokens)](x, out, size, x.stride(0), gate.alpha, gate.limit,
                                                    LOGIT=x.shape[1] % 2, KIND=kind_of(gate), BLOCK=BLOCK, num_warps=2)
    return out
