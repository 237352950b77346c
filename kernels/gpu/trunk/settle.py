"""Device version of kernels/trunk/settle.py: a block a token, whose numbers stay in its registers."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.trunk.settle import Settling

Tensor = torch.Tensor

WARPS = 8


@triton.jit
def _normed(x, norm, column, there, hidden, epsilon):
    factor = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / hidden + epsilon)
    return tl.load(norm + column, mask=there, other=0).to(tl.float32) * (x * factor)


@triton.jit
def _settle(residual, added, beside, norm, own0, own1, scale, then, out, normed, hidden, epsilon, TWO: tl.constexpr,
            SCALED: tl.constexpr, THEN: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: T."""
    column = tl.arange(0, BLOCK)
    at, there = tl.program_id(0) * hidden + column, column < hidden
    value = tl.load(added + at, mask=there, other=0)
    if TWO:
        value = _normed(value, own0, column, there, hidden, epsilon)
        value += _normed(tl.load(beside + at, mask=there, other=0), own1, column, there, hidden, epsilon)
    value = tl.load(residual + at, mask=there, other=0) + _normed(value, norm, column, there, hidden, epsilon)
    if SCALED:
        value *= tl.load(scale).to(tl.float32)
    tl.store(out + at, value, mask=there)
    if THEN:
        tl.store(normed + at, _normed(value, then, column, there, hidden, epsilon), mask=there)


def settle(residual: Tensor, added: Tensor, how: Settling, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.settle.settle."""
    n_tokens, hidden = residual.shape
    given = (residual, added) if how.own is None else (residual, added, beside)
    assert all(part.is_contiguous() and part.dtype == torch.float32 and part.shape == residual.shape for part in given)
    out = torch.empty_like(residual)
    normed = out if how.then is None else torch.empty_like(out)
    own = (how.norm, how.norm) if how.own is None else how.own
    _settle[(n_tokens,)](residual, added, given[-1], how.norm, *own, how.norm if how.scale is None else how.scale,
                         how.norm if how.then is None else how.then, out, normed, hidden, how.epsilon,
                         TWO=how.own is not None, SCALED=how.scale is not None, THEN=how.then is not None,
                         BLOCK=triton.next_power_of_2(hidden), num_warps=WARPS)
    return out, normed
