"""Device version of kernels/trunk/choose.py: one launch, whose blocks do different things.

The first ones are the router's, the next those of what is read beside it (as in kernels/gpu/linear.py), the last make
the experts' activation, a few groups each; every block norms for itself. The last of a token's blocks of the router to
finish chooses (last.py).
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation import LARGEST
from kernels.gpu.activation import quantized, room
from kernels.gpu.linear import NORMED, PLAIN, Section, factor_of, launch, loaded, section, sections, shaped
from kernels.gpu.trunk.last import counters, is_last
from kernels.gpu.trunk.route import chosen, constants
from kernels.layout import Layout
from kernels.trunk.choose import Entrance, Reader
from kernels.trunk.linear import MOST_TOKENS

Tensor = torch.Tensor

GROUP, STEP = 128, 2    # numbers of a group where nothing is quantised; groups of a block


@triton.jit
def _choose(x, norm, norm1, given, codes, scales, bias, codes1, scales1, bias1, codes2, scales2, bias2, codes3, scales3,
            bias3, codes4, scales4, bias4, codes5, scales5, bias5, out, normed, bytes_, scale8, high, low, scale16,
            sums, correction, factors, ids, shares, counters, end0, end1, n_rows, end3, end4, n_more, width, n_experts,
            epsilon, epsilon1, scaling, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
            STEP: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
            GROUPS1: tl.constexpr, WORDS1: tl.constexpr, STEP1: tl.constexpr, STEPS1: tl.constexpr,
            BITS1: tl.constexpr, PARTS1: tl.constexpr, ROWS1: tl.constexpr, BIASED: tl.constexpr,
            BIASED1: tl.constexpr, FROM: tl.constexpr, LARGEST: tl.constexpr, SIZE: tl.constexpr,
            OF_BLOCK: tl.constexpr, WHOLE: tl.constexpr, QUANTISED: tl.constexpr, K: tl.constexpr,
            RENORMALISED: tl.constexpr, SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, FACTORS: tl.constexpr,
            KINDS: tl.constexpr, KEPT: tl.constexpr, OF_GROUP: tl.constexpr, EXPERTS: tl.constexpr,
            PICKS: tl.constexpr, EACH: tl.constexpr, LEAST: tl.constexpr):
    """Grid: T, blocks. out [T, R], the router's rows first; what is quantised [T, WHOLE groups of SIZE], OF_BLOCK of
    them a block, from `given` or, where FROM says so, behind the router's norm. KINDS: groups of experts."""
    token, block = tl.program_id(0), tl.program_id(1)
    first, second = tl.cdiv(n_rows, ROWS), 0
    if PARTS1 > 0:
        second = tl.cdiv(n_more, ROWS1)
    x, out, normed = x + token * COLUMNS, out + token * width, normed + token * COLUMNS
    if block < first:
        section(x, norm, codes, scales, bias, codes1, scales1, bias1, codes2, scales2, bias2, x, out, normed, block, 0,
                end0, end1, n_rows, epsilon, COLUMNS, GROUPS, WORDS, STEP, STEPS, BITS, PARTS, NORMED, BIASED, False,
                False, ROWS, LARGEST)
        n_blocks = tl.cdiv(n_experts, ROWS)
        if block < n_blocks:
            if is_last(counters + token, n_blocks):
                chosen(out, correction, factors, ids + token * K, shares + token * K, n_experts, scaling, K,
                       RENORMALISED, SIGMOID, CORRECTED, FACTORS, KINDS, KEPT, OF_GROUP, EXPERTS, PICKS, EACH, LEAST)
    elif block >= first + second:
        own = (block - first - second) * OF_BLOCK + tl.arange(0, OF_BLOCK)
        column = own[:, None] * SIZE + tl.arange(0, SIZE)[None]
        inside = column < COLUMNS
        source = x if FROM == NORMED else given + token * COLUMNS
        value = loaded(source, norm, factor_of(source, epsilon, COLUMNS, FROM), column, inside, COLUMNS, FROM)
        if FROM == NORMED:
            tl.store(normed + column, value, mask=inside)
        if QUANTISED:
            group = token * WHOLE + own
            quantized(value, group, token * (WHOLE * SIZE) + column, bytes_, scale8, high, low, scale16, sums, True,
                      True, LARGEST)
    elif PARTS1 > 0:
        section(x, norm1, codes3, scales3, bias3, codes4, scales4, bias4, codes5, scales5, bias5, x, out + n_rows,
                normed, block - first, 0, end3, end4, n_more, epsilon1, COLUMNS, GROUPS1, WORDS1, STEP1, STEPS1, BITS1,
                PARTS1, NORMED, BIASED1, False, False, ROWS1, LARGEST)


