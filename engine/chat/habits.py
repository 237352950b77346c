"""What a person's answers took, kept from one day to the next: of each answer its expert map beside the direction of
what was asked. A text that is being written is likely to need what the nearest of them took (fMoE/FineMoE, arXiv
2502.05370, with an answer in place of a token). It only says what comes near, so it never changes an output.

Legend: n answers, L layers, E experts, H hidden.
"""
from __future__ import annotations

import os
import threading
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from engine.core import Picks

MOST = 256      # answers: of Qwen3-30B-A3B 2.6 MB
NEAREST = 5     # of them that are asked together
FULL = 255      # what the expert that an answer picked most often counts


class Habits:
    """The store in one file, of one model; any thread may ask. keys float16 [n, H], each of length 1; maps uint8
    [n, L, E]. A file that is damaged, or of another model, is none; one that cannot be written is only missing the
    next time. path: None for memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self._lock = path, threading.Lock()
        self._keys, self._maps = _read(path)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: np.ndarray, picks: Picks) -> None:
        """key float32 [H]. Where there is no room the answer that was asked most alike makes it. An answer that was
        stopped before its first token picked nothing, and teaches nothing."""
        if not any(picks.counts):
            return
        counts = np.array(picks.counts, np.float32).reshape(picks.layers, picks.experts)
        key, found = _unit(key), np.ceil(counts * FULL / max(1, counts.max())).astype(np.uint8)
        with self._lock:
            keys, maps = self._keys, self._maps
            if not self._fits(key, found.shape):
                keys, maps = np.empty((0, len(key)), np.float16), np.empty((0, *found.shape), np.uint8)
            if len(keys) == MOST:
                rest = np.arange(MOST) != (keys.astype(np.float32) @ key).argmax()
                keys, maps = keys[rest], maps[rest]
            self._keys = np.concatenate((keys, key[None].astype(np.float16)))
            self._maps = np.concatenate((maps, found[None]))
            with suppress(OSError):
                self._write(self.path)

    def likely(self, key: np.ndarray, layers: int, experts: int) -> Picks | None:
        """What the answers to the nearest questions took together; None where nothing was learned of such a model."""
        with self._lock:
            if not len(self._keys) or not self._fits(key, (layers, experts)):
                return None
            nearest = np.argsort(-(self._keys.astype(np.float32) @ _unit(key)), kind="stable")[:NEAREST]
            each = self._maps[nearest].astype(np.float32)
        shares = (FULL * each / each.sum((1, 2), keepdims=True)).sum(0)
        return Picks(layers, experts, len(nearest), tuple(np.ceil(FULL * shares).astype(int).ravel().tolist()))

    def forget(self) -> None:
        """All of it, also on the disk."""
        with self._lock:
            self._keys, self._maps = self._keys[:0], self._maps[:0]
            if self.path:
                self.path.unlink(missing_ok=True)

    def _fits(self, key: np.ndarray, shape: tuple[int, int]) -> bool:
        return self._keys.shape[1:] == key.shape and self._maps.shape[1:] == shape

    def _write(self, path: Path | None) -> None:
        """Beside the old one first: a program that is killed leaves one of the two."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        with fresh.open("wb") as file:
            np.savez(file, keys=self._keys, maps=self._maps)
        os.replace(fresh, path)


def _read(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    with suppress(TypeError, OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        with np.load(path, allow_pickle=False) as file:
            keys, maps = file["keys"], file["maps"]
        kinds = keys.dtype, maps.dtype, keys.ndim, maps.ndim
        if kinds == (np.float16, np.uint8, 2, 3) and len(keys) == len(maps) <= MOST and np.isfinite(keys).all():
            return keys, maps
    return np.empty((0, 0), np.float16), np.empty((0, 0, 0), np.uint8)


def _unit(key: np.ndarray) -> np.ndarray:
    key = key.astype(np.float32)
    return key / max(1e-9, float(np.linalg.norm(key)))
