"""Device version of kernels/select.py: find the key of the K-th best, then write the chosen in order of their index.

`score` has counted the upper 12 bits of the keys, so the bin that holds the K-th key is known at once. Up to 4,096
scores, or twice as many in two tiles, one block per token holds them all and finds the lower 12 bits by bisection.
Above, one kernel counts the lower bits of that bin's keys and a second one chooses, several blocks each; a block
counts what lies before it by itself. Both budgets (refined, total) are found together. Counts are integers, so the
outcome depends on no order.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.planes import device_value
from kernels.select import BINS, FLOE, KEY_SHIFT, REFINED

Tensor = torch.Tensor

LARGEST_TILE = 4096     # scores of a tile; twice as many spill registers and fill the shared memory of sm_75
SHIFT = tl.constexpr(KEY_SHIFT)
BELOW = tl.constexpr(12)            # bits of a key below its bin


@triton.jit
def _keys(scores, at, n):
    """24-bit keys of scores[at]; -1 beyond the end."""
    bits = tl.load(scores + at, mask=at < n, other=0).to(tl.int32, bitcast=True)
    return tl.where(at < n, bits >> SHIFT, -1)


@triton.jit
def bin_of(counts, wanted, BINS: tl.constexpr):
    """Where the wanted-th best lies: counts int32 [BINS] -> its bin, how many of that bin are wanted."""
    from_here_up = tl.cumsum(counts, 0, reverse=True)
    whole = from_here_up < wanted
    return BINS - 1 - tl.sum(whole.to(tl.int32), 0), wanted - tl.max(tl.where(whole, from_here_up, 0), 0)


@triton.jit
def _two_sums(a, b):
    """Sums of two boolean tensors of one tile, in one reduction: at most 2**12 each."""
    both = tl.sum(a.to(tl.int32) + (b.to(tl.int32) << 16), 0)
    return both & 0xFFFF, both >> 16


@triton.jit
def _counts(keys, more, low, low2, TWO: tl.constexpr):
    """How many keys of one tile, or of TWO, are at least low, and low2: one reduction."""
    flags = (keys >= low).to(tl.int32) + ((keys >= low2).to(tl.int32) << 16)
    if TWO:
        flags += (more >= low).to(tl.int32) + ((more >= low2).to(tl.int32) << 16)
    both = tl.sum(flags, 0)
    return both & 0xFFFF, both >> 16


@triton.jit
def _bisect(keys, more, low, low2, n, n2, ROUNDS: tl.constexpr, TWO: tl.constexpr):
    """Largest t >= low with at least n keys >= t, setting the lower ROUNDS bits of low, for two budgets at once.

    -> t and how many keys equal to it are wanted, twice.
    """
    for i in tl.static_range(ROUNDS):
        bit = 1 << (ROUNDS - 1 - i)
        count, count2 = _counts(keys, more, low | bit, low2 | bit, TWO)
        low = tl.where(count >= n, low | bit, low)
        low2 = tl.where(count2 >= n2, low2 | bit, low2)
    count, count2 = _counts(keys, more, low + 1, low2 + 1, TWO)
    return low, n - count, low2, n2 - count2


@triton.jit
def _kept(keys, key, ties, n_above, n_equal):
    """Which keys of a tile are kept, their positions in the list, and how many are kept up to its end.

    n_above, n_equal: counted in earlier tiles. ties < 0: of a histogram that was not this step's.
    """
    ties = tl.maximum(ties, 0)
    above = keys > key
    equal = keys == key
    flags = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(flags, 0) - flags
    equal_before = n_equal + (before >> 16)
    tile_above, tile_equal = _two_sums(above, equal)
    end = n_above + tile_above + tl.minimum(n_equal + tile_equal, ties)
    return above | (equal & (equal_before < ties)), n_above + (before & 0xFFFF) + tl.minimum(equal_before, ties), end


@triton.jit
def _count(scores, histogram, n, BINS: tl.constexpr, TILE: tl.constexpr):
    token = tl.program_id(0)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys = _keys(scores + token * n, at, n)
    tl.atomic_add(histogram + token * BINS + (keys >> BELOW), 1, mask=at < n, sem="relaxed")


@triton.jit
def _count_lower(scores, n_refined, n_total, histogram, found, lower, n, BINS: tl.constexpr, TILE: tl.constexpr):
    """lower int32 [T, 2, BINS] += counts of the lower bits in both budgets' bins; found [T, 2, 2]: bin, wanted."""
    token = tl.program_id(0)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys = _keys(scores + token * n, at, n)
    counts = tl.load(histogram + token * BINS + tl.arange(0, BINS))
    for which in tl.static_range(2):
        wanted = tl.load(n_total) if which == 0 else tl.load(n_refined)
        bin, rest = bin_of(counts, tl.minimum(wanted, n), BINS)
        inside = (keys >> BELOW) == bin
        tl.atomic_add(lower + (token * 2 + which) * BINS + (keys & (BINS - 1)), 1, mask=inside, sem="relaxed")
        tl.store(found + token * 4 + which * 2, bin)
        tl.store(found + token * 4 + which * 2 + 1, rest)


