"""Tries a tokenizer.json in a process of its own, which can be ended: it is a downloaded program of replacements.

A few lines of it turn one character into ten thousand, or keep a pattern searching for ever, inside a library that
nobody can interrupt. What passes here makes at most some tokens of a character and some characters of a token.
"""
from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MOST_SECONDS = 10         # of the processor; the largest real one takes two
MOST_BYTES = 3 << 30
PATIENCE = 6              # times as long by the clock, on a busy machine
MOST_OF_ONE = 64          # characters that one may become; the longest that Unicode itself knows is 18
MOST_STEPS = 1024         # the same, of all replacements together
LONGEST_TOKEN = 2048      # characters
LETTERS = "".join(map(chr, range(32, 0xD800)))
TEXT = LETTERS[::9] + " the" * 100 + "a" * 300 + "!" + " " * 300 + "\n" * 300


def what_is_wrong(path: Path) -> str:
    """In words, "" for a tokenizer that can be used."""
    import psutil
    hidden = subprocess.CREATE_NO_WINDOW if sys.platform == "win32" else 0
    process = subprocess.Popen([sys.executable, "-P", __file__, str(path)], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, creationflags=hidden)
    end = time.monotonic() + PATIENCE * MOST_SECONDS
    try:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if time.monotonic() > end or watched.cpu_times().user > MOST_SECONDS:
                return f"it needs more than {MOST_SECONDS} seconds for a page of text"
            if watched.memory_info().rss > MOST_BYTES:
                return "it needs too much memory"
            time.sleep(0.01)
    except psutil.Error:  # it has just ended
        pass
    finally:
        process.kill()
        said = process.communicate()[0].decode(errors="replace")
    return said.strip() if process.returncode == 0 else "it is damaged"


def _tried(path: str) -> str:
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(path)
    parts = [part for part in (tokenizer.normalizer, tokenizer.decoder) if part]
    growth = 1.0
    for step in (step for part in parts for step in _replacements(json.loads(part.__getstate__()))):
        growth *= step
        if step > MOST_OF_ONE or growth > MOST_STEPS:
            return "it makes thousands of characters of one"
    if tokenizer.normalizer and max(len(tokenizer.normalizer.normalize_str(one)) for one in LETTERS) > MOST_OF_ONE:
        return "it makes many characters of one"
    if max(map(len, tokenizer.get_vocab()), default=0) > LONGEST_TOKEN:
        return f"it has tokens of more than {LONGEST_TOKEN:,} characters"
    ids = tokenizer.encode(TEXT).ids
    if max(len(ids), len(tokenizer.decode(ids))) > MOST_OF_ONE * len(TEXT) or len(tokenizer.encode("")) > MOST_OF_ONE:
        return "it makes a book of a page"
    return ""


def _replacements(part) -> Iterator[float]:
    """How many times longer each replacement makes what it finds; 1 where it is shorter."""
    if isinstance(part, list):
        for inner in part:
            yield from _replacements(inner)
    elif isinstance(part, dict):
        pattern = part.get("pattern") or {}
        found = len(pattern.get("String") or "x") if isinstance(pattern, dict) else 1
        for key in ("content", "replacement", "prepend"):
            yield max(1.0, len(str(part.get(key, ""))) / found)
        for inner in part.values():
            if isinstance(inner, list | dict):
                yield from _replacements(inner)


if __name__ == "__main__":
    print(_tried(sys.argv[1]))
