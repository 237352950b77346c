"""The door keeper: a plain ASGI wrapper outside everything, so that only this user's own browser gets in.

A web page elsewhere can send requests to 127.0.0.1 and, with DNS rebinding, read the replies. Closed by: an exact list
of Host names (421), an exact list of Origins (403), Sec-Fetch-Site (403), and three secrets made at every launch (401):

* the start link's, which works once; the next link is made and told at that moment;
* the cookie's (HttpOnly, SameSite=Strict). A browser sends it to *every* port of 127.0.0.1, so whoever serves another
  one has it: alone it opens what a browser asks for by itself, which holds nothing of the person's (SHELL);
* the key's, for all the rest together with the cookie. The page that answers the start link leaves it in localStorage,
  which belongs to this port alone, for every tab and reload; key.js sends it with each request as a header.

With --lan other devices of the network come in by a password in place of the link (app/http/sign_in.py); their names
for this computer join the lists, and everything else stays as it is.

Streams pass through untouched; key.js is put first into the page. The same wrapper adds the headers that keep the
page from loading anything foreign, and refuses a body that is too large before anybody reads it.
"""
from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Callable
from html import escape
from urllib.parse import parse_qs, unquote

from app.http.sign_in import FORM_BYTES, SignIn
from app.incoming import FILE_BYTES
from app.openai_api.door import is_for_programs
from app.strings import TEXT

KEY_HEADER = "x-floe-key"
BODY_BYTES = 64 << 20
FILES = {"/api/import": FILE_BYTES}  # what is written to the disk as it comes may be larger
# The page without a conversation in it, its scripts and looks: links, styles and imports can carry no header.
SHELL = ("/", "/theme.css", "/favicon.ico", "/api/strings")
SHELL_BELOW = ("/ui/", "/assets/", "/static/")
# Gradio's own client code needs inline and evaluated scripts; nothing may come from, or go to, another place.
_POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
           "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
           "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'")
_HEADERS = [(b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"),
            (b"cross-origin-resource-policy", b"same-origin")]
# Parts of Gradio that this program never uses.
_CLOSED = ("/gradio_api/proxy=", "/proxy=", "/monitoring", "/gradio_api/monitoring", "/gradio_api/deep_link",
           "/gradio_api/vibe", "/gradio_api/mcp", "/login/huggingface")
# The address bar, the history and a reload keep nothing of the start link.
_ENTRY = ("<!doctype html><meta charset=utf-8><title>{title}</title><script>localStorage.setItem('floe-key', {key}); "
          "location.replace('/');</script><p>{text}</p>")
# For somebody who comes with a bookmark: what to do, and the way in once this browser has been let in by another tab.
_REFUSED = ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            "<title>{title}</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:34em;margin:18vh auto;"
            "padding:0 20px;color-scheme:light dark;background:Canvas;color:CanvasText}}</style><h1>{title}</h1>"
            "<p>{text}</p><script>setInterval(() => fetch('/api/strings').then((reply) => reply.ok && "
            "location.replace('/'), () => {{}}), 1500)</script>")
# A form that tells no referrer tells no origin either, and would be refused.
_FORM = ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
         "<meta name=referrer content=same-origin><title>{title}</title><style>body{{font:16px/1.5 system-ui,"
         "sans-serif;max-width:24em;margin:18vh auto;padding:0 20px;color-scheme:light dark;background:Canvas;"
         "color:CanvasText}}input,button{{font:inherit;"
         "padding:8px 12px;box-sizing:border-box;width:100%;margin-top:8px}}</style><h1>{title}</h1>"
         "<form method=post action=/sign-in><label for=password>{label}</label><input id=password name=password "
         "type=password autocomplete=current-password required autofocus><button>{enter}</button></form>"
         "<p role=alert>{text}</p>")
SIGN_IN = "/sign-in"
_KEY_SCRIPT = b'<head><script src="/ui/key.js"></script>'