@triton.jit
def _lower(which: tl.constexpr, found, lower, BINS: tl.constexpr):
    """What _count_lower left for one budget -> key of the last one wanted, how many equal to it are wanted."""
    low, ties = bin_of(tl.load(lower + which * BINS + tl.arange(0, BINS)), tl.load(found + which * 2 + 1), BINS)
    return (tl.load(found + which * 2) << BELOW) | low, ties


@triton.jit
def _thresholds(total, refined, keys, more, histogram, found, lower, BINS: tl.constexpr, MANY: tl.constexpr,
                COUNTED: tl.constexpr, TWO: tl.constexpr):
    """-> key of the last one wanted and how many equal to it are wanted; for the total, then for the refined."""
    if MANY:
        key, ties = _lower(0, found, lower, BINS)
        key2, ties2 = _lower(1, found, lower, BINS)
        return key, ties, key2, ties2
    if COUNTED:
        counts = tl.load(histogram + tl.arange(0, BINS))
        bin, _ = bin_of(counts, total, BINS)
        bin2, _ = bin_of(counts, refined, BINS)
        return _bisect(keys, more, bin << BELOW, bin2 << BELOW, total, refined, 12, TWO)
    return _bisect(keys, more, total * 0, refined * 0, total, refined, 24, TWO)


@triton.jit
def _list(keys, at, key, ties, key2, ties2, n_above, n_equal, n_equal2, neurons, fidelity, n, capacity,
          REFINED: tl.constexpr):
    """Writes what is kept of a tile -> how many are kept up to its end."""
    kept, position, end = _kept(keys, key, ties, n_above, n_equal)
    better, _, _ = _kept(keys, key2, ties2, 0, n_equal2)
    kept = kept & (position < capacity) & (at < n)
    tl.store(neurons + position, at, mask=kept)
    tl.store(fidelity + position, tl.where(better, REFINED, 0).to(tl.int8), mask=kept)
    return end


@triton.jit
def _end(end, histogram, neurons, fidelity, capacity, BINS: tl.constexpr, COUNTED: tl.constexpr, TILE: tl.constexpr):
    """Behind the last of a list: nothing; and the counts are zero again."""
    for start in range(end, capacity, TILE):  # not from `total` on: a stale histogram keeps another number
        rest = start + tl.arange(0, TILE)
        tl.store(neurons + rest, -1, mask=rest < capacity)
        tl.store(fidelity + rest, 0, mask=rest < capacity)
    if COUNTED:
        tl.debug_barrier()
        tl.store(histogram + tl.arange(0, BINS), 0)


@triton.jit
def selected(scores, total, refined, histogram, neurons, fidelity, n, capacity, BINS: tl.constexpr,
             COUNTED: tl.constexpr, TWO: tl.constexpr, REFINED: tl.constexpr, TILE: tl.constexpr):
    """Of one block: `select` among the scores of one token, one tile or TWO."""
    at = tl.arange(0, TILE)
    keys = _keys(scores, at, n)
    more = keys
    if TWO:
        more = _keys(scores, at + TILE, n)
    key, ties, key2, ties2 = _thresholds(total, refined, keys, more, histogram, histogram, histogram, BINS, False,
                                         COUNTED, TWO)
    none = total * 0
    end = _list(keys, at, key, ties, key2, ties2, none, none, none, neurons, fidelity, n, capacity, REFINED)
    if TWO:
        n_above, n_equal = _two_sums(keys > key, keys == key)
        n_equal2 = tl.sum((keys == key2).to(tl.int32), 0)
        end = _list(more, at + TILE, key, ties, key2, ties2, n_above, n_equal, n_equal2, neurons, fidelity, n, capacity,
                    REFINED)
    _end(end, histogram, neurons, fidelity, capacity, BINS, COUNTED, TILE)


