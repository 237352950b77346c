"""Device version of `choose_neurons` and `look_ahead` of kernels/resolve.py: what is chosen is looked up, and what is
missing copied, by the launch that chooses it.

Blocks draw the pieces of the choice (tiles of scores, rows of a router); the one that finishes the last piece chooses
and looks up, the others wait for it, and all of them copy (kernels/gpu/turns.py).
More scores than two tiles are listed by one block all the same: sums before it would make the others wait once more.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.fill import COPYING_WARPS, copied, copying
from kernels.gpu.pool import EXPERTS, LARGEST_TILE, NEURONS, taken
from kernels.gpu.select import LARGEST_TILE as TILE
from kernels.gpu.select import count_lower, selected, selected_of_many, warps_of
from kernels.gpu.turns import draw, finish, publish
from kernels.layout import Layout
from kernels.pool import Pool
from kernels.resolve import Link, Resolved, new_resolved
from kernels.select import BINS, REFINED

Tensor = torch.Tensor

ROUTER_ROWS, ROUTER_COLUMNS, ROUTER_WARPS = 4, 512, 4   # of a router that a block multiplies at a time


@triton.jit
def _best(logits, chosen, n_experts, K: tl.constexpr, ALL: tl.constexpr):
    """The K largest of logits -> chosen int32 [K], the largest first, of equals the first; ALL: a power of two."""
    expert = tl.arange(0, ALL)
    there = expert < n_experts
    value = tl.load(logits + expert, mask=there, other=0, cache_modifier=".cg")
    # What is no number comes first; what is smaller than any stays ahead of what is taken.
    order = tl.where(value == value, tl.maximum(value, -3.4028234663852886e38), float("inf"))
    order = tl.where(there, order, float("-inf"))
    for i in tl.static_range(K):
        best = tl.argmax(order, axis=0, tie_break_left=True)
        tl.store(chosen + i, best)
        order = tl.where(expert == best, float("-inf"), order)


@triton.jit(do_not_specialize=["first", "n_bytes"])
def _look_ahead(x, router, logits, chosen, slot_of, object_of, stamp, held, ahead_of, free, n_free, clock, place, have,
                misses, source, need, counts, done, most, far, near, turn, n_experts, hidden, first, n_bytes, n_slots,
                far_expert16, far_object16, near16, K: tl.constexpr, ALL: tl.constexpr, TILE: tl.constexpr,
                OF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OBJECTS: tl.constexpr,
                CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr, COPIES: tl.constexpr):
    """Grid: any number of blocks. x [hidden]; router [n_experts, hidden]; logits and chosen are written."""
    pieces = tl.cdiv(n_experts, ROWS)
    piece = draw(turn)
    while piece < pieces:
        row = piece * ROWS + tl.arange(0, ROWS)
        there = (row < n_experts)[:, None]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, hidden, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < hidden
            weight = tl.load(router + row[:, None] * hidden + column[None], mask=there & inside[None], other=0)
            total += weight * tl.load(x + column, mask=inside, other=0)[None]
        tl.store(logits + row, tl.sum(total, axis=1), mask=row < n_experts)
        if finish(turn) == pieces - 1:
            _best(logits, chosen, n_experts, K, ALL)
            tl.debug_barrier()
            taken(chosen, chosen, chosen, chosen, slot_of, object_of, stamp, held, ahead_of, free, n_free, clock, place,
                  have, misses, source, need, counts, done, most, first, n_bytes, K, n_slots, OF, 1, 1, 0, 0, 1, True,
                  True, TILE)
            publish(turn)
        piece = draw(turn)
    copied(turn, far, source, near, place, have, need, misses, piece - pieces, far_expert16, far_object16, near16,
           OBJECTS, CHUNKS, CHUNK, ENTRIES)


def look_ahead(x: Tensor, router: Tensor, top_k: int, pool: Pool, first: int, n_bytes: int, clock: Tensor,
               counts: Tensor, done: Tensor, most_ahead: Tensor, link: Link) -> Resolved:
    """As kernels.resolve.look_ahead."""
    (n_experts, hidden), device = router.shape, x.device
    assert x.dtype == router.dtype == torch.float32 and x.is_contiguous() and router.is_contiguous()
    assert x.shape[1] == hidden and top_k <= min(n_experts, LARGEST_TILE) and clock.dtype == torch.int32
    assert counts.dtype == torch.int64 and counts.is_contiguous() and done.dtype == torch.bool, (counts, done)
    logits = torch.empty(n_experts, dtype=torch.float32, device=device)
    chosen = torch.empty(top_k, dtype=torch.int32, device=device)
    found = new_resolved((1, top_k), device)
    source, place, have, need, misses = found
    (*tables, expert16, object16, near16), copies = copying(link, x, ROUTER_WARPS)
    _look_ahead[(COPYING_WARPS // ROUTER_WARPS,)](
        x[-1], router, logits, chosen, *pool, clock, place, have, misses, source, need, counts, done.view(torch.uint8),
        most_ahead, *tables, n_experts, hidden, first, n_bytes, len(pool.object_of), expert16, object16, near16,
        K=top_k, ALL=triton.next_power_of_2(n_experts), TILE=triton.next_power_of_2(max(top_k, 32)), OF=EXPERTS,
        ROWS=ROUTER_ROWS, COLUMNS=ROUTER_COLUMNS, num_warps=ROUTER_WARPS, **copies)
    return found


@triton.jit(do_not_specialize=["first"])
def _choose_neurons(scores, n_refined, n_total, histogram, neurons, fidelity, ids, slot_of, object_of, stamp, held,
                    ahead_of, free, n_free, clock, place, have, misses, source, need, counts, done, far, near, turn, n,
                    capacity, first, n_slots, far_expert16, far_object16, near16, BINS: tl.constexpr,
                    MANY: tl.constexpr, TWO: tl.constexpr, REFINED: tl.constexpr, TILE: tl.constexpr,
                    LIST: tl.constexpr, OF: tl.constexpr, ROUTED: tl.constexpr, EACH: tl.constexpr,
                    PREFIX: tl.constexpr, WHOLE: tl.constexpr, OBJECTS: tl.constexpr, CHUNKS: tl.constexpr,
                    CHUNK: tl.constexpr, ENTRIES: tl.constexpr, COPIES: tl.constexpr):
    """Grid: any number of blocks. One token; histogram int32 [3, BINS], the last two for lower bits. Up to two tiles of
    scores are one piece, of MANY each is one."""
    total = tl.minimum(tl.load(n_total), n)
    refined = tl.minimum(tl.load(n_refined), n)
    lower = histogram + BINS
    pieces = 1
    if MANY:
        pieces = tl.cdiv(n, TILE)
    piece = draw(turn)
    while piece < pieces:
        if MANY:
            count_lower(scores, piece, total, refined, histogram, lower, n, BINS, TILE)
        if finish(turn) == pieces - 1:
            if MANY:
                selected_of_many(scores, total, refined, histogram, lower, neurons, fidelity, n, capacity, BINS,
                                 REFINED, TILE)
            else:
                selected(scores, total, refined, histogram, neurons, fidelity, n, capacity, BINS, True, TWO, REFINED,
                         TILE)
            tl.debug_barrier()
            taken(neurons, neurons, fidelity, ids, slot_of, object_of, stamp, held, ahead_of, free, n_free, clock,
                  place, have, misses, source, need, counts, done, clock, first, 0, capacity, n_slots, OF, ROUTED, EACH,
                  PREFIX, WHOLE, 1, False, True, LIST)
            publish(turn)
        piece = draw(turn)
    copied(turn, far, source, near, place, have, need, misses, piece - pieces, far_expert16, far_object16, near16,
           OBJECTS, CHUNKS, CHUNK, ENTRIES)


def choose_neurons(scores: Tensor, n_refined: Tensor, n_total: Tensor, capacity: int, histogram: Tensor, ids: Tensor,
                   pool: Pool, first: int, layout: Layout, clock: Tensor, counts: Tensor, done: Tensor, link: Link,
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """As kernels.resolve.choose_neurons."""
    (n_tokens, n), device = scores.shape, scores.device
    assert n_tokens == 1 and scores.dtype == torch.float32 and scores.is_contiguous() and n < 1 << 20, scores.shape
    assert histogram.shape == (3, BINS) and histogram.is_contiguous() and ids.is_contiguous() and ids.shape[0] == 1
    assert counts.dtype == torch.int64 and counts.is_contiguous() and done.dtype == torch.bool, (counts, done)
    assert capacity * layout.record < 2**31, "a layer's bytes are summed in 32 bits"
    neurons = torch.empty(1, capacity, dtype=torch.int32, device=device)
    fidelity, found = torch.empty_like(neurons, dtype=torch.int8), new_resolved((1, capacity), device)
    source, place, have, need, misses = found
    tile = min(triton.next_power_of_2(max(n, 128)), TILE)
    warps = warps_of(tile)
    (*tables, expert16, object16, near16), copies = copying(link, scores, warps)
    _choose_neurons[(COPYING_WARPS // warps,)](
        scores, n_refined, n_total, histogram, neurons, fidelity, ids, *pool, clock, place, have, misses, source, need,
        counts, done.view(torch.uint8), *tables, n, capacity, first, len(pool.object_of), expert16, object16, near16,
        BINS=BINS, MANY=n > 2 * tile, TWO=tile < n <= 2 * tile, REFINED=REFINED, TILE=tile,
        LIST=min(triton.next_power_of_2(max(capacity, 32)), LARGEST_TILE), OF=NEURONS, ROUTED=ids.shape[1],
        EACH=layout.neurons, PREFIX=layout.prefix, WHOLE=layout.record, num_warps=warps, **copies)
    return neurons, fidelity, place
