"""The door keeper: who gets in, with what, and that nothing is done for those who do not."""
from __future__ import annotations

import asyncio
import re

import pytest

from app.http.request_guard import BODY_BYTES, FILES, Guard

PORT = 7860


class Door:
    """A guard with nothing but "in" behind it, and what a page has that came in through its link."""

    def __init__(self):
        self.reached, self.links = [], []
        self.guard = Guard(self._application, PORT, self.links.append)
        self.start = self.guard.link.partition("?t=")[2]
        _, headers, page = self.ask("/", query=f"t={self.start}")
        self.cookie = headers[b"set-cookie"].decode().split(";")[0]
        self.key = re.search(r"'floe-key', \"(.*?)\"", page)[1]

    async def _application(self, scope, receive, send):
        self.reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"ALLOW")]})
        await send({"type": "http.response.body", "body": b"in"})

    def ask(self, path="/", *, method="GET", query="", **headers):
        """Status, headers and text."""
        sent = []

        async def send(message):
            sent.append(message)

        pairs = {"host": f"127.0.0.1:{PORT}"} | {name.replace("_", "-"): value for name, value in headers.items()}
        scope = {"type": "http", "method": method, "path": path, "query_string": query.encode("latin-1"),
                 "headers": [(name.encode(), value.encode()) for name, value in pairs.items() if value is not None]}
        asyncio.run(self.guard(scope, None, send))
        return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"].decode()

    def status(self, path="/", **options) -> int:
        """Of a request with cookie and key; nothing is reached unless it is 200."""
        self.reached.clear()
        status = self.ask(path, **{"cookie": self.cookie, "x_floe_key": self.key} | options)[0]
        assert bool(self.reached) == (status == 200)
        return status


@pytest.fixture(scope="module")
def door() -> Door:
    return Door()


def test_cookie_and_key_open_and_the_page_may_load_nothing_foreign(door):
    status, headers, text = door.ask("/api/state", cookie=door.cookie, x_floe_key=door.key)
    assert (status, text) == (200, "in")
    assert b"connect-src 'self'" in headers[b"content-security-policy"]
    assert headers[b"x-frame-options"] == b"DENY"


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", f"127.0.0.1:{PORT}.evil.example",
                                  f"127.0.0.1:{PORT + 1}", f"localhost.:{PORT}", f"LOCALHOST:{PORT}", "", None,
                                  f"[::1]:{PORT}", f"0.0.0.0:{PORT}"])
def test_only_the_exact_host_is_served(door, host):
    assert door.status(host=host) == 421


def test_localhost_is_a_host_too(door):
    assert door.status(host=f"localhost:{PORT}") == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", f"https://127.0.0.1:{PORT}", "http://127.0.0.1",
                                    f"http://127.0.0.1:{PORT}.evil.example", f"http://localhost:{PORT + 1}"])
def test_a_foreign_origin_is_refused_with_everything_else_right(door, origin):
    assert door.status(origin=origin, method="POST") == 403


@pytest.mark.parametrize("site, status", [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)])
def test_requests_that_another_page_started_are_refused(door, site, status):
    assert door.status(sec_fetch_site=site) == status


@pytest.mark.parametrize("cookie", [None, "", "floechat_7860=", "floechat_7860=wrong", "floechat_7861={0}", "other={0}",
                                    "floechat_7860={0}x", "=;=;,\x01", "floechat_7860={start}", "floechat_7860={key}"])
def test_without_the_cookie_nothing_is_served(door, cookie):
    value = door.cookie.partition("=")[2]
    cookie = cookie and cookie.format(value, start=door.start, key=door.key)
    for path in ("/", "/stats", "/events", "/api/state", "/gradio_api/upload", "/ui/floe.js", "/config"):
        assert door.status(path, cookie=cookie) == 401


@pytest.mark.parametrize("key", [None, "", "wrong", "{cookie}", "{start}", "{key}x", "null"])
def test_who_has_only_the_cookie_gets_the_bare_page(door, key):
    """Every server on 127.0.0.1 is sent the cookie by the browser."""
    key = key and key.format(cookie=door.cookie.partition("=")[2], start=door.start, key=door.key)
    for path in ("/", "/ui/floe.js", "/assets/index.js", "/theme.css", "/api/strings"):
        assert door.status(path, x_floe_key=key) == 200
        assert door.status(path, x_floe_key=key, method="POST") == 401
    for path in ("/stats", "/events", "/api/state", "/api/export", "/config", "/gradio_api/run/predict", "/ui",
                 "/api/strings/", "//api/state", "/ui/../api/state", "/ui/%2e%2e/api/state"):
        assert door.status(path, x_floe_key=key) in (401, 404), path


