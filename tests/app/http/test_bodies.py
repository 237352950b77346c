"""Every route of the page's scripts, asked with what no script of ours sends: a sentence, and the program goes on."""
from __future__ import annotations

import json
import os
import re
import secrets
import warnings

import pytest
from fastapi import FastAPI

from app import incoming, server
from app.http import api
from app.library import folders
from app.server import Parts
from engine import Options, demo_model
from tests.app.chat.test_import import HOSTILE
from tests.support.waiting import until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient

IDS = ["0", "-1", str(2**63), "9" * 400, "1.5", "abc", "null", "%00", "1e3", "true", "[1]"]
BODIES = {  # whole bodies that no route takes
    "nothing": b"", "half": b'{"text": "a', "a list": b"[]", "a text": b'"a"', "a number": b"7", "null": b"null",
    "NaN": b"NaN", "deep": b"[" * 100_000, "deep and closed": b'{"text":' * 50_000 + b"1" + b"}" * 50_000,
    "no text": b"\xff\xfe\x00", "an unknown name": b'{"colour": "blue"}',
    "too large": b'{"text": "%s"}' % (b"x" * (17 << 20)),
    "digits": b'{"text": ' + b"9" * 5000 + b"}",
}
VALUES = [None, True, 0, 2**63, 1.5, float("nan"), float("inf"), "", "x" * 1_000_001, "\0", "a\nb", "\ud800", [], [1],
          {}, {"a": {}}, [{"name": "a"}], [{"name": "a", "text": 1}], [{"name": "a", "text": "\0"}],
          [{"name": "n", "text": "x"}] * 101, [{"name": "a", "text": "x" * 1_000_001}], [None] * 100_000]
BROWSER = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    parts = Parts.make(data, demo_model(), Options(device="cpu", level="balanced"))
    parts.jobs.start()
    parts.models.open()
    yield parts
    parts.close()


@pytest.fixture(scope="module")
def routes(parts):
    return server.routes(parts)


@pytest.fixture(scope="module")
def client(routes):
    app = FastAPI()
    api.speak_in_sentences(app)
    app.include_router(routes)
    with TestClient(app, raise_server_exceptions=True) as client:
        yield client


@pytest.fixture(autouse=True)
def no_file_manager(monkeypatch):
    monkeypatch.setattr(folders, "OPENERS", {name: "true" for name in ("darwin", "linux", "win32")})


def is_refused(reply, *, always=True):
    """4xx and one sentence; always=False: or done."""
    if reply.status_code < 300 and not always:
        return
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text[:300])
    said = reply.json()["error"]
    assert said.endswith(".") and "\n" not in said and len(said) < 600, said


def asked(routes):
    """(method, path, fields of the body) of every route."""
    for route in routes.routes:
        fields = route.body_field.field_info.annotation.model_fields if route.body_field else {}
        for method in route.methods:
            yield method, route.path, fields


def answers(client, parts):
    """The same program still answers a question."""
    tab = secrets.token_hex(8)
    parts.drafts.change(tab, lambda stored: {"max_tokens": 8})
    made = client.post("/api/conversations", json={"draft": tab}).json()
    until(lambda: parts.models.state == "ready")
    sent = client.post(f"/api/conversations/{made['id']}/send", json={"text": "Tell me a story."})
    assert sent.status_code == 200, sent.text
    until(lambda: parts.jobs.live is None and not parts.chats.waiting())
    shown = client.get(f"/api/conversations/{made['id']}").json()["messages"]
    assert shown[-1]["status"] in ("done", "length") and shown[-1]["html"]


def test_ids_that_cannot_be(client, routes, parts):
    seen = 0
    for method, path, _ in asked(routes):
        for bad in IDS if "{" in path else ():
            reply = client.request(method, re.sub(r"\{\w*_id\}", bad, path).replace("{kind}", "md"), json={"text": "x"})
            is_refused(reply)
            seen += 1
    assert seen > 100
    answers(client, parts)


def test_ids_of_nothing(client, routes, parts):
    """What has been deleted in another tab may be asked for."""
    for method, path, fields in asked(routes):
        if "{" in path:
            body = {"text": "x"} if "text" in fields else {} if fields else None
            place = re.sub(r"\{\w*_id\}", "987654321", path).replace("{kind}", "json")
            is_refused(client.request(method, place, json=body), always=method == "GET")
    answers(client, parts)


def test_names_on_the_disk_that_no_text_can_hold(client, tmp_path):
    try:
        (tmp_path / os.fsdecode(b"bad\xff")).mkdir()
    except OSError:
        pytest.skip("this disk has no such names")
    reply = client.get("/api/models/files", params={"path": f"{tmp_path}{os.sep}", "kind": "folder"})
    assert len(reply.json()) == 1


def test_hostile_imports_leave_a_program_that_answers(client, parts):
    before = parts.chats.conversations()
    for name, text in HOSTILE.items():
        reply = client.post("/api/import", content=text.encode(), headers={"content-type": "text/plain"})
        assert reply.status_code == 400, name
        is_refused(reply)
    assert parts.chats.conversations() == before
    answers(client, parts)


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_none(client, routes, parts, name):
    seen = 0
    for method, path, fields in asked(routes):
        if fields or path == "/api/import":
            place = re.sub(r"\{\w*_id\}", "1", path)
            is_refused(client.request(method, place, content=BODIES[name], headers=BROWSER))
            seen += 1
    assert seen > 15
    if name == "digits":
        answers(client, parts)


