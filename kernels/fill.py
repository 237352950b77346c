"""Copy what is missing from far to near memory: the only file that touches far memory at decode.

Legend: E experts, I objects per expert (1 for whole sketches), P bytes of an object, M misses.
"""
from __future__ import annotations

import torch

from kernels.dispatch import twin

Tensor = torch.Tensor


@twin("kernels.gpu.fill")
def fill(far: Tensor, source: Tensor, near: Tensor, place: Tensor, have: Tensor, need: Tensor,
         misses: Tensor | None = None) -> None:
    """near[place[m], have[m]:need[m]] = far[source[m], have[m]:need[m]] for every m with have < need.

    far uint8 [E, I, P] view (any strides between objects, bytes contiguous), page-locked on a GPU machine;
    source int32 [M] = expert * I + object; near uint8 [slots + bounce, P]; place, have, need int32 [M]. A place of -1
    is skipped. misses: the list that `take` wrote; it only saves the device a look at the hits.
    """
    source, place, have, need = (table.flatten() for table in (source, place, have, need))
    wanted = (have < need) & (place >= 0)
    for low, high in _spans(have[wanted], need[wanted]):
        rows = wanted & (have == low) & (need == high)
        index = source[rows].long()
        expert, item = index // far.shape[1], index % far.shape[1]
        near[place[rows].long(), low:high] = far[expert, item, low:high].to(near.device)


def fill_through_host(far: Tensor, source: Tensor, near: Tensor, place: Tensor, have: Tensor, need: Tensor) -> None:
    """As `fill`, for far memory that the device cannot read: waits for the device, then copies on the host's side."""
    fill.reference(far, source.cpu(), near, place.cpu(), have.cpu(), need.cpu())


def _spans(have: Tensor, need: Tensor) -> list[tuple[int, int]]:
    """The few distinct (have, need) pairs: nothing, a prefix or all, on either side."""
    return sorted(set(zip(have.tolist(), need.tolist(), strict=True)))
