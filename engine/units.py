"""Sizes and speeds as people write and read them. Knows nothing else."""
from __future__ import annotations

import re

from engine.core import UserError

_FACTORS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
            "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30}


def parse_bytes(text: str | int) -> int:
    """Bytes from 11GiB, 12.5 GB, 12GB/s or a plain number. UserError when it is none of these."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)(?:/s)?\s*", str(text).lower())
    if not found or found[2] not in _FACTORS:
        raise UserError(f"{str(text)!r} is not a size; write it like 11GiB, 12.5GB or a number of bytes.")
    return int(float(found[1]) * _FACTORS[found[2]])


def size(n_bytes: float) -> str:
    """12.3 GB or 456 MB (1 GB = 1e9 bytes)."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def rate(per_second: float) -> str:
    """63, or 1.5 when it is small; what would be written as zero is not."""
    if per_second < 0.05:
        return "less than 0.1" if per_second else "0"
    return f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.1f}"
