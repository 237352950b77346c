"""Compiled twin of kernels/trunk/settle.py."""
from __future__ import annotations

import math

import numpy as np
import torch
from numba import float32, njit

from kernels.trunk.settle import Settling

Tensor = torch.Tensor


@njit("void(float32[::1], float32[::1], float32, float32[::1])", cache=True, nogil=True)
def _norm(x, norm, epsilon, out):
    total = float32(0)
    for value in x:
        total += value * value
    factor = float32(1) / float32(math.sqrt(total / float32(len(x)) + epsilon))
    for i in range(len(x)):
        out[i] = norm[i] * (x[i] * factor)


@njit("void(float32[:,::1], float32[:,::1], float32[:,::1], float32[:,::1], float32, float32, b1, b1, float32[:,::1], "
      "float32[:,::1])", cache=True, nogil=True)
def _settle(residual, added, beside, norms, scale, epsilon, two, then, out, normed):
    """norms [4, H]: of the sum, of both summands where there are two, of what is read next where that is wanted."""
    first, second = np.empty(residual.shape[1], np.float32), np.empty(residual.shape[1], np.float32)
    for t in range(len(residual)):
        if two:
            _norm(added[t], norms[1], epsilon, first)
            _norm(beside[t], norms[2], epsilon, second)
            for i in range(len(first)):
                first[i] += second[i]
        else:
            first[:] = added[t]
        _norm(first, norms[0], epsilon, second)
        for i in range(len(first)):
            out[t, i] = (residual[t, i] + second[i]) * scale
        if then:
            _norm(out[t], norms[3], epsilon, normed[t])


def settle(residual: Tensor, added: Tensor, how: Settling, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.trunk.settle.settle."""
    norms = how.norm, *(how.own or (how.norm, how.norm)), how.norm if how.then is None else how.then
    out = torch.empty_like(residual)
    normed = out if how.then is None else torch.empty_like(out)
    _settle(residual.numpy(), added.numpy(), (added if how.own is None else beside).numpy(),
            torch.stack(norms).float().numpy(), 1.0 if how.scale is None else float(how.scale), how.epsilon,
            how.own is not None, how.then is not None, out.numpy(), normed.numpy())
    return out, normed
