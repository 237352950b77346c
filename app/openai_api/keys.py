"""Keys of programs: one for each, shown once, kept as hashes, revocable.

A key is 256 random bits, so a plain hash keeps it: there is nothing to guess. Every comparison takes the same time.
"""
from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256

from app.strings import TEXT
from engine import UserError

PREFIX = "floe-"
MOST_KEYS = 50
STORED = "api_keys"  # the preference's name


@dataclass(frozen=True)
class Key:
    """id: of the key, not secret; hashed: SHA-256, hexadecimal; made_at: seconds since 1970."""

    id: str
    name: str
    hashed: str
    made_at: float


class Keys:
    """on_revoked: told the id of a key that opens nothing any more. Any thread may ask."""

    def __init__(self, read: Callable[[], list[dict]], write: Callable[[list[dict]], None]):
        self._write, self._lock = write, threading.Lock()
        self._keys = _stored(read())
        self.on_revoked: Callable[[str], None] = lambda key_id: None

    def listed(self) -> list[dict]:
        """Without hashes."""
        return [{"id": key.id, "name": key.name, "made_at": key.made_at} for key in self._keys]

    def make(self, name: str) -> str:
        """A new key, which nobody can read again. UserError without a name, or with one that is there."""
        name = " ".join(name.split())
        with self._lock:
            if not name or any(key.name == name for key in self._keys):
                raise UserError(TEXT["key_name_taken"] if name else TEXT["key_name_missing"])
            if len(self._keys) >= MOST_KEYS:
                raise UserError(TEXT["key_too_many"].format(most=MOST_KEYS))
            secret = PREFIX + secrets.token_urlsafe(32)
            self._keep([*self._keys, Key(secrets.token_hex(8), name, _hashed(secret), time.time())])
        return secret

    def revoke(self, key_id: str) -> None:
        """At once, for requests under way as well. UserError when there is no such key."""
        with self._lock:
            if all(key.id != key_id for key in self._keys):
                raise UserError(TEXT["key_gone"])
            self._keep([key for key in self._keys if key.id != key_id])
        self.on_revoked(key_id)

    def of(self, secret: str) -> Key | None:
        """Whose key this is; every key is compared, whichever it is."""
        hashed = _hashed(secret)
        return next(iter([key for key in self._keys if hmac.compare_digest(key.hashed, hashed)]), None)

    def _keep(self, keys: list[Key]) -> None:
        self._write([asdict(key) for key in keys])
        self._keys = keys


def _hashed(secret: str) -> str:
    return sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _stored(documents: object) -> list[Key]:
    """A stored document may hold anything; what is no key opens nothing."""
    found = []
    for document in documents if isinstance(documents, list) else []:
        try:
            key = Key(**document)
        except TypeError:
            continue
        if all(isinstance(text, str) for text in (key.id, key.name, key.hashed)) and key.hashed.isascii():
            found.append(key)
    return found
