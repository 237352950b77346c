"""Device version of kernels/trunk/settle.py: a block a token, whose numbers stay in its registers. Behind a product it
is the last of the product's blocks to finish (last.py)."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import LARGEST
from kernels.gpu.linear import PLAIN, section, sections, shaped
from kernels.gpu.trunk.last import counters, is_last
from kernels.trunk.linear import MOST_TOKENS, Matrices
from kernels.trunk.settle import Settling

Tensor = torch.Tensor

WARPS = 8


@triton.jit
def _normed(x, norm, column, there, hidden, epsilon):
    factor = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / hidden + epsilon)
    return tl.load(norm + column, mask=there, other=0).to(tl.float32) * (x * factor)


@triton.jit
def _settled(residual, added, beside, norm, own0, own1, scale, then, out, normed, token, hidden, epsilon,
             TWO: tl.constexpr, SCALED: tl.constexpr, THEN: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at, there = token * hidden + column, column < hidden
    value = tl.load(added + at, mask=there, other=0, cache_modifier=".cg")
    if TWO:
        value = _normed(value, own0, column, there, hidden, epsilon)
        value += _normed(tl.load(beside + at, mask=there, other=0), own1, column, there, hidden, epsilon)
    value = tl.load(residual + at, mask=there, other=0) + _normed(value, norm, column, there, hidden, epsilon)
    if SCALED:
        value *= tl.load(scale).to(tl.float32)
    tl.store(out + at, value, mask=there)
    if THEN:
        tl.store(normed + at, _normed(value, then, column, there, hidden, epsilon), mask=there)


@triton.jit
def _settle(residual, added, beside, norm, own0, own1, scale, then, out, normed, hidden, epsilon, TWO: tl.constexpr,
            SCALED: tl.constexpr, THEN: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: T."""
    _settled(residual, added, beside, norm, own0, own1, scale, then, out, normed, tl.program_id(0), hidden, epsilon,
             TWO, SCALED, THEN, BLOCK)


@triton.jit
def _settled_linear(x, codes, scales, bias, codes1, scales1, bias1, codes2, scales2, bias2, residual, norm, then, added,
                    out, normed, counters, end0, end1, n_rows, epsilon, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
                    WORDS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr,
                    PARTS: tl.constexpr, ROWS: tl.constexpr, BIASED: tl.constexpr, PLAIN: tl.constexpr,
                    THEN: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Grid: T, blocks of rows. added [T, H]: the product."""
    token = tl.program_id(0)
    section(x + token * COLUMNS, x, codes, scales, bias, codes1, scales1, bias1, codes2, scales2, bias2, x,
            added + token * n_rows, x, tl.program_id(1), 0, end0, end1, n_rows, epsilon, COLUMNS, GROUPS, WORDS, STEP,
            STEPS, BITS, PARTS, PLAIN, BIASED, False, False, ROWS, LARGEST)
    if is_last(counters + token, tl.num_programs(1)):
        _settled(residual, added, added, norm, norm, norm, norm, then, out, normed, token, n_rows, epsilon, False,
                 False, THEN, BLOCK)


def settled_linears(x: Tensor, matrices: Matrices, residual: Tensor, how: Settling) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.settle.settled_linears."""
    (parts,), (n_tokens, n_columns), hidden = sections(matrices), x.shape, residual.shape[1]
    assert how.own is None and how.scale is None and n_tokens <= MOST_TOKENS and matrices.rows == hidden
    for given in (x, residual):
        assert given.is_contiguous() and given.dtype == torch.float32, (given.shape, given.dtype)
    own, added, out = shaped(parts, n_columns), torch.empty_like(residual), torch.empty_like(residual)
    normed = out if how.then is None else torch.empty_like(out)
    _settled_linear[(n_tokens, own.blocks)](
        x, *own.pointers(x), residual, how.norm, how.norm if how.then is None else how.then, added, out, normed,
        counters(x.device), *own.ends, how.epsilon, COLUMNS=n_columns, **own.sizes(""), PLAIN=PLAIN.value,
        THEN=how.then is not None, BLOCK=triton.next_power_of_2(hidden), LARGEST=LARGEST, num_warps=4)
    return out, normed


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
