"""A large matrix of the trunk times a few tokens, from the codes that the file holds: nothing is decoded into memory.

The order is that of the file. Of a row, K columns in groups of g (64), G = K/g:

  8 bits   codes int8 [R, K], scales float16 [R, G]:           value = scale * code, code -127..127
  4 bits   codes uint8 [R, K/2], scales float16 [R, G, 2]:     value = scale * code + offset, code 0..15;
           byte j holds column 2j in its lower and column 2j+1 in its upper half

A matrix whose 8-bit codes lie in two planes of 4 is nested: uint8 [R, 2, K/2], as of kernels/trunk/head.py, which
computes with it; here its rows are only decoded.

So a group of 4-bit codes is 32 bytes whose lower halves meet the even columns of the activation and whose upper halves
meet the odd ones: who brings the activation into that order once needs two masks and no shuffle for the weights.

The reference computes in float32. A compiled twin may take the activation in 16-bit fixed point, a scale a group
(within 2**-15 of the group's largest): integer sums by group, scales applied in float32.

Legend: T tokens, R rows (outputs), K columns (inputs).
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from kernels.dispatch import twin

Tensor = torch.Tensor

MOST_TOKENS = 4         # of one call of `linear`; more are a matrix product over decoded rows
BLOCK = 1 << 18         # weights that the reference decodes at a time: they stay in a processor's cache


@twin("kernels.gpu.linear", "kernels.cpu.trunk.linear")
def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] float32, bfloat16 or float16, T <= MOST_TOKENS -> x @ weight.T + bias, [T, R] in x's dtype.

    codes, scales: as above, contiguous. bias: float [R] or None.
    """
    assert x.dim() == 2 and len(x) <= MOST_TOKENS and x.shape[1] == columns(codes), (x.shape, codes.shape)
    out, step = torch.empty(len(x), len(codes), dtype=torch.float32, device=x.device), max(1, BLOCK // x.shape[1])
    values = x.float()
    for first in range(0, len(codes), step):
        at = slice(first, first + step)
        torch.mm(values, decode(codes[at], scales[at]).T, out=out[:, at])
    return (out if bias is None else out + bias.float()).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Matrices:
    """Matrices that multiply the same activation, their outputs one behind the other; lives as long as its tensors.

    parts: (codes, scales, bias) each, as of `linear`, or (weight [R, K], None, bias); weight float32 on a processor,
    any float on a card; bias likewise, or None.
    """

    parts: tuple[tuple[Tensor, Tensor | None, Tensor | None], ...]

    @cached_property
    def columns(self) -> int:
        codes, scales, _ = self.parts[0]
        return codes.shape[1] if scales is None else columns(codes)

    @cached_property
    def is_nested(self) -> bool:
        """Whether kernels/trunk/head.py computes with it."""
        return self.parts[0][0].dim() == 3

    @cached_property
    def rows(self) -> int:
        return sum(len(codes) for codes, _, _ in self.parts)

    @cached_property
    def n_bytes(self) -> int:
        return sum(part.nbytes for parts in self.parts for part in parts if part is not None)


@twin("kernels.gpu.linear", "kernels.cpu.trunk.linear")
def linears(x: Tensor, matrices: Matrices, norm: Tensor | None = None, epsilon: float = 0.0,
            residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x float32 [T, K], T <= MOST_TOKENS -> residual + n @ weights.T + biases, [T, sum of R], and n itself.

    n is x, or with `norm` [K] its root-mean-square norm: norm * x / sqrt(mean(x**2) + epsilon). residual: [T, sum of R]
    or None.
    """
    given = x if norm is None else norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))
    found = torch.cat([F.linear(given, codes.float() if scales is None else decode(codes, scales),
                                None if bias is None else bias.float()) for codes, scales, bias in matrices.parts], -1)
    return found if residual is None else residual + found, given


@twin("kernels.gpu.linear", "kernels.cpu.prefill.dequantize")
def dequantize_rows(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Rows of codes and scales -> out [R, K], contiguous, in its dtype: tiles of prefill, rows of an embedding."""
    out.copy_(decode(codes, scales))


def columns(codes: Tensor) -> int:
    """K, from the codes alone: their dtype tells how many bits they have."""
    return codes.shape[-1] * (1 if codes.dtype == torch.int8 else 2)


def joined(codes: Tensor) -> Tensor:
    """Nested codes [R, 2, K/2] as int8 [R, K]; others as they are."""
    if codes.dim() < 3:
        return codes
    upper, lower = codes.unbind(1)
    both = torch.stack((upper << 4 | lower & 15, upper & 240 | lower >> 4), -1).flatten(-2)
    return (both ^ 128).view(torch.int8)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """-> the weights, float32 [..., K]."""
    codes = joined(codes)
    if codes.dtype == torch.int8:
        grouped = codes.unflatten(-1, (scales.shape[-1], -1)).float()
        return grouped.mul_(scales.float()[..., None]).flatten(-2)
    both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    grouped = both.unflatten(-1, (scales.shape[-2], -1)).float()
    return torch.addcmul(scales[..., 1:].float(), grouped, scales[..., :1].float()).flatten(-2)