@triton.jit
def count_lower(scores, tile, total, refined, histogram, lower, n, BINS: tl.constexpr, TILE: tl.constexpr):
    """lower int32 [2, BINS] += counts of a tile's lower bits in the bins of both budgets."""
    keys = _keys(scores, tile * TILE + tl.arange(0, TILE), n)
    counts = tl.load(histogram + tl.arange(0, BINS))
    for which in tl.static_range(2):
        bin, _ = bin_of(counts, total if which == 0 else refined, BINS)
        tl.atomic_add(lower + which * BINS + (keys & (BINS - 1)), 1, mask=(keys >> BELOW) == bin, sem="relaxed")


@triton.jit
def _last_key(wanted, histogram, lower, BINS: tl.constexpr):
    """From both counts -> key of the last one wanted, how many equal to it are wanted."""
    bin, rest = bin_of(tl.load(histogram + tl.arange(0, BINS)), wanted, BINS)
    low, ties = bin_of(tl.load(lower + tl.arange(0, BINS), cache_modifier=".cg"), rest, BINS)
    return (bin << BELOW) | low, ties


@triton.jit
def selected_of_many(scores, total, refined, histogram, lower, neurons, fidelity, n, capacity, BINS: tl.constexpr,
                     REFINED: tl.constexpr, TILE: tl.constexpr):
    """Of one block, as `selected`, tile after tile, from what `count_lower` counted of all of them; lower is zero
    again."""
    key, ties = _last_key(total, histogram, lower, BINS)
    key2, ties2 = _last_key(refined, histogram, lower + BINS, BINS)
    n_above = total * 0
    n_equal = total * 0
    n_equal2 = total * 0
    end = total * 0
    for start in range(0, n, TILE):
        at = start + tl.arange(0, TILE)
        keys = _keys(scores, at, n)
        end = _list(keys, at, key, ties, key2, ties2, n_above, n_equal, n_equal2, neurons, fidelity, n, capacity,
                    REFINED)
        above, equal = _two_sums(keys > key, keys == key)
        n_above += above
        n_equal += equal
        n_equal2 += tl.sum((keys == key2).to(tl.int32), 0)
    _end(end, histogram, neurons, fidelity, capacity, BINS, True, TILE)
    tl.store(lower + tl.arange(0, BINS), 0)
    tl.store(lower + BINS + tl.arange(0, BINS), 0)


@triton.jit
def _select(scores, n_refined, n_total, histogram, found, lower, neurons, fidelity, n, capacity, BINS: tl.constexpr,
            MANY: tl.constexpr, COUNTED: tl.constexpr, TWO: tl.constexpr, REFINED: tl.constexpr, TILE: tl.constexpr):
    token = tl.program_id(0)
    scores += token * n
    neurons += token * capacity
    fidelity += token * capacity
    histogram += token * BINS
    total = tl.minimum(tl.load(n_total), n)
    refined = tl.minimum(tl.load(n_refined), n)
    if not MANY:
        selected(scores, total, refined, histogram, neurons, fidelity, n, capacity, BINS, COUNTED, TWO, REFINED, TILE)
    else:
        at = tl.program_id(1) * TILE + tl.arange(0, TILE)
        keys = _keys(scores, at, n)
        key, ties, key2, ties2 = _thresholds(total, refined, keys, keys, histogram, found + token * 4,
                                             lower + token * 2 * BINS, BINS, True, COUNTED, False)
        n_above = total * 0
        n_equal = total * 0
        n_equal2 = total * 0
        for block in range(tl.program_id(1)):
            earlier = _keys(scores, block * TILE + tl.arange(0, TILE), n)
            above, equal = _two_sums(earlier > key, earlier == key)
            n_above += above
            n_equal += equal
            n_equal2 += tl.sum((earlier == key2).to(tl.int32), 0)
        end = _list(keys, at, key, ties, key2, ties2, n_above, n_equal, n_equal2, neurons, fidelity, n, capacity,
                    REFINED)
        if tl.program_id(1) == tl.num_programs(1) - 1:
            _end(end, histogram, neurons, fidelity, capacity, BINS, COUNTED, TILE)


