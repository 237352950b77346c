"""Compiled twin of kernels/trunk/delta.py: the convolution, then a piece a head of values.

Legend as there. Loops run along Dv, without sums over lanes, so that the compiler makes vectors of them.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, float32, njit

from kernels.cpu.gate import scale
from kernels.cpu.threads import Step, address, call, claim, fields, pack, pointer, task
from kernels.trunk.delta import LEAST, Mixer

Tensor = torch.Tensor

RECORD = fields("tokens channels width taps keys per key value heads q0 q1 k0 k1 v0 v1 z0 z1 b0 b1 a0 a1 projected "
                "columns convolution mixed state rate bias norm out", floats="epsilon least scale")


@task
def _convolve(table):
    """-> mixed [T, C]; the columns go on by T."""
    a = carray(pointer(table), 1, RECORD)[0]
    projected = carray(pointer(a.projected), (a.tokens, a.width), float32)
    columns = carray(pointer(a.columns), (a.channels, a.taps), float32)
    taps = carray(pointer(a.convolution), (a.channels, a.taps), float32)
    mixed = carray(pointer(a.mixed), (a.tokens, a.channels), float32)
    for channel in range(a.channels):
        if channel < a.keys:
            at = a.q0 + channel // a.key * a.q1 + channel % a.key
        elif channel < 2 * a.keys:
            at = a.k0 + (channel - a.keys) // a.key * a.k1 + (channel - a.keys) % a.key
        else:
            values = a.per * a.value
            at = a.v0 + (channel - 2 * a.keys) // values * a.v1 + (channel - 2 * a.keys) % values
        for t in range(a.tokens):
            total = float32(0)
            for tap in range(a.taps - 1):
                columns[channel, tap] = columns[channel, tap + 1]
                total += columns[channel, tap] * taps[channel, tap]
            columns[channel, a.taps - 1] = projected[t, at]
            mixed[t, channel] = total + projected[t, at] * taps[channel, a.taps - 1]
    scale(a.mixed, a.mixed, a.tokens * a.channels, False)   # by its own sigmoid: silu


@njit(cache=True, nogil=True)
def _factor(row, least):
    """1 / the length of a row."""
    total = float32(0)
    for i in range(len(row)):
        total += row[i] * row[i]
    return float32(1) / math.sqrt(total + least)


@njit(cache=True, nogil=True)
def _decayed(held, k, factor, left, asked):
    """Let the matrix decay; `asked` [Dv]: what it then holds under a key."""
    asked[:] = 0
    for i in range(len(held)):
        weight = k[i] * factor
        for j in range(len(asked)):
            held[i, j] *= left
            asked[j] += held[i, j] * weight


@njit(cache=True, nogil=True)
def _changed(held, q, k, q_factor, k_factor, change, out):
    """Add `change` [Dv] under a key; `out` [Dv]: what the matrix then holds under the query."""
    out[:] = 0
    for i in range(len(held)):
        own, asked = k[i] * k_factor, q[i] * q_factor
        for j in range(len(out)):
            held[i, j] += own * change[j]
            out[j] += held[i, j] * asked


@task
def _recur(table):
    a = carray(pointer(table), 1, RECORD)[0]
    projected = carray(pointer(a.projected), (a.tokens, a.width), float32)
    mixed = carray(pointer(a.mixed), (a.tokens, a.channels), float32)
    rate, bias = (carray(pointer(a.rate), a.heads, float32), carray(pointer(a.bias), a.heads, float32))
    norm, out = (carray(pointer(a.norm), a.value, float32),
                 carray(pointer(a.out), (a.tokens, a.heads * a.value), float32))
    change = np.empty(a.value, np.float32)
    head = claim(table)
    while head < a.n_pieces:
        held = carray(pointer(a.state + 4 * head * a.key * a.value), (a.key, a.value), float32)
        group, within = head // a.per, head % a.per
        for t in range(a.tokens):
            q, k = mixed[t, group * a.key:(group + 1) * a.key], mixed[t, a.keys + group * a.key:
                                                                     a.keys + (group + 1) * a.key]
            v = mixed[t, 2 * a.keys + head * a.value:2 * a.keys + (head + 1) * a.value]
            above = projected[t, a.a0 + group * a.a1 + within] + bias[head]
            softened = max(above, float32(0)) + math.log1p(math.exp(-abs(above)))
            share = float32(1) / (float32(1) + math.exp(-projected[t, a.b0 + group * a.b1 + within]))
            k_factor = _factor(k, a.least)
            _decayed(held, k, k_factor, float32(math.exp(rate[head] * softened)), change)
            for j in range(a.value):
                change[j] = (v[j] - change[j]) * share
            row = out[t, head * a.value:(head + 1) * a.value]
            _changed(held, q, k, _factor(q, a.least) * a.scale, k_factor, change, row)
            total = float32(0)
            for j in range(a.value):
                total += row[j] * row[j]
            one = float32(1) / math.sqrt(total / float32(a.value) + a.epsilon)
            for j in range(a.value):
                row[j] = norm[j] * (row[j] * one)
            scale(a.projected + 4 * (t * a.width + a.z0 + group * a.z1 + within * a.value),
                  a.out + 4 * (t * a.heads + head) * a.value, a.value, True)
        head = claim(table)


def delta(projected: Tensor, columns: Tensor, state: Tensor, mixer: Mixer, row: Tensor | None = None) -> Tensor:
    """As kernels.trunk.delta.delta; what a device would be told by a tensor is left to the reference."""
    if row is not None or not takes(columns, state):
        return NotImplemented
    out = torch.empty(len(projected), mixer.value_heads * mixer.value_size, dtype=torch.float32)
    for step in mixing(projected.contiguous(), mixer, out, **of_state(columns, state)):
        call(step)
    return out


def takes(columns: Tensor, state: Tensor) -> bool:
    """Whether a layer's state is such as is changed here."""
    return all(kept.dtype == torch.float32 and kept.is_contiguous() for kept in (columns, state))


def of_state(columns: Tensor, state: Tensor) -> dict[str, int]:
    """What a record says of a layer's state, whose tensors the caller keeps."""
    return dict(columns=address(columns), state=address(state), n_bytes=state[0].nbytes)


def mixing(projected: Tensor, mixer: Mixer, out: Tensor, n_bytes: int = 0, **state: int) -> list[Step]:
    """The steps of `delta` into out float32 [T, Hv * Dv]. state: as of `of_state`, or set later."""
    heads, kinds = mixer.value_heads, dict(zip("qkvzba", mixer.places, strict=True))
    places = {f"{kind}{i}": number for kind, found in kinds.items() for i, number in enumerate(found)}
    mixed = torch.empty(len(projected), mixer.channels, dtype=torch.float32)
    tensors = dict(projected=projected, convolution=mixer.convolution, mixed=mixed, rate=mixer.rate, bias=mixer.bias,
                   norm=mixer.norm, out=out)
    packed = pack(RECORD, heads, n_bytes, tokens=len(projected), channels=mixer.channels, width=mixer.width,
                  taps=mixer.convolution.shape[1], keys=mixer.key_heads * mixer.key_size, per=heads // mixer.key_heads,
                  key=mixer.key_size, value=mixer.value_size, heads=heads, **places, epsilon=mixer.epsilon, least=LEAST,
                  scale=mixer.key_size ** -0.5, **{name: address(tensor) for name, tensor in tensors.items()},
                  **dict.fromkeys(("columns", "state"), 0) | state)
    alive = (projected, mixer, mixed, out)
    return [Step(_convolve, packed, alive, whole=True), Step(_recur, packed, alive)]
