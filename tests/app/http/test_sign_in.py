"""Other devices of the network: a password, few tries, and nothing else becomes weaker."""
from __future__ import annotations

import asyncio
import re

import pytest

from app.http import sign_in
from app.http.request_guard import Guard
from app.http.sign_in import ALL_TRIES, SECONDS, TRIES, SignIn, hashed, matches, own_names
from engine import UserError

PASSWORD, HERE, THERE = "correct horse battery", "192.0.2.7", "192.0.2.50"
STORED = hashed(PASSWORD)


class Net:
    """A guard that lets the network in, with a clock of the test's own."""

    def __init__(self, lan: bool = True):
        self.reached, self.now = [], 0.0
        self.sign_in = SignIn(lambda: STORED, (HERE, "box"), lambda: self.now) if lan else None
        self.guard = Guard(self._application, 7860, lambda link: None, lan=self.sign_in)

    async def _application(self, scope, receive, send):
        self.reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    def ask(self, path="/", *, method="GET", body=b"", client=THERE, **headers):
        """Status, headers, text."""
        return asyncio.run(self.asking(path, method=method, body=body, client=client, **headers))

    async def asking(self, path, *, method, body, client, **headers):
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": body}
        pairs = {"host": f"{HERE}:7860", "content-length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()}
        await self.guard({"type": "http", "method": method, "path": path, "query_string": b"", "client": (client, 5),
                          "headers": [(name.encode(), value.encode()) for name, value in pairs.items() if value]},
                         receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"].decode()

    def enter(self, password: str, **options):
        return self.ask("/sign-in", **{"method": "POST", "body": f"password={password.replace(' ', '+')}".encode(),
                                       "origin": f"http://{HERE}:7860"} | options)


def test_the_password_opens_what_the_link_opens():
    net = Net()
    status, headers, page = net.ask(accept="text/html")
    assert status == 401 and "action=/sign-in" in page and "form-action 'self'" in str(headers)
    status, headers, page = net.enter(PASSWORD)
    cookie = headers[b"set-cookie"].decode()
    assert status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie and PASSWORD not in page
    key = re.search(r"'floe-key', \"(.*?)\"", page)[1]
    assert net.ask("/api/state", cookie=cookie.split(";")[0], x_floe_key=key)[0] == 200
    assert net.reached == ["/api/state"]


def test_without_lan_there_is_no_such_door():
    net = Net(lan=False)
    assert net.enter(PASSWORD)[0] == 421
    assert net.enter(PASSWORD, host="127.0.0.1:7860", origin="http://127.0.0.1:7860")[0] == 401 and not net.reached


@pytest.mark.parametrize("given, status", [
    ({"host": "evil.example"}, 421), ({"host": "192.0.2.8:7860"}, 421), ({"origin": "http://evil.example"}, 403),
    ({"origin": "null"}, 403), ({"origin": None}, 403), ({"sec_fetch_site": "cross-site"}, 403),
    ({"content_length": "9999999"}, 403), ({"transfer_encoding": "chunked"}, 403), ({"content_length": "x"}, 403)])
def test_forms_of_other_pages_are_refused_with_the_right_password(given, status):
    net = Net()
    assert net.enter(PASSWORD, **given)[0] == status and len(net.sign_in._tries) == 0


def test_few_tries_of_a_device_and_of_all_and_those_that_come_together_count():
    net = Net()
    for _ in range(TRIES):
        assert net.enter("wrong horse battery")[0] == 401
    assert net.enter(PASSWORD)[0] == 429 and "wait" in net.enter(PASSWORD)[2]
    assert net.enter(PASSWORD, client="192.0.2.51")[0] == 200
    net.now = SECONDS + 1
    assert net.enter(PASSWORD)[0] == 200

    async def flood() -> list[int]:
        asked = [net.asking("/sign-in", method="POST", body=b"password=x", client=f"192.0.2.{i}",
                            origin=f"http://{HERE}:7860") for i in range(3 * ALL_TRIES)]
        return [status for status, *_ in await asyncio.gather(*asked)]
    net.now += SECONDS + 1
    assert sorted(set(flood_statuses := asyncio.run(flood()))) == [401, 429] and flood_statuses.count(401) == ALL_TRIES


def test_what_is_kept_is_not_the_password_and_takes_memory_to_try(monkeypatch):
    again = hashed(PASSWORD)
    assert again["salt"] != STORED["salt"] and again["hash"] != STORED["hash"] and PASSWORD not in str(again)
    assert matches(PASSWORD, again) and not matches(PASSWORD + "x", again)
    assert 128 * sign_in.COST["n"] * sign_in.COST["r"] >= 16 << 20
    for stored in ({}, {"salt": 5, "hash": None}, {"salt": "zz", "hash": "00"}, {"salt": "00", "hash": ""}):
        assert not matches(PASSWORD, stored)
    for bad in ("short", "x" * 1001):
        with pytest.raises(UserError, match="at least 10"):
            hashed(bad)
    compared = []
    monkeypatch.setattr(sign_in.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or False)
    matches(PASSWORD, again)
    assert len(compared) == 1 and own_names()
