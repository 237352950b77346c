"""A conversation that another server answers: named in Settings, chosen in the conversation, seen at every answer."""
from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app.chat.chats import Chats
from app.remote.server import Servers
from engine import Sampling, UserError
from tests.app.remote.model_server import chunk, model_server
from tests.support import browser
from tests.support.browser import ask, expect, send, settled, state, until, violations

pytestmark = pytest.mark.browser
app, chromium, context, page = browser.app, browser.chromium, browser.context, browser.page


def name_server(page, address: str, key: str) -> None:
    page.get_by_role("link", name="Settings").click()
    page.get_by_label("Address", exact=True).fill(address)
    expect(page.locator("#preferences-server")).not_to_contain_text("undefined")
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Ask for its models").click()


def test_a_conversation_on_another_server(app, page):
    page.emulate_media(reduced_motion="reduce")
    with model_server() as server:
        name_server(page, server.address, "secret")
        expect(page.locator("#server-models")).to_contain_text("big-moe")
        assert page.get_by_label("Key", exact=True).input_value() == "" and "secret" not in page.content()
        assert violations(page) == []
        page.click("#new-chat")
        page.get_by_role("tab", name="Chat").click()
        page.get_by_label("Answered by").select_option("big-moe")
        host = f"127.0.0.1:{server.server_port}"
        expect(page.locator("#model-chip")).to_contain_text(host)
        answer = ask(page, "Hello!")
        expect(answer.locator(".answer")).to_have_text("Hello, wörld!")
        expect(answer.locator(".thought .md")).to_have_text("Let me see.")
        expect(answer.locator(".stats")).to_contain_text(f"big-moe{host}")
        page.get_by_role("tab", name="Engine").click()
        expect(page.locator("#floe-panel")).to_contain_text("answers this chat")
        expect(page.locator("#speed-now")).to_be_hidden()
        expect(page.locator("#near")).to_be_hidden()
        for dark in (False, True):
            page.evaluate(f"document.body.classList.toggle('dark', {json.dumps(dark)})")
            assert violations(page) == [], dark
        held = threading.Event()
        server.answers = [(chunk(content="Half an answer"), held)]
        send(page, "And now?")
        expect(page.locator(".message.running .answer")).to_have_text("Half an answer")
        page.click("#stop")
        settled(page)
        expect(page.locator(".message.assistant").last).to_contain_text("Half an answer")
        held.set()
        asked = len(server.asked)
        page.click("#new-chat")
        expect(page.locator("#model-chip")).not_to_contain_text(host)
        ask(page, "And you?")
        assert len(server.asked) == asked
        server.answers = [(chunk(content="Half"), "cut")]
        page.evaluate(f"location.hash = 'c{state(page)['conversations'][1]['id']}'")
        until(page, lambda: host in page.locator("#model-chip").inner_text())
        ask(page, "Once more?")
        expect(page.locator(".message.assistant").last).to_contain_text("in the middle of the answer")


def test_a_server_that_is_slow_to_name_its_models_holds_nobody(app, page):
    with model_server() as server:
        server.hold = threading.Event()
        name_server(page, server.address, "")
        asked = page.locator("#preferences-server")
        until(page, lambda: server.keys)
        asked.get_by_role("button", name="Stop").click()
        asked.get_by_role("button", name="Ask for its models").wait_for()
        until(page, server.gone.is_set)  # the program has left it, too, and keeps nothing of it
    kept = page.evaluate("fetch('/api/preferences/server').then(reply => reply.json())")
    assert kept.get("address") != server.address


def test_our_own_api_is_such_a_server(app, tmp_path):
    """Another copy of this program on another port."""
    key = httpx.post(f"{app.address}/api/preferences/programs/keys", json={"name": "the other one"},
                     headers=app.credentials, timeout=browser.SECONDS).json()["key"]
    with ThreadPoolExecutor(1) as thread:  # as an answer's own: in the main one runs Playwright's loop
        thread.submit(_asked, app, key, tmp_path).result()


def _asked(app, key: str, folder: Path) -> None:
    chats = Chats(folder / "chats.db")
    servers = Servers(chats)
    (name,) = servers.choose(f"{app.address}/v1", key).models[:1]
    events = list(servers.model(name).chat([{"role": "user", "content": "Hello!"}], Sampling(max_tokens=20), {},
                                           threading.Event()))
    assert "".join(event.text for event in events if event.kind == "answer").strip()
    assert events[-1].kind == "end" and events[-1].reason in ("stop", "length") and events[-1].n_tokens > 0
    with pytest.raises(UserError, match="does not accept the key"):
        servers.choose(f"{app.address}/v1", "wrong")
    chats.close()