class Guard:
    """Wraps an ASGI application that listens on `port` of the loopback address; `entered` is told each next link."""

    def __init__(self, app, port: int, entered: Callable[[str], None], programs=None, lan: SignIn | None = None):
        """programs: the application that programs with a key may ask, which lets in by itself (app/openai_api). lan:
        where other devices of the network may come in."""
        self._app, self._entered, self._programs, self._lan = app, entered, programs, lan
        self._address = f"http://127.0.0.1:{port}"
        self._start, self._pass, self._key = (secrets.token_urlsafe(32) for _ in range(3))
        self._cookie = f"floechat_{port}"  # cookies know no port: two copies of the program must not share one
        names = ("127.0.0.1", "localhost", *(lan.names if lan else ()))
        self._hosts = {f"{name}:{port}" for name in names}
        self._origins = {f"http://{name}:{port}" for name in names}

    @property
    def link(self) -> str:
        """Opens the page, once."""
        return f"{self._address}/?t={self._start}"

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no WebSocket is offered: the server closes the connection
        headers, token = _headers(scope), _start_token(scope)
        foreign = self._foreign(headers)
        if self._programs and not foreign and is_for_programs(scope["path"]):
            return await self._programs(scope, receive, _with_headers(send))
        if token and not foreign and _same(token, self._start):
            return await self._enter(send)
        if self._lan and not foreign and (scope["method"], scope["path"]) == ("POST", SIGN_IN):
            return await self._sign_in(scope, headers, receive, send)
        refusal = foreign or self._refusal(scope, headers)
        if refusal:
            status, text = refusal
            text = TEXT["link_used"] if token and not foreign else text
            if status == 401 and scope["method"] == "GET" and "text/html" in "".join(headers.get("accept", [])):
                if self._lan:
                    return await self._ask_password(send, status, "")
                page = _REFUSED.format(title=escape(TEXT["app"]), text=escape(text))
                return await _answer(send, status, page, [(b"cache-control", b"no-store")], "html")
            return await _answer(send, status, text)
        if token:  # an old link in a browser that is in already
            return await _answer(send, 303, "", [(b"location", b"/")])
        return await self._app(scope, receive, _with_headers(_with_key(send) if scope["path"] == "/" else send))

    def _foreign(self, headers: dict[str, list[str]]) -> tuple[int, str] | None:
        if headers.get("host", []) not in [[host] for host in self._hosts]:
            return 421, "This address is not served here."
        if any(origin not in self._origins for origin in headers.get("origin", [])):
            return 403, "Requests from other pages are refused."
        return None

    def _refusal(self, scope, headers: dict[str, list[str]]) -> tuple[int, str] | None:
        if any(site not in ("same-origin", "none") for site in headers.get("sec-fetch-site", [])):
            return 403, "Requests from other pages are refused."
        path = unquote(scope["path"])
        if ".." in path.replace("\\", "/").split("/") or path.startswith(_CLOSED) or "\0" in path:
            return 404, "There is nothing here."
        if not any(_same(value, self._pass) for value in _cookies(headers, self._cookie)):
            return 401, TEXT["no_link"]
        shell = scope["method"] in ("GET", "HEAD") and (scope["path"] in SHELL or scope["path"].startswith(SHELL_BELOW))
        if not shell and not _same("".join(headers.get(KEY_HEADER, [])), self._key):
            return 401, TEXT["no_key"]
        if "transfer-encoding" in headers or int("".join(headers.get("content-length", [])) or 0) > _most(path):
            return 413, TEXT["body_too_large"].format(megabytes=_most(path) >> 20)
        return None

    async def _enter(self, send) -> None:
        """Trade the link for the cookie and the key. What it asked for beside is not looked at: the page is at "/"."""
        self._start = secrets.token_urlsafe(32)
        self._entered(self.link)
        await self._let_in(send)

    async def _sign_in(self, scope, headers: dict[str, list[str]], receive, send) -> None:
        """A form of our own page, for whoever knows the password. A browser says of a form where it comes from."""
        same = headers.get("origin") and headers.get("sec-fetch-site", ["same-origin"]) == ["same-origin"]
        length = "".join(headers.get("content-length", []))
        if not same or not length.isdecimal() or int(length) > FORM_BYTES or "transfer-encoding" in headers:
            return await _answer(send, 403, "Requests from other pages are refused.")
        body, more = b"", True
        while more and len(body) <= FORM_BYTES:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        password = parse_qs(body.decode("utf-8", "replace")).get("password", [""])[-1]
        status, said = await self._lan.check((scope.get("client") or ("",))[0], password)
        await (self._let_in(send) if status == 200 else self._ask_password(send, status, said))

    async def _ask_password(self, send, status: int, said: str) -> None:
        page = _FORM.format(title=escape(TEXT["app"]), label=escape(TEXT["password"]), text=escape(said),
                            enter=escape(TEXT["password_enter"]))
        await _answer(send, status, page, [(b"cache-control", b"no-store")], "html")

    async def _let_in(self, send) -> None:
        page = _ENTRY.format(title=escape(TEXT["app"]), key=json.dumps(self._key), text=escape(TEXT["entry"]))
        cookie = f"{self._cookie}={self._pass}; Path=/; HttpOnly; SameSite=Strict"
        await _answer(send, 200, page, [(b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")], "html")


def _most(path: str) -> int:
    return FILES.get(path, BODY_BYTES)


def _same(candidate: str, secret: str) -> bool:
    return hmac.compare_digest(candidate.encode(), secret.encode())


def _headers(scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _cookies(headers: dict[str, list[str]], name: str) -> list[str]:
    """The values under one name. Other programs' cookies come along, with brackets, quotes and spaces in them, before
    which a parser that knows the grammar gives up."""
    pairs = [pair.partition("=") for line in headers.get("cookie", []) for pair in line.split(";")]
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def _start_token(scope) -> str:
    query = parse_qs(scope.get("query_string", b"").decode("latin-1")) if scope["method"] == "GET" else {}
    return query.get("t", [""])[-1]


async def _answer(send, status: int, text: str, headers=(), kind: str = "plain") -> None:
    body = text.encode()
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", f"text/{kind}; charset=utf-8".encode()), (b"content-length", str(len(body)).encode()),
        *_HEADERS, *headers]})
    await send({"type": "http.response.body", "body": body})


def _with_key(send):
    """The page with key.js before all that it holds; what Gradio is given for the head comes behind its first request,
    which then lacked the key now and then."""
    begun: list[dict] = []

    async def wrapped(message) -> None:
        if message["type"] == "http.response.start":
            begun.append(message)
            return
        if begun:
            start, body = begun.pop(), message.get("body", b"").replace(b"<head>", _KEY_SCRIPT, 1)
            kept = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
            length = [] if message.get("more_body") else [(b"content-length", str(len(body)).encode())]
            await send(start | {"headers": kept + length})
            message = message | {"body": body}
        await send(message)

    return wrapped


def _with_headers(send):
    async def wrapped(message) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in _HEADERS}
            kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in names]
            message = message | {"headers": kept + _HEADERS}
        await send(message)

    return wrapped