@pytest.mark.parametrize("other", ['session={"a": [1, 2], "b": "c; d"}', "x=(a) <b> @ [c] {d}", 'y="unclosed', "a b=c",
                                   "=", "\x01\x7f=\x02", "z=" + "é" * 5000, "[]{}()=;;; =", "$Version=1; $Path=/"])
def test_cookies_of_other_programs_lock_nobody_out(door, other):
    assert door.status(cookie=f"{other}; {door.cookie}") == 200
    assert door.status(cookie=f"{door.cookie}; {other}") == 200
    assert door.status(cookie=f"floechat_7860=set by another port; {door.cookie}") == 200


def test_the_link_works_once_and_the_next_one_is_told():
    door = Door()
    assert door.ask(query=f"t={door.start}")[0] == 401
    assert len(door.links) == 1 and door.links[0] == door.guard.link
    status, headers, page = door.ask(query=door.links[0].partition("?")[2])
    cookie = headers[b"set-cookie"].decode()
    assert status == 200 and cookie.startswith(door.cookie) and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert door.key in page and headers[b"cache-control"] == b"no-store"
    secrets = [door.start, door.key, door.cookie.partition("=")[2], door.links[1].partition("?t=")[2]]
    assert len(set(secrets)) == 4 and not any(a in b for a in secrets for b in secrets if a is not b)


def test_a_used_link_leads_to_the_page_where_one_is_in_already(door):
    status, headers, _ = door.ask(query=f"t={door.start}", cookie=door.cookie)
    assert (status, headers[b"location"]) == (303, b"/")


def test_a_file_may_lead_to_the_page_but_only_with_a_good_link():
    """A browser calls a request cross-site that a file of this computer has begun."""
    door = Door()
    query = door.links[0].partition("?")[2]
    assert door.ask(query=query, sec_fetch_site="cross-site", origin="http://evil.example")[0] == 403
    assert door.ask(query=query, sec_fetch_site="cross-site", host="evil.example")[0] == 421
    assert door.ask(query=query, sec_fetch_site="cross-site")[0] == 200
    assert door.ask(query=query, sec_fetch_site="cross-site", cookie=door.cookie)[0] == 403


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "///evil.example", "/\t/evil.example",
                                  "/\r\nset-cookie: x=y", "/\n//evil.example", "/a/../..//evil.example"])
def test_the_link_never_leads_to_another_host(path):
    door = Door()
    status, headers, page = door.ask(path, query=door.links[0].partition("?")[2])
    assert status == 200 and "location.replace('/')" in page and "evil" not in page + str(headers)
    status, headers, _ = door.ask(path, query="t=used", cookie=door.cookie, x_floe_key=door.key)
    assert headers.get(b"location", b"/") == b"/" and b"x=y" not in str(headers).encode()


@pytest.mark.parametrize("query", ["t=wrong", "t=", "T={0}", "x={0}", "t={0}%00", "t=\xff", "t={0}&t=wrong"])
def test_a_wrong_link_is_refused(query):
    door = Door()
    assert door.ask(query=query.format(door.links[0].partition("?t=")[2]))[0] == 401
    assert len(door.links) == 1, "only a good link is used up"


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "OPTIONS"])
def test_only_opening_the_link_is_a_login(method):
    door = Door()
    assert door.ask(method=method, query=door.links[0].partition("?")[2])[0] == 401 and len(door.links) == 1


@pytest.mark.parametrize("path", ["/ui/../../etc/passwd", "/ui/..%2f..%2fetc/passwd", "/gradio_api/file=/../secret",
                                  "/ui/..\\..\\windows\\win.ini", "/gradio_api/proxy=http://127.0.0.1:1/",
                                  "/monitoring", "/ui/a\0b"])
def test_traversal_and_unused_parts_of_gradio_are_closed(door, path):
    assert door.status(path) == 404


@pytest.mark.parametrize("headers", [{"content_length": str(BODY_BYTES + 1)}, {"content_length": "9" * 20},
                                     {"transfer_encoding": "chunked"}])
def test_a_body_without_end_is_refused_before_it_is_read(door, headers):
    assert door.status("/api/send", method="POST", **headers) == 413
    assert door.status("/api/send", method="POST", content_length=str(BODY_BYTES)) == 200


@pytest.mark.parametrize("size, status", [(BODY_BYTES + 1, 200), (FILES["/api/import"], 200),
                                          (FILES["/api/import"] + 1, 413)])
def test_only_a_file_that_goes_to_the_disk_may_be_larger(door, size, status):
    assert door.status("/api/import", method="POST", content_length=str(size)) == status


def test_other_protocols_are_not_served(door):
    door.reached.clear()
    asyncio.run(door.guard({"type": "websocket", "headers": []}, None, None))
    assert door.reached == []
