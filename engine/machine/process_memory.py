"""What this process itself holds of main and video memory, and how it gives back what was freed."""
from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil

CUDA_CONTEXT_BYTES = 400 * 10**6  # of video memory: the driver's context and the loaded kernels


def own_bytes() -> int:
    """Memory that this process has for itself, without the files that are mapped into it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss


def own_vram_bytes() -> int:
    """Video memory that this process holds, the driver's context included."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return torch.cuda.memory_reserved() + CUDA_CONTEXT_BYTES


def return_freed() -> None:
    """Give system and card what has been freed: glibc keeps it (550 MB beside a trunk of 550 MB were seen), and so does
    torch's allocator with a card's, which the driver then calls used."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a card that was lost
            torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library, which decides for itself
