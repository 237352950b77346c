"""One matrix to 4-bit or 8-bit codes with error compensation over calibration data (GPTQ, Frantar et al. 2023).

Columns are rounded one after the other; what a rounding misses is taken over by the columns that are still to come, as
the Hessian of the inputs says. Two uses: gate, up and the trunk's matrices over their inputs, a group of columns at a
time, and down over its expert's activations, a block of neurons at a time, each neuron with its own scales along
hidden. Columns of large inputs come first: the last ones have nobody left to make good for them. Then scales are fitted
to the codes and every column is rounded once more against all others, which takes away a third of what that leaves.
Down's error is a layer's output, of which an answer feels some directions more than others: along hidden, a block is
compensated by that.

Legend: C compensated dimension, R the other one, g group size, I neurons, H hidden, B experts. All float32, on any
device.
"""
from __future__ import annotations

import torch

from engine.files.quantize import in_parallel, rounded, search
from engine.files.trunk import scale8

Tensor = torch.Tensor
DAMPING = 0.01          # of the mean of the Hessian's diagonal, added to it
TOP = {4: 15, 8: 254}   # the largest code
ROWS_AT_ONCE = 1024     # whose scales are searched together on a processor
FITTED_AT_ONCE = 1 << 24    # numbers that a fit of scales over the whole Hessian makes together
SWEEPS = 2              # of every column over its code again, behind a fit of the scales
BLOCKS = 16             # of neurons: within one, down's neurons do not make good for each other


def factor(hessian: Tensor) -> Tensor:
    """Upper U [C, C] with inverse(damped hessian) = U^T U. Whatever the rank: damping grows until it works."""
    scale = hessian.diagonal().mean()
    if not scale > 0:                                               # inputs that are all zero: nothing to compensate
        return torch.eye(len(hessian), device=hessian.device)
    damping, flipped = DAMPING, (hessian / scale).flip(0, 1)
    while True:
        damped = flipped.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            one = torch.eye(len(hessian), device=hessian.device)
            return torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1)
        damping *= 10


