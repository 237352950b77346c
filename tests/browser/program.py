"""The program as `python -m app` runs it, but while the file that ENDLESS names is there it reads slowly, and an answer
does not end.

The demonstration answers in two or three seconds; a browser that shares its cores may need longer for a click.
"""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from app.__main__ import main
from engine.decode.decoder import HostDecoder
from engine.decode.prefix_cache import DynamicPrefix
from engine.decode.step import Drawn

ENDLESS = "FLOE_TEST_ENDLESS"
A_TOKEN, BEHIND_THE_END = 0.05, 0.5  # seconds: slow enough for a hand, and the context does not run full
A_CHUNK = 4.0                        # seconds before tokens are read: Stop is pressed within them
_tokens, _feed = HostDecoder.tokens, DynamicPrefix.feed


def _endless(decoder: HostDecoder, ids, sampling, recommended, ends, limit, around) -> Iterator[Drawn]:
    """The decoder's tokens; where it would end, its last one again and again."""
    wanted, last = Path(os.environ[ENDLESS]), None
    for drawn in _tokens(decoder, ids, sampling, recommended, ends, limit, around):
        while last and drawn.token in ends and wanted.exists():
            time.sleep(BEHIND_THE_END)
            yield replace(last, ended=False)
        if wanted.exists():
            time.sleep(A_TOKEN)
        yield drawn
        last = drawn


def _slowly(prefix: DynamicPrefix, ids: list[int]):
    if len(ids) > 1 and Path(os.environ[ENDLESS]).exists():
        time.sleep(A_CHUNK)
    return _feed(prefix, ids)


if __name__ == "__main__":
    HostDecoder.tokens, DynamicPrefix.feed = _endless, _slowly
    sys.exit(main())
