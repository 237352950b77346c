"""The door keeper: a plain ASGI wrapper outside everything, so that only this user's own browser gets in.

A web page elsewhere can send requests to 127.0.0.1 and, with DNS rebinding, read the replies. Closed by: an exact list
of Host names (421), an exact list of Origins (403), Sec-Fetch-Site (403), and a token made at every launch, which the
link that the program opens carries once (`/?t=TOKEN`) and an HttpOnly SameSite=Strict cookie afterwards (401).
Streams pass through untouched. The same wrapper adds the headers that keep the page from loading anything foreign.
"""
from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, unquote, urlencode

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


class Guard:
    """Wraps an ASGI application that listens on `port` of the loopback address."""

    def __init__(self, app, port: int, token: str):
        assert len(token) >= 32, "a token that can be guessed is none"
        self._app = app
        self._token = token
        self._cookie = f"floechat_{port}"  # cookies know no port: two copies of the program must not share one
        names = ("127.0.0.1", "localhost")
        self._hosts = {f"{name}:{port}" for name in names}
        self._origins = {f"http://{name}:{port}" for name in names}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no WebSocket is offered: the server closes the connection
        headers = _headers(scope)
        refusal = self._refusal(scope, headers)
        if refusal:
            return await _answer(send, *refusal)
        token = _query_token(scope)
        if token and self._is_token(token):
            return await self._welcome(scope, send)
        if not self._is_token(self._cookie_token(headers)):
            return await _answer(send, 401, "Open Floe Chat with the link that it printed when it started.")
        return await self._app(scope, receive, _with_headers(send))

    def _refusal(self, scope, headers: dict[str, list[str]]) -> tuple[int, str] | None:
        if headers.get("host", []) not in [[host] for host in self._hosts]:
            return 421, "This address is not served here."
        if any(origin not in self._origins for origin in headers.get("origin", [])):
            return 403, "Requests from other pages are refused."
        if any(site not in ("same-origin", "none") for site in headers.get("sec-fetch-site", [])):
            return 403, "Requests from other pages are refused."
        path = unquote(scope["path"])
        if ".." in path.replace("\\", "/").split("/") or path.startswith(_CLOSED) or "\0" in path:
            return 404, "There is nothing here."
        return None

    def _is_token(self, candidate: str) -> bool:
        return hmac.compare_digest(candidate.encode(), self._token.encode())

    def _cookie_token(self, headers: dict[str, list[str]]) -> str:
        try:
            jar = SimpleCookie("; ".join(headers.get("cookie", [])))
        except CookieError:
            return ""
        return jar[self._cookie].value if self._cookie in jar else ""

    async def _welcome(self, scope, send) -> None:
        """Trade the token in the link for the cookie, and take it out of the address bar."""
        query = [(name, value) for name, value in _query(scope) if name != "t"]
        place = scope["path"] + (f"?{urlencode(query)}" if query else "")
        cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
        place = "/" + place.lstrip("/\\")  # never another host: //evil.example
        await _answer(send, 303, "", [(b"location", place.encode()), (b"set-cookie", cookie.encode())])


def _headers(scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _query(scope) -> list[tuple[str, str]]:
    return parse_qsl(scope.get("query_string", b"").decode("latin-1"))


def _query_token(scope) -> str:
    return dict(_query(scope)).get("t", "") if scope["method"] == "GET" else ""


async def _answer(send, status: int, text: str, headers=()) -> None:
    body = text.encode()
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *_HEADERS,
        *headers]})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send):
    async def wrapped(message) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in _HEADERS}
            kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in names]
            message = message | {"headers": kept + _HEADERS}
        await send(message)

    return wrapped