def over_inputs(weight: Tensor, hessian: Tensor, group: int, bits: int = 4) -> tuple[Tensor, Tensor]:
    """weight [R, C], hessian [C, C] of its inputs -> codes uint8 [R, C], (scale, offset) float16 [R, C/g, 2].

    The scales of a group are found when its first column comes, on what the groups before it have left. 8 bits: codes
    0..254, the offset is -127 scales."""
    rows, columns = weight.shape
    power = hessian.diagonal().unflatten(0, (-1, group))
    groups = power.sum(1).argsort(descending=True, stable=True)
    inside = power.argsort(dim=1, descending=True, stable=True)
    order = (groups[:, None] * group + inside[groups]).flatten()    # groups stay together
    upper, left = factor(hessian[order][:, order]), weight.T[order].contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    fine = torch.empty(rows, columns // group, 2, dtype=torch.float16, device=weight.device)
    for at, which in zip(range(0, columns, group), groups.tolist(), strict=True):
        block = slice(at, at + group)
        fine[:, which] = _grids(left[block].T.contiguous(), upper.diagonal()[block].pow(-2), bits)
        scale, offset = fine[:, which].float().unbind(-1)
        codes[block] = _walk(left, upper, block, scale.expand(group, -1), offset.expand(group, -1), TOP[bits])
    codes, damped = codes[order.argsort()].T.contiguous(), damp(hessian)
    for _ in range(SWEEPS if bits == 4 else 0):
        fine = fitted(codes, weight, damped, group)
        scale, offset = (side.repeat_interleave(group, 1).T for side in fine.float().unbind(-1))
        codes = _settled(codes.T, scale, offset, weight.T, damped).T.contiguous()
    return codes, fine if bits == 8 else fitted(codes, weight, damped, group)


def damp(hessian: Tensor) -> Tensor:
    """Of full rank, whatever the inputs were."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean().clamp_min(1e-30))
    return damped


def fitted(codes: Tensor, weight: Tensor, damped: Tensor, group: int) -> Tensor:
    """The scales that err least over the inputs with these codes uint8 [R, C] of any width, all groups of a row
    together: (scale, offset) float16 [R, C/g, 2]. damped: the Hessian, of `damp`.

    A row is a sum of 2G known directions, group by group its codes and its ones; their products over the damped Hessian
    make the normal equations."""
    n_groups, found = weight.shape[1] // group, []
    n_rows = max(1, FITTED_AT_ONCE // (2 * n_groups * weight.shape[1]))
    for q, w in zip(codes.float().split(n_rows), weight.split(n_rows), strict=True):
        basis = torch.stack((q, torch.ones_like(q)), 1).unflatten(2, (n_groups, group))        # [r, 2, G, g]
        moved = torch.einsum("rkGg,Ggc->rkGc", basis, damped.unflatten(0, (n_groups, group)))  # [r, 2, G, C]
        normal = torch.einsum("rkGHg,rlHg->rGkHl", moved.unflatten(3, (n_groups, group)), basis)
        normal = normal.flatten(3).flatten(1, 2)
        target = torch.einsum("rkGc,rc->rGk", moved, w).flatten(1)
        normal.diagonal(dim1=1, dim2=2).add_(1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
        found.append(torch.linalg.solve(normal, target).unflatten(1, (n_groups, 2)))
    return torch.cat(found).clamp(-60000, 60000).half()


def _grids(rows: Tensor, importance: Tensor, bits: int) -> Tensor:
    """(scale, offset) float16 [R, 2] of one group [R, g]."""
    if bits == 8:
        scale = scale8(rows)
        return torch.stack((scale, -127 * scale), -1)
    weights = importance / importance.sum()
    n = ROWS_AT_ONCE if rows.device.type == "cpu" else len(rows)
    return torch.cat(in_parallel(lambda part: search(part[:, None], weights)[1][:, 0], rows.split(n)))


def over_neurons(downs: Tensor, hessians: Tensor, felt: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """downs [B, I, H] of experts of a layer, hessians [B, I, I] of their activations, felt [H, H]: second moments of
    what an answer feels of the layer's output -> codes uint8 [B, I, H], (scale, offset) float16 [B, I, H/g, 2]."""
    orders = [hessian.diagonal().argsort(descending=True, stable=True) for hessian in hessians]
    uppers = [factor(hessian[order][:, order]) for hessian, order in zip(hessians, orders, strict=True)]
    left = torch.stack([down[order] for down, order in zip(downs, orders, strict=True)])
    step = -(-left.shape[1] // BLOCKS)
    found = [_block(left, uppers, slice(at, at + step), felt, group) for at in range(0, left.shape[1], step)]
    codes, fine = (torch.cat(part, 1) for part in zip(*found, strict=True))
    back = [order.argsort() for order in orders]
    return tuple(torch.stack([one[order] for one, order in zip(part, back, strict=True)]) for part in (codes, fine))


def _block(left: Tensor, uppers: list[Tensor], block: slice, felt: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of the neurons `block` of left [B, I, H], all experts together; what they miss goes to the
    neurons behind them, in place."""
    part = left[:, block]
    codes, fine = over_inputs(part.flatten(0, 1), felt, group)
    scale, offset = (side.repeat_interleave(group, 1) for side in fine.float().unbind(-1))
    errors = part - torch.addcmul(offset, codes, scale).view_as(part)
    for rows, upper, error in zip(left, uppers, errors, strict=True):
        missed = torch.linalg.solve_triangular(upper[block, block].T, error, upper=False)
        rows[block.stop:].addmm_(upper[block, block.stop:].T, missed, alpha=-1)
    return codes.view(part.shape), fine.unflatten(0, part.shape[:2])


def _settled(codes: Tensor, scale: Tensor, offset: Tensor, wanted: Tensor, damped: Tensor) -> Tensor:
    """Codes uint8 [C, R] after each column in turn has taken the best code for what all others are now."""
    codes = codes.float()
    slope = damped @ (torch.addcmul(offset, codes, scale) - wanted)
    for j in range(len(codes)):
        best = torch.addcmul(offset[j], codes[j], scale[j]) - slope[j] / damped[j, j]
        new = rounded(best, scale[j], offset[j])
        slope.addr_(damped[j], (new - codes[j]) * scale[j])
        codes[j] = new
    return codes.to(torch.uint8)


def _walk(left: Tensor, upper: Tensor, block: slice, scale: Tensor, offset: Tensor, top: int = 15) -> Tensor:
    """Round the rows `block` of left [C, R] on their grids [b, R], in turn; what they miss goes to the rows behind
    them, in place. -> codes uint8 [b, R]."""
    part, own = left[block], upper[block, block]
    codes, missed = torch.empty_like(part), torch.empty_like(part)
    for j in range(len(part)):
        codes[j] = rounded(part[j], scale[j], offset[j], top)
        missed[j] = (part[j] - torch.addcmul(offset[j], codes[j], scale[j])) / own[j, j]
        part[j + 1:].addr_(own[j, j + 1:], missed[j], alpha=-1)
    left[block.stop:].addmm_(upper[block, block.stop:].T, missed, alpha=-1)
    return codes.to(torch.uint8)