def choose(x: Tensor, entrance: Entrance, layout: Layout | None = None, given: Tensor | None = None,
           ) -> tuple[Tensor, ...]:
    """As kernels.trunk.choose.choose; of more than two sections the further ones are launches of their own."""
    router, n_experts, choice, beside = entrance
    n_tokens, n_columns = x.shape
    readers = (router,) if beside is None else (router, beside)
    found = [(shaped(parts, n_columns), reader) for reader in readers for parts in sections(reader.matrices)]
    assert n_tokens <= MOST_TOKENS and x.is_contiguous() and x.dtype == torch.float32, (x.shape, x.dtype)
    assert len(router.matrices.parts[0][0]) == n_experts >= choice.top_k, (n_experts, choice.top_k)
    like = dict(dtype=torch.float32, device=x.device)
    out = torch.empty(n_tokens, sum(reader.matrices.rows for reader in readers), **like)
    normed, shares = torch.empty_like(x) if given is None else given, torch.empty(n_tokens, choice.top_k, **like)
    assert normed.is_contiguous() and (normed.shape, normed.dtype) == (x.shape, x.dtype), normed.shape
    ids = torch.empty(n_tokens, choice.top_k, dtype=torch.int64, device=x.device)
    made = () if layout is None else room(n_tokens, layout.padded, layout.group, x.device)
    _launch(x, found, entrance, (out, normed, *(made or [x] * 6)), ids, shares, layout, given)
    at = sum(own.ends[-1] for own, _ in found[:2])
    for own, reader in found[2:]:
        launch(x, n_columns, [own.parts], out[:, at:], reader.norm, reader.epsilon, torch.empty_like(x), None,
               NORMED.value)
        at += own.ends[-1]
    return out[:, n_experts:], normed, ids, shares, *made


def _launch(x: Tensor, found: list[tuple[Section, Reader]], entrance: Entrance, made: tuple[Tensor, ...], ids: Tensor,
            shares: Tensor, layout: Layout | None, given: Tensor | None) -> None:
    choice, (n_tokens, n_columns) = entrance.choice, x.shape
    (first, router), (second, beside), alone = found[0], found[min(1, len(found) - 1)], len(found) == 1
    for norm in (router.norm, beside.norm):
        assert norm.is_contiguous() and norm.shape == x.shape[1:], norm.shape
    size = GROUP if layout is None else layout.group
    whole = triton.cdiv(n_columns, size) if layout is None else layout.groups
    of_choice = constants(choice, entrance.n_experts)
    blocks = first.blocks + (0 if alone else second.blocks) + triton.cdiv(whole, STEP)
    _choose[(n_tokens, blocks)](
        x, router.norm, beside.norm, x if given is None else given, *first.pointers(x), *second.pointers(x), *made,
        x if choice.correction is None else choice.correction, x if choice.factors is None else choice.factors, ids,
        shares, counters(x.device), *first.ends, *second.ends, made[0].shape[1], entrance.n_experts, router.epsilon,
        beside.epsilon, choice.scaling, COLUMNS=n_columns, **first.sizes(""), **second.sizes("1", alone),
        FROM=(NORMED if given is None else PLAIN).value, LARGEST=LARGEST, SIZE=size, OF_BLOCK=STEP, WHOLE=whole,
        QUANTISED=layout is not None, **of_choice, num_warps=4)
