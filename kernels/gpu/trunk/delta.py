"""Device version of kernels/trunk/delta.py: the convolution channel by channel, then a block a head of values.

A block keeps its head's whole matrix in registers: one read and one write of it, whatever the number of tokens.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.trunk.delta import LEAST, Mixer
from kernels.trunk.linear import MOST_TOKENS

Tensor = torch.Tensor

CHANNELS = 128  # of a block


@triton.jit
def _seen(projected, columns, at, channel, token, width, there, WIDTH: tl.constexpr):
    """Column `token` of those that the state holds, then of the new ones, as the state keeps them; float32."""
    if token < WIDTH:
        value = tl.load(columns + channel * WIDTH + token, mask=there, other=0).to(tl.float32)
    else:
        new = tl.load(projected + (token - WIDTH) * width + at, mask=there, other=0)
        value = new.to(columns.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _convolve(projected, columns, row, taps, out, n_tokens, width, channels, keys, q0, q1, k0, k1, v0, v1,
              KEY: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: blocks of C. -> out [T, C]. keys: channels of the queries, and as many of the keys; VALUES: numbers a head
    of keys. q0 and q1, ...: where a kind begins in a row of projections, and its stride between heads of keys."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = channel < channels
    key, value = channel - keys, channel - 2 * keys
    at = tl.where(value >= 0, v0 + value // VALUES * v1 + value % VALUES, k0 + key // KEY * k1 + key % KEY)
    at = tl.where(channel < keys, q0 + channel // KEY * q1 + channel % KEY, at)
    for token in range(n_tokens):
        total = tl.zeros((BLOCK,), tl.float32)
        for tap in tl.static_range(WIDTH):
            seen = _seen(projected, columns, at, channel, token + 1 + tap, width, there, WIDTH)
            total += seen * tl.load(taps + channel * WIDTH + tap, mask=there, other=0)
        tl.store(out + token * channels + channel, total * tl.sigmoid(total), mask=there)
    written = columns + tl.load(row) * channels * WIDTH
    tl.debug_barrier()  # every column has been read
    for tap in tl.static_range(WIDTH):  # in this order, what is read has not been written yet
        seen = _seen(projected, columns, at, channel, n_tokens + tap, width, there, WIDTH)
        tl.debug_barrier()
        tl.store(written + channel * WIDTH + tap, seen.to(columns.dtype.element_ty), mask=there)


@triton.jit
def _recur(mixed, projected, state, row, rate, bias, norm, out, n_tokens, channels, width, heads, z0, z1, b0, b1, a0,
           a1, epsilon, least, scale, PER: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KEYS: tl.constexpr,
           VALUES: tl.constexpr):
    """Grid: Hv. mixed [T, C]; KEYS, VALUES: the next powers of two to Dk and Dv."""
    head = tl.program_id(0)
    group, within = head // PER, head % PER
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    is_key, is_value = key < KEY, value < VALUE
    at, inside = (head * KEY + key)[:, None] * VALUE + value[None], is_key[:, None] & is_value[None]
    held = tl.load(state + at, mask=inside, other=0)
    rate, bias = tl.load(rate + head), tl.load(bias + head)
    weight = tl.load(norm + value, mask=is_value, other=0)
    for token in range(n_tokens):
        own, given = mixed + token * channels, projected + token * width
        q = tl.load(own + group * KEY + key, mask=is_key, other=0)
        k = tl.load(own + (heads // PER + group) * KEY + key, mask=is_key, other=0)
        v = tl.load(own + 2 * (heads // PER) * KEY + head * VALUE + value, mask=is_value, other=0)
        z = tl.load(given + z0 + group * z1 + within * VALUE + value, mask=is_value, other=0)
        share = tl.sigmoid(tl.load(given + b0 + group * b1 + within))
        above = tl.load(given + a0 + group * a1 + within) + bias
        softened = tl.maximum(above, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(above)))
        q = q * (1.0 / tl.sqrt_rn(tl.sum(q * q, axis=0) + least))
        k = k * (1.0 / tl.sqrt_rn(tl.sum(k * k, axis=0) + least))
        held = held * tl.exp(rate * softened)
        change = (v - tl.sum(held * k[:, None], axis=0)) * share
        held += k[:, None] * change[None]
        found = tl.sum(held * q[:, None], axis=0) * scale
        found = weight * (found * (1.0 / tl.sqrt_rn(tl.sum(found * found, axis=0) / VALUE + epsilon)))
        tl.store(out + (token * heads + head) * VALUE + value, found * (z * tl.sigmoid(z)), mask=is_value)
    tl.store(state + tl.load(row) * heads * KEY * VALUE + at, held, mask=inside)


def delta(projected: Tensor, columns: Tensor, state: Tensor, mixer: Mixer, row: Tensor | None = None) -> Tensor:
    """As kernels.trunk.delta.delta."""
    n_tokens, heads, per = len(projected), mixer.value_heads, mixer.value_heads // mixer.key_heads
    row = torch.zeros(1, dtype=torch.int64, device=projected.device) if row is None else row
    assert n_tokens <= MOST_TOKENS and projected.shape[1] == mixer.width and projected.is_contiguous()
    assert columns.is_contiguous() and columns.shape[1:] == mixer.convolution.shape == (mixer.channels,
                                                                                       columns.shape[2])
    assert state.is_contiguous() and state.dtype == torch.float32 and row.dtype == torch.int64
    assert state.shape[1:] == (heads, mixer.key_size, mixer.value_size), state.shape
    q, k, v, z, b, a = mixer.places
    mixed = torch.empty(n_tokens, mixer.channels, dtype=torch.float32, device=projected.device)
    out = torch.empty(n_tokens, heads * mixer.value_size, dtype=torch.float32, device=projected.device)
    _convolve[(triton.cdiv(mixer.channels, CHANNELS),)](
        projected, columns, row, mixer.convolution, mixed, n_tokens, mixer.width, mixer.channels,
        mixer.key_heads * mixer.key_size, *q, *k, *v, KEY=mixer.key_size, VALUES=per * mixer.value_size,
        WIDTH=columns.shape[2], BLOCK=CHANNELS, num_warps=4)
    _recur[(heads,)](
        mixed, projected, state, row, mixer.rate, mixer.bias, mixer.norm, out, n_tokens, mixer.channels, mixer.width,
        heads, *z, *b, *a, mixer.epsilon, LEAST, mixer.key_size ** -0.5, PER=per, KEY=mixer.key_size,
        VALUE=mixer.value_size, KEYS=triton.next_power_of_2(mixer.key_size),
        VALUES=triton.next_power_of_2(mixer.value_size), num_warps=8)
    return out
