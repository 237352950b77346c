"""The server that the person has named: its address, its key, the models it said it has. One per program."""
from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from urllib.parse import SplitResult, urlsplit

from app.chat.chats import Chats
from app.remote.answer import RemoteModel
from app.remote.exchange import ask
from app.remote.place import Place
from app.strings import TEXT
from engine import UserError

PREFERENCE = "server"
MODELS = 500  # that are shown; a gateway to many makers has a few hundred
NAME_CHARACTERS = 200
ADDRESS_CHARACTERS = 500
KEY_CHARACTERS = 1000


@dataclass(frozen=True)
class Server:
    """key: sent as a bearer token, "" for none; stored in the person's own database, and never told to a page."""

    address: str
    key: str = ""
    models: tuple[str, ...] = ()

    @property
    def place(self) -> Place:
        return Place(self.address, self.key, _is_this_computer(urlsplit(self.address)))


class Servers:
    """What is stored of it; any thread may ask."""

    def __init__(self, chats: Chats):
        self._chats = chats

    def current(self) -> Server | None:
        """None for no server, and for a stored document that is none."""
        stored = self._chats.preference(PREFERENCE, {})
        try:
            return Server(str(stored["address"]), str(stored["key"]), tuple(map(str, stored["models"])))
        except (TypeError, KeyError):
            return None

    def choose(self, address: str, key: str | None, stopped: Callable[[], bool] = lambda: False) -> Server:
        """Ask a server for its models and keep it. key None: the one that is stored, if it is of this very address.
        UserError, and nothing changes, for an address that is none and for a server that does not answer; Stopped."""
        address, before = whole_address(address), self.current()
        if key is None:
            key = before.key if before and before.address == address else ""
        server = Server(address, _checked_key(key))
        server = replace(server, models=models_in(ask(server.place, "/models", stopped)))
        self._chats.set_preference(PREFERENCE, asdict(server))
        return server

    def forget(self) -> None:
        self._chats.set_preference(PREFERENCE, {})

    def model(self, name: str) -> RemoteModel:
        """UserError where there is no server any more."""
        server = self.current()
        if server is None:
            raise UserError(TEXT["server_none"].format(model=name))
        return RemoteModel(server.place, name)


def whole_address(typed: str) -> str:
    """What a person typed as http(s)://host:port/path, /v1 where no path was given. UserError for what is none."""
    text = typed.strip().rstrip("/")
    text = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(text)
        good = (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.username
                and not parts.netloc.endswith(":")
                and not parts.query and not parts.fragment and text.isascii() and text.isprintable()
                and " " not in text and len(text) <= ADDRESS_CHARACTERS)
    except ValueError:  # a port that is no number, brackets around nothing
        good = False
    if not good:
        raise UserError(TEXT["server_address"])
    return text if parts.path else f"{text}/v1"


def models_in(document: object) -> tuple[str, ...]:
    """The names in an answer to /models. UserError for something else."""
    try:
        names = [entry["id"] for entry in document["data"]]
    except (TypeError, KeyError) as error:
        raise UserError(TEXT["server_foreign"]) from error
    good = [name for name in names if isinstance(name, str) and 0 < len(name) <= NAME_CHARACTERS and name.isprintable()]
    if not good:
        raise UserError(TEXT["server_empty"])
    return tuple(dict.fromkeys(good))[:MODELS]


def _checked_key(key: str) -> str:
    key = key.strip()
    if not (key.isascii() and key.isprintable() and len(key) <= KEY_CHARACTERS):
        raise UserError(TEXT["server_key_bad"])
    return key


def _is_this_computer(parts: SplitResult) -> bool:
    try:
        return ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        return parts.hostname == "localhost"
