"""Devices of this network, let in on purpose (--lan): a password takes the place of the start link.

Kept is what scrypt makes of it. Tries are counted before anything is computed, of each device and of all together, and
one is computed at a time: guessing takes years, and a flood of guesses costs this computer next to nothing.
"""
from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable

import psutil

from app.strings import TEXT
from engine import UserError

PREFERENCE = "network"
LEAST_CHARACTERS, MOST_CHARACTERS = 10, 1000
COST = {"n": 1 << 14, "r": 8, "p": 5, "dklen": 32}  # 16 MiB and a quarter of a second
TRIES, ALL_TRIES, SECONDS = 5, 30, 300.0  # in so many seconds: of one device, of all together
FORM_BYTES = 8192


def hashed(password: str) -> dict[str, str]:
    """What is kept. UserError for a password that is too short or too long."""
    if not LEAST_CHARACTERS <= len(password) <= MOST_CHARACTERS:
        raise UserError(TEXT["password_bad"].format(least=LEAST_CHARACTERS))
    salt = secrets.token_bytes(16)
    return {"salt": salt.hex(), "hash": _scrypt(password, salt).hex()}


def matches(password: str, stored: dict) -> bool:
    """In the same time whatever is wrong; False for a stored document that is none."""
    try:
        salt, wanted = bytes.fromhex(stored["salt"]), bytes.fromhex(stored["hash"])
    except (KeyError, TypeError, ValueError):
        return False
    return len(password) <= MOST_CHARACTERS and hmac.compare_digest(_scrypt(password, salt), wanted)


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, **COST)


class SignIn:
    """stored: asked at every try. names: of this computer in its networks, without a port."""

    def __init__(self, stored: Callable[[], dict], names: tuple[str, ...], clock: Callable[[], float] = time.monotonic):
        self.names = names
        self._stored, self._clock = stored, clock
        self._tries: deque[tuple[float, str]] = deque()
        self._one = asyncio.Lock()

    async def check(self, device: str, password: str) -> tuple[int, str]:
        """Status and sentence of a try: 200, 401 for a wrong password, 429 for too many tries."""
        now = self._clock()
        while self._tries and self._tries[0][0] <= now - SECONDS:
            self._tries.popleft()
        if len(self._tries) >= ALL_TRIES or sum(each == device for _, each in self._tries) >= TRIES:
            return 429, TEXT["password_wait"].format(minutes=round(SECONDS / 60))
        this = now, device
        self._tries.append(this)  # counted before it is known: those that come together count, too
        async with self._one:
            good = await asyncio.to_thread(matches, password, self._stored())
        if good:
            self._tries.remove(this)
        return (200, "") if good else (401, TEXT["password_wrong"])


def own_names() -> tuple[str, ...]:
    """This computer's IPv4 addresses in its networks, and its name."""
    found = [each.address for of_card in psutil.net_if_addrs().values() for each in of_card
             if each.family == socket.AF_INET and not each.address.startswith("127.")]
    return (*found, socket.gethostname().lower())
