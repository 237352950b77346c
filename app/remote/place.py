"""Where a request goes."""
from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Place:
    """address: with its path, without a slash at its end. is_here: of this computer, so that no proxy is asked."""

    address: str
    key: str = field(default="", repr=False)  # in no traceback
    is_here: bool = False

    @property
    def host(self) -> str:
        """What a person reads: name and port."""
        return urlsplit(self.address).netloc
