"""The best rows of a head, which is the largest matrix of a token: all are scanned by half of their bits, few computed.

The head's 8-bit codes lie in two planes of 4 bits. With u = code + 128: plane 0 holds u >> 4, plane 1 holds u & 15, and
byte j of a row's plane has column 2j in its lower and column 2j + 1 in its upper half, as 4-bit codes have them
(kernels/trunk/linear.py). A scanned weight is scale * (16 * upper + 7.5 - 128); what it leaves out is one of 16
remainders, equally likely as far as a token can tell, so a row's score is off by a sum whose standard deviation is
REMAINDER * sqrt(sum over groups of (scale * |x of the group|)**2). A row that is DEVIATIONS of its own below what the
n-th best row has at least is not computed.

That is no proof: one that holds for every x is the sum of 8 * scale * |x|_1, some 60 of these deviations at 2,048
columns, and rules out next to nothing. The largest deviation of 6.1 million rows of the embedded model was 5.3.

Legend: R rows, K columns, G groups of a row.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import twin
from kernels.trunk.linear import BLOCK, Matrices, decode

Tensor = torch.Tensor

REMAINDER = 21.25 ** 0.5    # standard deviation of 0..15, all equally likely
DEVIATIONS = 8.0
MOST_BEST = 256             # rows that may be asked for; more are all


@twin("kernels.gpu.trunk.head", "kernels.cpu.trunk.head")
def best_rows(x: Tensor, head: Matrices, n_best: int | Tensor, norm: Tensor | None = None, epsilon: float = 0.0,
              ) -> Tensor:
    """x float32 [1, K] -> n @ weight.T of the n_best largest rows, at least, and -inf for the others: [R].

    head: one nested matrix, without a bias. n_best: up to MOST_BEST; 0: all rows; a recorded step is told by an int64
    [1] of the device. n: as of `linears`.
    """
    codes, scales, _ = head.parts[0]
    given = x if norm is None else norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))
    whole = F.linear(given, decode(codes, scales))[0]
    if not isinstance(n_best, Tensor) and not n_best:
        return whole
    scores, reach = scanned(given, codes, scales)
    below = scores + reach < limit_of(scores - reach, n_best)   # what is no number is below nothing, and stays
    return torch.where(below, -torch.inf, whole)


def limit_of(least: Tensor, n_best: int | Tensor) -> Tensor:
    """Of what each row has at least [R], the n_best-th, [1]; -inf where all are wanted."""
    most = min(MOST_BEST, len(least))
    if not isinstance(n_best, Tensor):
        return least.topk(min(n_best, most)).values[-1:]
    found = least.topk(most).values.index_select(0, (n_best - 1).clamp(0, most - 1))
    return torch.where(n_best > 0, found, -torch.inf)


def scanned(x: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """x float32 [1, K] -> what the upper plane says of each row, and how far it may be off: [R] each."""
    upper = torch.stack((codes[:, 0] & 15, codes[:, 0] >> 4), -1).flatten(-2)
    grouped = x.unflatten(-1, (scales.shape[1], -1))
    weights = (16 * upper.float() - 120.5).unflatten(-1, (scales.shape[1], -1)) * scales.float()[..., None]
    reach = (scales.float().square() @ grouped.square().sum(-1)[0]).sqrt()
    return (weights.flatten(-2) @ x[0]), DEVIATIONS * REMAINDER * reach


def split(codes: Tensor) -> Tensor:
    """8-bit codes int8 [R, K], contiguous -> the same in two planes, uint8 [R, 2, K/2], one behind the other."""
    planes = codes.new_empty(2, len(codes), codes.shape[1] // 2, dtype=torch.uint8)
    for first in range(0, len(codes), max(1, BLOCK // codes.shape[1])):
        at = slice(first, first + max(1, BLOCK // codes.shape[1]))
        pairs = (codes[at].view(torch.uint8) ^ 128).view(torch.int16)   # the even column in the lower byte
        planes[0, at] = pairs >> 4 & 15 | pairs >> 8 & 240
        planes[1, at] = pairs & 15 | pairs >> 4 & 240
    return planes.transpose(0, 1)
