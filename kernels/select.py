"""The K best neurons of a layer, exactly: by the top 24 bits of the score, ties by index, listed in neuron order.

Neuron order makes every later sum independent of what happens to be cached. A score of NaN counts as the largest.
Legend: T tokens, N = k*I scores.
"""
from __future__ import annotations

import torch

from kernels.dispatch import twin

Tensor = torch.Tensor

DOWN_ONLY, REFINED, FLOE = 0, 1, 2  # fidelity of a chosen neuron: which bits of gate and up its value uses
KEY_SHIFT = 7        # a key is a non-negative float32 without its sign and its lowest 7 bits: 24 bits
BINS = 4096          # of the histogram: the upper 12 bits of the key
BIN_SHIFT = KEY_SHIFT + 12


def keys(scores: Tensor) -> Tensor:
    """float32 >= 0 -> int64: 24-bit key above, inverted index below, so that all keys differ."""
    n = scores.shape[1]
    top = scores.contiguous().view(torch.int32).long() >> KEY_SHIFT
    return top << 32 | torch.arange(n - 1, -1, -1, device=scores.device)


def histogram_of(scores: Tensor) -> Tensor:
    """float32 [T, N] >= 0 -> int32 [T, BINS]: how many scores share the upper 12 bits of their keys."""
    bins = scores.contiguous().view(torch.int32).long() >> BIN_SHIFT
    return torch.stack([torch.bincount(row, minlength=BINS) for row in bins]).int()


@twin("kernels.gpu.select", "kernels.cpu.select")
def select(scores: Tensor, n_refined: int | Tensor, n_total: int | Tensor, capacity: int | None = None,
           histogram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> neurons int32 [T, capacity] ascending, then -1; fidelity int8 [T, capacity] (REFINED for the n_refined best).

    scores float32 [T, N] >= 0; 0 <= n_refined <= n_total <= capacity <= N. Budgets are ints, or int32 tensors of one
    element so that a captured graph can be told another level; capacity is n_total where that is an int.
    histogram: what `score` counted; it is zero again afterwards, ready for the next layer.
    """
    n_refined, n_total = int(n_refined), int(n_total)
    capacity = n_total if capacity is None else capacity
    assert 0 <= n_refined <= n_total <= capacity <= scores.shape[1], (n_refined, n_total, capacity, scores.shape)
    best = keys(scores).topk(n_total, dim=1).indices              # descending score
    fidelity = torch.zeros_like(best, dtype=torch.int8)
    fidelity[:, :n_refined] = REFINED
    order = best.argsort(dim=1)
    if histogram is not None:
        histogram.zero_()
    return (_padded(best.gather(1, order).int(), capacity, -1), _padded(fidelity.gather(1, order), capacity, 0))


@twin("kernels.gpu.select", "kernels.cpu.select")
def select_above(scores: Tensor, threshold: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """FloE's rule: every neuron whose score is above its expert's threshold (NaN is), the first `capacity` of them.

    scores, threshold float32 [T, N] -> neurons int32 [T, K] ascending, then -1; fidelity int8 [T, K], all FLOE. K is
    capacity; without one it is the number kept, which only a single token on a CPU may ask for.
    """
    assert capacity is not None or len(scores) == 1, "one token at a time: the number kept differs between tokens"
    rows = [row.nonzero()[:, 0].int() for row in ~(scores <= threshold)]
    if capacity is None:
        return rows[0][None], torch.full((1, len(rows[0])), FLOE, dtype=torch.int8, device=scores.device)
    neurons = torch.cat([_padded(row[None, :capacity], capacity, -1) for row in rows])
    return neurons, torch.full_like(neurons, FLOE, dtype=torch.int8)


def _padded(rows: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)
