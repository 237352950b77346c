"""What this computer says of the way to a Hub, looked at before anything is asked: a wrong word there would look like a
network that fails. Proxies and certificates (variables that every program reads), the token, hosts that are allowed."""
from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from engine.core import UserError
from engine.disk import write_text_atomically
from engine.paths import data_path

PROXIES = ("https_proxy", "http_proxy", "all_proxy")
HOSTS, HOSTS_FILE = "FLOECHAT_HOSTS", "floechat.hosts"
MIRROR, MIRROR_FILE = "HF_ENDPOINT", "floechat.mirror"
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


def check_variables() -> None:
    """UserError for a proxy or a file of certificates that cannot be used, by the name of its variable."""
    schemes = ("http", "https", *(("socks5", "socks5h") if find_spec("socksio") else ()))
    for name, value in os.environ.items():
        if name.lower() in PROXIES and value:
            scheme = value.partition("://")[0].lower() if "://" in value else "http"
            if scheme not in schemes:
                raise UserError(f"The variable {name} names a {scheme}:// proxy, which cannot be used to download; set "
                                "it to an http:// address, or unset it.")
        if name in ("SSL_CERT_FILE", "SSL_CERT_DIR") and value and not Path(value).exists():
            raise UserError(f"The variable {name} names {value} for certificates, and there is nothing; correct it, or "
                            "unset it.")


def check_token(token: str, where: str) -> None:
    """UserError for letters that no token has; it would be refused as a whole, or not even be sent."""
    wrong = re.search(r"[^\x21-\x7e]|[\"']", token)
    if wrong or not token:
        what = {"\n": "a line break", "\r": "a line break", " ": "a blank", "\t": "a tab"}
        seen = wrong and (wrong[0] if wrong[0].isprintable() else "a letter that cannot be seen")
        found = wrong and what.get(wrong[0], seen)
        raise UserError(f"{where} {f'has {found} in it' if found else 'is empty'}, as no token does; copy it again, "
                        "without quotes.")


def allowed_hosts(data: str | Path | None = None) -> tuple[str, ...]:
    """Hosts besides the Hub's own from which files may come: those that a person has allowed, and FLOECHAT_HOSTS.
    UserError where the variable names none."""
    try:
        named = plain_hosts(os.environ.get(HOSTS, ""))
    except UserError as error:
        raise UserError(f"The variable {HOSTS}: {error}") from error
    return tuple(dict.fromkeys([*kept_hosts(data), *named]))


def kept_hosts(data: str | Path | None = None) -> tuple[str, ...]:
    """Those of them that a person has allowed for good."""
    return tuple(_kept(HOSTS_FILE, data).split())


def allow_hosts(hosts: str, data: str | Path | None = None) -> tuple[str, ...]:
    """Keep these hosts, in place of those before; -> them. UserError for what is no host's name."""
    plain = plain_hosts(hosts)
    write_text_atomically(data_path(data) / HOSTS_FILE, "\n".join(plain))
    return plain


def mirror(data: str | Path | None = None) -> str:
    """The address of a Hub in place of the public one, as a person has chosen it; "" for the public one. The variable
    HF_ENDPOINT goes before it."""
    return _kept(MIRROR_FILE, data).strip()


def _kept(name: str, data: str | Path | None) -> str:
    try:
        return (data_path(data) / name).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def choose_mirror(address: str, data: str | Path | None = None) -> str:
    """Keep this address, "" for the public Hub again; -> it. UserError for what is no address."""
    plain = plain_address(address)
    write_text_atomically(data_path(data) / MIRROR_FILE, plain)
    return plain


def plain_address(address: str) -> str:
    """A Hub's address as it is kept, "" for none. UserError for what is no address."""
    plain = address.strip().rstrip("/")
    try:
        parts = urlsplit(plain)
        is_address = parts.scheme in ("http", "https") and _HOST.fullmatch(parts.hostname or "") and not (
            parts.username or parts.query or parts.fragment) and (parts.port or True)
    except ValueError:  # half a bracket, a port that is no number
        is_address = False
    if plain and not (is_address and plain.isascii() and plain.isprintable() and " " not in plain):
        raise UserError(f"{plain[:100]!r} is not the address of a Hub; write it like https://hub.example.com.")
    return plain


def plain_hosts(text: str) -> tuple[str, ...]:
    """Names of hosts, with blanks or commas between them, or addresses there. UserError for others."""
    found = []
    for word in text.replace(",", " ").split():
        try:
            host = (urlsplit(word).hostname if "://" in word else word.partition("/")[0]) or ""
        except ValueError:  # half a bracket
            host = ""
        if not _HOST.fullmatch(host.lower()):
            raise UserError(f"{word[:100]!r} is not the name of a host; write it like files.example.com.")
        found.append(host.lower())
    return tuple(dict.fromkeys(found))
