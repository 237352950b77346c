"""Every route with every kind of wrong credentials (seed fixed): nothing is told, nothing is done, and all goes on."""
from __future__ import annotations

import json
import random
import re
import secrets
from collections.abc import Iterator

import httpx
import pytest

from app.http.request_guard import SHELL, SHELL_BELOW
from app.server import Parts, build
from engine import Options, demo_model
from tests.support import browser, waiting

app = browser.app
PLANTED = "the-planted-secret-of-a-conversation"
NOISE = ['{"a": [1, "b"]}', "a b (c) <d>", '"', "=;;=", "é\x7f", "x" * 5000]


@pytest.fixture(scope="module")
def client(app) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.address, timeout=browser.SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def routes(tmp_path_factory) -> list[tuple[str, str]]:
    """Methods and paths of the whole application, ours and Gradio's."""
    parts = Parts.make(tmp_path_factory.mktemp("routes"), demo_model(), Options(device="cpu"))
    found = sorted(set(walk(build(parts, 1, print)._app.routes)))
    parts.jobs.start()
    parts.close()
    return [*found, ("GET", "/ui/floe.js"), ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/nothing")]


def walk(routes, before: str = "") -> Iterator[tuple[str, str]]:
    for route in routes:
        path = before + (getattr(route, "path", "") or "")
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if getattr(route, "methods", None):
            yield from ((method, path.rstrip("/") or "/") for method in route.methods)
        elif hasattr(inner, "routes"):
            yield from walk(inner.routes, path)


def wrong(app) -> dict[str, dict[str, str]]:
    """What anybody might send who is not this person's page."""
    name, _, value = app.credentials["cookie"].partition("=")
    key, right = app.credentials["x-floe-key"], app.credentials
    link = app.link.partition("?t=")[2]
    other = {"cookie": f"{name}={secrets.token_urlsafe(32)}", "x-floe-key": secrets.token_urlsafe(32)}
    return {"nothing": {}, "another launch": other, "cookie": {"cookie": right["cookie"]}, "key": {"x-floe-key": key},
            "cookie, wrong key": {"cookie": right["cookie"], "x-floe-key": value},
            "key, wrong cookie": {"cookie": f"{name}={key}", "x-floe-key": key},
            "swapped": {"cookie": f"{name}={key}", "x-floe-key": value},
            "link": {"cookie": f"{name}={link}", "x-floe-key": link, "authorization": f"Bearer {link}"},
            "other name": {"cookie": f"floechat_1={value}", "x-floe-key": key},
            "host": right | {"host": "evil.example"}, "host and port": right | {"host": "127.0.0.1:1"},
            "origin": right | {"origin": "http://evil.example"}, "no origin": right | {"origin": "null"},
            "page elsewhere": right | {"sec-fetch-site": "cross-site"},
            "page of another port": right | {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:1"}}


def noisy(chance: random.Random, headers: dict[str, str]) -> dict[str, bytes]:
    """With the cookies that other programs leave on 127.0.0.1."""
    cookies = [*(f"n{i}={chance.choice(NOISE)}" for i in range(chance.randint(0, 3))), headers.get("cookie", "n=")]
    return {name: value.encode("latin-1") for name, value in (headers | {"cookie": "; ".join(cookies)}).items()}


def filled(path: str) -> str:
    """With the planted conversation wherever a route wants one."""
    return re.sub(r"\{(\w*).*?\}", lambda name: {"kind": "json", "api_name": "predict"}.get(name[1], "1"), path)


def test_no_route_tells_or_does_anything_without_the_right_credentials(app, client, routes):
    chance, credentials = random.Random(10), app.credentials
    planted = {"format": "floechat-conversations", "version": 1, "conversations": [
        {"title": PLANTED, "leaf": 1, "messages": [{"id": 1, "parent_id": None, "role": "user", "text": PLANTED}]}]}
    client.post("/api/import", content=json.dumps(planted), headers=credentials).raise_for_status()
    before, link = client.get("/api/export", headers=credentials).text, app.link
    kinds = wrong(app)
    assert PLANTED in before and len({path for _, path in routes}) >= 55 and len(kinds) == 15
    for method, route in routes:
        for kind, headers in kinds.items():
            path = filled(route) + chance.choice(["", "", "?t=", "?t=wrong", "?a=b"])
            body = None if method in ("GET", "HEAD") else chance.choice(["{}", '{"name": "demo", "text": "x"}', "\0"])
            with client.stream(method, path, headers=noisy(chance, headers), content=body) as reply:
                bare = "cookie" in kind and "wrong cookie" not in kind and method in ("GET", "HEAD") and (
                    route in SHELL or route.startswith(SHELL_BELOW))
                assert bare or reply.status_code in (401, 403, 404, 421), (method, path, kind, reply.status_code)
                told = reply.read().decode("latin-1") + str(reply.headers)
            assert PLANTED not in told and "root:" not in told and "set-cookie" not in reply.headers
            assert credentials["x-floe-key"] not in told and link.partition("?t=")[2] not in told
    assert client.get("/api/export", headers=credentials).text == before and app.link == link


def test_afterwards_the_same_program_answers(app, client, routes):
    client.headers = app.credentials
    for method, path in routes:
        if method == "GET" and path.startswith(("/api/", "/events", "/stats")):
            with client.stream(method, filled(path)) as reply:
                assert reply.status_code in (200, 400, 422), path
    made = client.post("/api/conversations", json={"draft": "a"}).json()["id"]
    client.post(f"/api/conversations/{made}/send", json={"text": "Hello!"}).raise_for_status()

    def newest() -> dict:
        return client.get(f"/api/conversations/{made}").json()["messages"][-1]
    waiting.until(lambda: newest()["role"] == "assistant" and newest()["status"] != "running")
    assert newest()["status"] == "done" and newest()["html"], newest()
