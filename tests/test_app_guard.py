"""The door keeper: who gets in, with what, and that nothing is done for those who do not."""
from __future__ import annotations

import asyncio

import pytest

from app.guard import Guard

TOKEN = "t" * 40
PORT = 7860
COOKIE = f"floechat_{PORT}={TOKEN}"


def ask(path="/", *, method="GET", query="", **headers):
    """Status, headers and whether the application behind the guard was reached."""
    reached, sent = [], []

    async def application(scope, receive, send):
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"ALLOW")]})
        await send({"type": "http.response.body", "body": b"in"})

    async def send(message):
        sent.append(message)

    pairs = {"host": f"127.0.0.1:{PORT}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(),
             "headers": [(name.encode(), value.encode()) for name, value in pairs.items() if value is not None]}
    asyncio.run(Guard(application, PORT, TOKEN)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), bool(reached)


def test_the_cookie_opens_and_the_page_may_load_nothing_foreign():
    status, headers, reached = ask(cookie=COOKIE)
    assert status == 200 and reached
    assert b"connect-src 'self'" in headers[b"content-security-policy"]
    assert headers[b"x-frame-options"] == b"DENY"


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", f"127.0.0.1:{PORT}.evil.example",
                                  f"127.0.0.1:{PORT + 1}", f"localhost.:{PORT}", f"LOCALHOST:{PORT}", "", None,
                                  f"[::1]:{PORT}", f"0.0.0.0:{PORT}"])
def test_only_the_exact_host_is_served(host):
    assert ask(cookie=COOKIE, host=host)[::2] == (421, False)


def test_localhost_is_a_host_too():
    assert ask(cookie=COOKIE, host=f"localhost:{PORT}")[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", f"https://127.0.0.1:{PORT}", "http://127.0.0.1",
                                    f"http://127.0.0.1:{PORT}.evil.example", f"http://localhost:{PORT + 1}"])
def test_a_foreign_origin_is_refused_even_with_the_cookie(origin):
    assert ask(cookie=COOKIE, origin=origin, method="POST")[::2] == (403, False)


@pytest.mark.parametrize("site, status", [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)])
def test_requests_that_another_page_started_are_refused(site, status):
    assert ask(cookie=COOKIE, sec_fetch_site=site)[0] == status


@pytest.mark.parametrize("cookie", [None, "", "floechat_7860=", "floechat_7860=wrong", f"floechat_7861={TOKEN}",
                                    f"other={TOKEN}", "floechat_7860=" + TOKEN[:-1], "=;=;,\x01"])
def test_without_the_token_nothing_is_served(cookie):
    for path in ("/", "/stats", "/events", "/api/state", "/gradio_api/upload", "/ui/floe.js", "/config"):
        assert ask(path, cookie=cookie)[::2] == (401, False)


def test_the_link_trades_its_token_for_a_cookie_and_loses_it():
    status, headers, reached = ask("/", query=f"t={TOKEN}&x=1")
    assert (status, reached) == (303, False) and headers[b"location"] == b"/?x=1"
    cookie = headers[b"set-cookie"].decode()
    assert cookie.startswith(COOKIE) and "HttpOnly" in cookie and "SameSite=Strict" in cookie


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "///evil.example"])
def test_the_trade_never_leads_to_another_host(path):
    status, headers, _ = ask(path, query=f"t={TOKEN}")
    assert status == 303 and headers[b"location"] == b"/evil.example"


@pytest.mark.parametrize("query", ["t=wrong", "t=", f"T={TOKEN}"])
def test_a_wrong_token_in_the_link_is_refused(query):
    assert ask(query=query)[::2] == (401, False)


def test_a_token_in_a_post_is_not_a_login():
    assert ask(method="POST", query=f"t={TOKEN}")[::2] == (401, False)


@pytest.mark.parametrize("path", ["/ui/../../etc/passwd", "/ui/..%2f..%2fetc/passwd", "/gradio_api/file=/../secret",
                                  "/ui/..\\..\\windows\\win.ini", "/gradio_api/proxy=http://127.0.0.1:1/",
                                  "/monitoring", "/ui/a\0b"])
def test_traversal_and_unused_parts_of_gradio_are_closed(path):
    assert ask(path, cookie=COOKIE)[::2] == (404, False)


def test_other_protocols_are_not_served():
    async def application(scope, receive, send):
        raise AssertionError("reached")

    asyncio.run(Guard(application, PORT, TOKEN)({"type": "websocket", "headers": []}, None, None))
