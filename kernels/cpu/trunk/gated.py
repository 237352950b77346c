"""Compiled twin of kernels/trunk/gated.py."""
from __future__ import annotations

import math

import torch
from numba import carray, float32

from kernels.cpu.gate import scale
from kernels.cpu.threads import Step, address, call, fields, pack, pointer, task

Tensor = torch.Tensor

RECORD = fields("tokens size logits x row out")


@task
def _gate(table):
    """silu(gate) * up, times the sigmoid of the first number of a row where that is a logit."""
    a = carray(pointer(table), 1, RECORD)[0]
    for t in range(a.tokens):
        x, at = a.x + 4 * t * a.row, a.out + 4 * t * a.size
        row, out = carray(pointer(x), a.logits + 2 * a.size, float32), carray(pointer(at), a.size, float32)
        out[:] = row[a.logits + a.size:]
        scale(x + 4 * a.logits, at, a.size, True)
        if a.logits:
            share = float32(1) / (float32(1) + math.exp(-row[0]))
            for i in range(a.size):
                out[i] *= share


def gated(x: Tensor, kind: str = "silu") -> Tensor:
    """As kernels.trunk.gated.gated; other kinds are left to the reference."""
    if kind != "silu" or x.dtype != torch.float32 or x.stride(1) != 1:
        return NotImplemented
    out = torch.empty(len(x), x.shape[1] // 2, dtype=torch.float32)
    call(gating(x, out))
    return out


def gating(x: Tensor, out: Tensor) -> Step:
    """The step of `gated`, into out [T, S]."""
    record = pack(RECORD, 1, tokens=len(x), size=out.shape[1], logits=x.shape[1] % 2, x=address(x), row=x.stride(0),
                  out=address(out))
    return Step(_gate, record, (x, out), whole=True)
