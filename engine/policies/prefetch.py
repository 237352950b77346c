"""What to fetch ahead of demand, and whether that pays."""
from __future__ import annotations

from torch import Tensor

WINDOW = 16             # tokens between two looks
FULL, ROOMY = 0.8, 0.5  # share of the link's time in use at which fetching ahead ends, and begins again


def has_headroom(before: bool, link_bytes: int, seconds: float, bytes_per_second: float) -> bool:
    """Whether the link has time to spare beside what is demanded; only then does fetching ahead pay.

    link_bytes: what crossed the link in `seconds`, fetched ahead or demanded. before: the last answer.
    """
    return link_bytes < (FULL if before else ROOMY) * seconds * bytes_per_second


def next_experts(x: Tensor, router_weight: Tensor, top_k: int) -> Tensor:
    """A guess: what the next layer's router [E, H] picks on this layer's input x [T, H]; ids int64 [1, k] of the last
    token's."""
    return (x[-1:] @ router_weight.T).topk(top_k).indices