def test_every_name_with_every_value_and_without_one(client, routes, parts):
    seen = 0
    for method, path, fields in asked(routes):
        place = re.sub(r"\{\w*_id\}", "987654321", path)
        for name in fields:
            whole = {other: "a" for other in fields if fields[other].is_required()}
            missing = {other: value for other, value in whole.items() if other != name}
            is_refused(client.request(method, place, json=missing))
            is_refused(client.request(method, place, json=whole | {"no such name": 1}))
            for value in VALUES:
                body = json.dumps(whole | {name: value})
                is_refused(client.request(method, place, content=body, headers=BROWSER), always=False)
                seen += 1
    assert seen > 400
    answers(client, parts)


def test_without_a_type_or_with_another(client, routes):
    for method, path, fields in asked(routes):
        for kind in ({}, {"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=x"}):
            if fields:
                place = re.sub(r"\{\w*_id\}", "1", path)
                is_refused(client.request(method, place, content=b'{"text": "a"}', headers=kind))


@pytest.mark.parametrize("query", [
    "", "?q=" + "x" * 1001, "?limit=x", "?limit=" + "9" * 400, "?context=x", "?context=-1", "?context=" + "9" * 400,
    "?name=%00&context=5", "?name=" + "x" * 300, "?path=~nosuch/x", "?path=%00", "?path=a%0ab", "?path=" + "x" * 5000,
    "?kind=none", "?level=" + "x" * 300])
def test_queries(client, routes, query):
    for method, path, _ in asked(routes):
        if method == "GET":
            reply = client.get(re.sub(r"\{\w*_id\}", "987654321", path).replace("{kind}", "md") + query)
            is_refused(reply, always=False)


@pytest.mark.parametrize("words", [
    "\0", "a\0b", '"', "'; DROP TABLE messages; --", "*", "a* NEAR(", "%" * 900, "( " * 400, "a " * 499, "\ufffe", "^a",
    "".join(f"{n} " for n in range(200)), "{a b}", "-", "text:", "\x02", "𐍈" * 1000])
def test_a_search_takes_any_text(client, words):
    assert isinstance(client.get("/api/search", params={"q": words}).json(), list)


def test_a_message_is_measured_before_any_work(client, parts):
    """It is refused for its size, with nothing stored and no word of templates."""
    made = client.post("/api/conversations", json={"draft": "large"}).json()
    place = f"/api/conversations/{made['id']}/send"
    for text in ("x" * (incoming.TEXT_CHARACTERS + 1), "x" * (100 << 20)):
        reply = client.post(place, json={"text": text})
        is_refused(reply)
        assert "template" not in reply.text
    assert parts.chats.path(made["id"]) == []
    said = client.post(place, json={"attachments": [{"name": "/a/b.txt", "text": "x" * 1_000_001}]}).json()["error"]
    assert said.startswith("b.txt is larger")
    is_refused(client.post(place, json={"attachments": [{"name": "a", "text": "x" * 1_000_000}] * 3}))
    assert parts.chats.path(made["id"]) == []


def test_a_file_of_a_message_is_read_by_its_place(client, parts):
    made = client.post("/api/conversations", json={"draft": "files"}).json()
    files = [{"name": "a.txt", "text": "red"}, {"name": "b.txt", "text": "green"}]
    message = parts.chats.add(made["id"], None, "user", "q", attachments=files)
    place = f"/api/messages/{message.id}/attachments"
    assert [client.get(f"{place}/{i}").json() for i in (0, 1)] == files
    for wrong in (2, -1, 2**40, "x"):
        is_refused(client.get(f"{place}/{wrong}"))
    is_refused(client.get("/api/messages/987654321/attachments/0"))


def test_half_an_emoji_is_replaced_wherever_it_is_written(client, parts):
    def sent(method, path, **body):
        reply = client.request(method, f"/api/{path}", content=json.dumps(body), headers=BROWSER)
        assert reply.status_code == 200, reply.text
        return reply.json()
    half, shown = "a\ud83d b\ude00 \ud83d\ude00", "a\ufffd b\ufffd \U0001f600"
    made = sent("POST", "conversations", draft="h\ud83d")["id"]
    settings = f"settings?whose={made}"
    assert sent("PATCH", f"conversations/{made}", title=half)["title"] == shown
    assert sent("PATCH", settings, changes={"system": half, "stop": [half]})["settings"] == {
        "system": shown, "stop": [shown]}
    assert sent("POST", settings.replace("?", "/preset?"), name=half)["preset"] == shown
    sent("DELETE", settings.replace("?", "/preset?"), name=half)
    sent("POST", f"conversations/{made}/send", text=half, attachments=[{"name": half, "text": half}])
    until(lambda: parts.jobs.live is None and not parts.chats.waiting())
    question = parts.chats.path(made)[0]
    assert (question.text, question.attachments) == (shown, [{"name": shown, "text": shown}])
    assert sent("POST", "count", text=half)["tokens"]
    assert client.get("/api/search?q=%ED%A0%BD").status_code == 200
    assert [found["id"] for found in client.get("/api/search", params={"q": "a\ufffd b\ufffd"}).json()] == [made]


def test_titles_have_an_end(client):
    made = client.post("/api/conversations", json={"draft": "title"}).json()
    place = f"/api/conversations/{made['id']}"
    is_refused(client.patch(place, json={"title": "x" * 201}))
    assert client.patch(place, json={"title": " a\n b ", "pinned": True}).json()["title"] == "a b"


def test_a_database_that_is_damaged_under_a_running_program(client, parts):
    """What is asked next is answered, and the page is told where the damaged file is kept."""
    answers(client, parts)
    file = parts.chats.file
    parts.chats._rows("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(file, "r+b") as opened:
        opened.seek(4096)
        opened.write(b"\xa5" * (file.stat().st_size - 4096))
    parts.chats._rows("PRAGMA shrink_memory")
    answers(client, parts)
    assert str(file.with_name("chats.db.damaged-1")) in client.get("/api/state").json()["disk_trouble"]