@triton.jit
def _select_above(scores, threshold, neurons, n, capacity, TILE: tl.constexpr):
    token = tl.program_id(0)
    scores += token * n
    threshold += token * n
    n_before = 0
    for block in range(tl.program_id(1)):
        at = block * TILE + tl.arange(0, TILE)
        below = tl.load(scores + at) <= tl.load(threshold + at)
        n_before += tl.sum(1 - below.to(tl.int32), 0)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    below = tl.load(scores + at, mask=at < n, other=0) <= tl.load(threshold + at, mask=at < n, other=0)
    above = 1 - below.to(tl.int32)  # so that NaN, of which nothing is true, is above
    position = n_before + tl.cumsum(above, 0) - above
    tl.store(neurons + token * capacity + position, at, mask=(above > 0) & (position < capacity))
    if tl.program_id(1) == tl.num_programs(1) - 1:
        for start in range(n_before + tl.sum(above, 0), capacity, TILE):
            rest = start + tl.arange(0, TILE)
            tl.store(neurons + token * capacity + rest, -1, mask=rest < capacity)


def select(scores: Tensor, n_refined: int | Tensor, n_total: int | Tensor, capacity: int | None = None,
           histogram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.select.select."""
    n_tokens, n = _checked(scores)
    assert histogram is None or (histogram.shape == (n_tokens, BINS) and histogram.is_contiguous())
    capacity = n_total if capacity is None else capacity
    budgets = device_value(n_refined, scores.device), device_value(n_total, scores.device)
    neurons = torch.empty(n_tokens, capacity, dtype=torch.int32, device=scores.device)
    fidelity = torch.empty(n_tokens, capacity, dtype=torch.int8, device=scores.device)
    tile = min(triton.next_power_of_2(max(n, 128)), LARGEST_TILE)
    two = tile < n <= 2 * tile
    grid = (n_tokens, 1 if two else triton.cdiv(n, tile))
    many = grid[1] > 1
    found = lower = neurons
    if many:
        if histogram is None:
            histogram = torch.zeros(n_tokens, BINS, dtype=torch.int32, device=scores.device)
            _count[grid](scores, histogram, n, BINS=BINS, TILE=tile, num_warps=8)
        found = torch.empty(n_tokens, 2, 2, dtype=torch.int32, device=scores.device)
        lower = torch.zeros(n_tokens, 2, BINS, dtype=torch.int32, device=scores.device)
        _count_lower[grid](scores, *budgets, histogram, found, lower, n, BINS=BINS, TILE=tile, num_warps=warps_of(tile))
    _select[grid](scores, *budgets, neurons if histogram is None else histogram, found, lower, neurons, fidelity, n,
                  capacity, BINS=BINS, MANY=many, COUNTED=histogram is not None, TWO=two, REFINED=REFINED, TILE=tile,
                  num_warps=warps_of(tile))
    return neurons, fidelity


def select_above(scores: Tensor, threshold: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.select.select_above; without a capacity there is room for every neuron."""
    n_tokens, n = _checked(scores)
    assert threshold.shape == scores.shape and threshold.is_contiguous() and threshold.dtype == torch.float32
    capacity = n if capacity is None else capacity
    neurons = torch.empty(n_tokens, capacity, dtype=torch.int32, device=scores.device)
    tile = min(triton.next_power_of_2(max(n, 128)), LARGEST_TILE // 2)
    _select_above[(n_tokens, triton.cdiv(n, tile))](scores, threshold, neurons, n, capacity, TILE=tile,
                                                    num_warps=warps_of(tile))
    return neurons, torch.full_like(neurons, FLOE, dtype=torch.int8)


def _checked(scores: Tensor) -> tuple[int, int]:
    assert scores.dtype == torch.float32 and scores.is_contiguous() and scores.shape[1] < 1 << 20, scores.shape
    return scores.shape


def warps_of(tile: int) -> int:
    return max(4, tile // 256)
