"""Device version of kernels/trunk/delta.py: a block a head of values, from the convolution to the gated norm.

A block keeps its head's whole matrix in registers: one read and one write of it, whatever the number of tokens. The
blocks that share a head of keys convolve its channels each for itself, and the last of them to finish leaves in the
state what the convolution saw of these (last.py): until then the others may still read what was there.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.trunk.last import MOST, counters, is_last
from kernels.trunk.delta import LEAST, Mixer
from kernels.trunk.linear import MOST_TOKENS

Tensor = torch.Tensor


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
def _convolve(projected, columns, taps, out, at, channel, token, width, there, WIDTH: tl.constexpr):
    """Channels of one token, behind the convolution and its gate."""
    total = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(WIDTH):
        seen = _seen(projected, columns, at, channel, token + 1 + tap, width, there, WIDTH)
        total += seen * tl.load(taps + channel * WIDTH + tap, mask=there, other=0)
    tl.store(out, total * tl.sigmoid(total), mask=there)


@triton.jit
def _keep(projected, columns, written, at, channel, n_tokens, width, there, WIDTH: tl.constexpr):
    """The last columns of these channels into the state, which may be the one that is read."""
    for tap in tl.static_range(WIDTH):  # in this order, what is read has not been written yet
        seen = _seen(projected, columns, at, channel, n_tokens + tap, width, there, WIDTH)
        tl.debug_barrier()
        tl.store(written + channel * WIDTH + tap, seen.to(columns.dtype.element_ty), mask=there)


@triton.jit
def _delta(projected, columns, state, row, taps, rate, bias, norm, mixed, out, counters, n_tokens, channels, width,
           heads, q0, q1, k0, k1, v0, v1, z0, z1, b0, b1, a0, a1, epsilon, least, scale, PER: tl.constexpr,
           KEY: tl.constexpr, VALUE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr):
    """Grid: Hv. mixed [T, Hv, 2 Dk + Dv]: what the convolution makes, which a block reads back, as numbers that it
    makes where it needs them stand in every thread's registers (333 spilled on sm_75). q0 and q1, ...: where a kind
    begins in a row of projections, and its stride between heads of keys; KEYS, VALUES: the next powers of two to Dk and
    Dv."""
    head = tl.program_id(0)
    group, within = head // PER, head % PER
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    is_key, is_value = key < KEY, value < VALUE
    at, inside = (head * KEY + key)[:, None] * VALUE + value[None], is_key[:, None] & is_value[None]
    rate, bias = tl.load(rate + head), tl.load(bias + head)
    weight = tl.load(norm + value, mask=is_value, other=0)
    all_keys = heads // PER * KEY
    q_at, q_channel = q0 + group * q1 + key, group * KEY + key
    k_at, k_channel = k0 + group * k1 + key, all_keys + group * KEY + key
    v_at, v_channel = v0 + group * v1 + within * VALUE + value, 2 * all_keys + head * VALUE + value
    mixed, next_token = mixed + head * (2 * KEY + VALUE), heads * (2 * KEY + VALUE)
    for token in range(n_tokens):
        own = mixed + token * next_token
        _convolve(projected, columns, taps, own + key, q_at, q_channel, token, width, is_key, WIDTH)
        _convolve(projected, columns, taps, own + KEY + key, k_at, k_channel, token, width, is_key, WIDTH)
        _convolve(projected, columns, taps, own + 2 * KEY + value, v_at, v_channel, token, width, is_value, WIDTH)
    tl.debug_barrier()
    held = tl.load(state + at, mask=inside, other=0)
    for token in range(n_tokens):
        own, given = mixed + token * next_token, projected + token * width
        q = tl.load(own + key, mask=is_key, other=0)
        k = tl.load(own + KEY + key, mask=is_key, other=0)
        v = tl.load(own + 2 * KEY + value, mask=is_value, other=0)
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
    to = tl.load(row)
    tl.store(state + to * heads * KEY * VALUE + at, held, mask=inside)
    written = columns + to * channels * WIDTH
    tl.debug_barrier()  # every column has been read
    _keep(projected, columns, written, v_at, v_channel, n_tokens, width, is_value, WIDTH)
    if is_last(counters + group, PER):
        _keep(projected, columns, written, q_at, q_channel, n_tokens, width, is_key, WIDTH)
        _keep(projected, columns, written, k_at, k_channel, n_tokens, width, is_key, WIDTH)


def delta(projected: Tensor, columns: Tensor, state: Tensor, mixer: Mixer, row: Tensor | None = None) -> Tensor:
    """As kernels.trunk.delta.delta."""
    n_tokens, heads, per = len(projected), mixer.value_heads, mixer.value_heads // mixer.key_heads
    row = torch.zeros(1, dtype=torch.int64, device=projected.device) if row is None else row
    assert n_tokens <= MOST_TOKENS and projected.shape[1] == mixer.width and projected.is_contiguous()
    assert columns.is_contiguous() and columns.shape[1:] == mixer.convolution.shape == (mixer.channels,
                                                                                       columns.shape[2])
    assert state.is_contiguous() and state.dtype == torch.float32 and row.dtype == torch.int64
    assert state.shape[1:] == (heads, mixer.key_size, mixer.value_size), state.shape
    assert mixer.key_heads <= MOST, mixer.key_heads
    mixed = torch.empty(n_tokens, heads, 2 * mixer.key_size + mixer.value_size, dtype=torch.float32,
                        device=projected.device)
    out = torch.empty(n_tokens, heads * mixer.value_size, dtype=torch.float32, device=projected.device)
    _delta[(heads,)](
        projected, columns, state, row, mixer.convolution, mixer.rate, mixer.bias, mixer.norm, mixed,
        out, counters(projected.device), n_tokens, mixer.channels, mixer.width, heads,
        *(number for place in mixer.places for number in place), mixer.epsilon, LEAST, mixer.key_size ** -0.5, PER=per,
        KEY=mixer.key_size, VALUE=mixer.value_size, KEYS=triton.next_power_of_2(mixer.key_size),
        VALUES=triton.next_power_of_2(mixer.value_size), WIDTH=columns.shape[2], num_warps=8)
    return out
