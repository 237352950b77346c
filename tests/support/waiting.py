"""Waiting for what another thread or process does."""
from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    """AssertionError when it does not happen in time: a time for a machine that others keep busy."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
