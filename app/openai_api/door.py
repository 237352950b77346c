"""Who may ask: a plain ASGI wrapper around the programs' router, behind the guard that knows hosts and origins.

A key comes as `Authorization: Bearer KEY` alone: never in a cookie, which a browser would send by itself, and never in
an address, which is kept in histories and logs. Nothing of a request is read before its key is known.
"""
from __future__ import annotations

from app.openai_api.errors import ApiError
from app.openai_api.keys import Keys

HEALTH = "/health"
HEADER_BYTES, HEADERS = 32 << 10, 100
BODY_BYTES = 16 << 20
KEY = "key"  # what the routes find in the scope: whose request it is


def is_for_programs(path: str) -> bool:
    return path == HEALTH or path == "/v1" or path.startswith("/v1/")


class Door:
    def __init__(self, app, keys: Keys):
        self._app, self._keys = app, keys

    async def __call__(self, scope, receive, send) -> None:
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        try:
            self._check(scope, headers)
        except ApiError as refused:
            return await refused.reply()(scope, receive, send)
        return await self._app(scope, receive, send)

    def _check(self, scope, headers: dict[str, list[str]]) -> None:
        """ApiError, or the key is put into the scope."""
        if any(site not in ("same-origin", "none") for site in headers.get("sec-fetch-site", [])):
            raise ApiError(403, "Requests from web pages of other places are refused.")
        if len(scope["headers"]) > HEADERS or sum(len(a) + len(b) for a, b in scope["headers"]) > HEADER_BYTES:
            raise ApiError(431, "The headers of this request are too large.")
        if scope["path"] != HEALTH:
            scope[KEY] = self._key(headers.get("authorization", []))
        length = "".join(headers.get("content-length", [])) or "0"
        if not length.isdecimal() or len(length) > 18 or int(length) > BODY_BYTES:
            raise ApiError(413, f"This request is larger than {BODY_BYTES >> 20} MB; send less at once.")

    def _key(self, authorization: list[str]):
        kind, _, secret = (authorization[0] if len(authorization) == 1 else "").partition(" ")
        key = self._keys.of(secret.strip()) if kind.lower() == "bearer" and secret.strip() else None
        if key is None:
            raise ApiError(401, "A key of this program is needed as Authorization: Bearer KEY; make one on its "
                                "settings page, under API.", "invalid_api_key")
        return key
