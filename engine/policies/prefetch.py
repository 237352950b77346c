"""Whether fetching ahead pays: only while the link has time to spare beside what is demanded. A policy; no torch."""
from __future__ import annotations

WINDOW = 16             # tokens between two looks
FULL, ROOMY = 0.8, 0.5  # share of the link's time in use at which fetching ahead ends, and begins again


def has_headroom(before: bool, link_bytes: int, seconds: float, bytes_per_second: float) -> bool:
    """link_bytes: what crossed the link in `seconds`, fetched ahead or demanded. before: the last answer."""
    return link_bytes < (FULL if before else ROOMY) * seconds * bytes_per_second
