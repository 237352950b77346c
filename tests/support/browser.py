"""A real browser (Debian's Chromium, driven by Playwright) on the real program with the embedded model.

The program runs as a person would start it, in a folder of its own. Every page is watched: a request that leaves
loopback, or an error in the console, fails the test that caused it.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from engine import demo_model

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 240  # two slow cores that others use as well
PATIENCE_MS = 1000 * SECONDS
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class App:
    """One running program; `address` alone opens nothing. inside: a command that runs it, if any. program: the module
    that is run; tests/browser/program.py has answers that `endless` keeps from ending."""

    def __init__(self, data: Path, *arguments: str, inside: tuple[str, ...] = (), program: str = "app"):
        command = [*inside, sys.executable, "-m", program, "--no-browser", "--port", "0", "--device", "cpu",
                   "--level", "balanced", "--data", str(data)]
        self._endless = data.parent / f"{data.name}.endless"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                                    "FLOE_TEST_ENDLESS": str(self._endless)}
        self.data, self.log = data, open(data / "program.log", "w+")
        self.started = time.monotonic()
        self.process = subprocess.Popen([*command, *arguments], cwd=REPOSITORY, stdout=self.log, stderr=self.log,
                                        env=environment)
        try:
            self.address = "http://" + urlsplit(self._wait_for_link()).netloc
        except BaseException:
            self.close()
            raise

    @property
    def link(self) -> str:
        """The newest: each works once."""
        return re.findall(r"http://\S+", (self.data / "program.log").read_text())[-1]

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    @cached_property
    def credentials(self) -> dict[str, str]:
        """The headers of a page that came in through a link."""
        reply = httpx.get(self.link, timeout=SECONDS)
        key = re.search(r"'floe-key', \"([\w-]+)\"", reply.text)
        return {"x-floe-key": key[1], "cookie": reply.headers["set-cookie"].split(";")[0]}

    @contextmanager
    def endless(self) -> Iterator[None]:
        """Inside, an answer goes on until it is stopped; behind it, it comes to its end."""
        self._endless.touch()
        try:
            yield
        finally:
            self._endless.unlink()

    def _wait_for_link(self) -> str:
        while time.monotonic() - self.started < 600:
            found = re.search(r"http://\S+", (self.data / "program.log").read_text())
            if found:
                return found.group(0)
            assert self.process.poll() is None, (self.data / "program.log").read_text()
            time.sleep(0.05)
        raise AssertionError("the program did not answer")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()


@contextmanager
def running(data: Path, *arguments: str, inside: tuple[str, ...] = (), program: str = "app") -> Iterator[App]:
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    app = App(data, *arguments, inside=inside, program=program)
    try:
        yield app
    finally:
        app.close()


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[App]:
    with running(tmp_path_factory.mktemp("data"), program="tests.browser.program") as app:
        yield app


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False,
                                             args=["--disable-dev-shm-usage", "--disable-gpu"])
        yield browser
        browser.close()


class Watch:
    """What a page must not do."""

    def __init__(self):
        self.foreign: list[str] = []
        self.errors: list[str] = []

    def over(self, page) -> None:
        page.on("request", self._request)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _console(self, message) -> None:
        if message.type == "error" and "status of 400" not in message.text:  # a sentence, which the page shows
            self.errors.append(message.text)

    def _request(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1":
            self.foreign.append(request.url)

    def check(self) -> None:
        assert self.foreign == [], self.foreign
        assert self.errors == [], self.errors


# Notices go after some seconds; window.told has those of a page, however late a test comes to look.
TOLD = """window.told = [];
document.addEventListener('DOMContentLoaded', () => new MutationObserver(() => {
  for (const { textContent } of document.querySelectorAll('.notice'))
    if (!told.includes(textContent)) told.push(textContent);
}).observe(document.body, {childList: true, subtree: true}));"""


@pytest.fixture
def context(app, chromium):
    """A browser profile of its own, with the clipboard allowed; its pages are watched."""
    watch = Watch()
    context = chromium.new_context(viewport={"width": 1400, "height": 860}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=app.address)
    context.on("page", watch.over)
    context.add_init_script(TOLD)
    yield context
    context.close()
    watch.check()


@pytest.fixture
def page(app, context):
    """The open page, the model ready, the first run over, nothing left to answer of an earlier test."""
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    httpx.post(app.address + "/api/welcomed", json={"done": True}, headers=app.credentials, timeout=SECONDS)
    page.goto(app.link)
    wait_ready(page)
    page.evaluate(STOP_ALL)
    until(page, lambda: not state(page)["live"])
    side(page, "Engine")  # which most tests read
    return page


def side(page, tab: str) -> None:
    """Open the right column, which is closed at first, at this tab."""
    page.locator(".opener").first.wait_for()
    there = page.get_by_role("tab", name=tab)
    if not there.is_visible():
        page.get_by_title(tab, exact=True).click()
    there.click()


STOP_ALL = """async () => {
  const { waiting } = await (await fetch('/api/state')).json();
  for (const { id } of waiting) await fetch(`/api/waiting/${id}`, { method: 'DELETE' });
  await fetch('/api/stop', { method: 'POST' });
}"""


def expect(thing):
    """Playwright's assertion about a page or an element: it looks again until it holds, as long as PATIENCE_MS.

    What it reads does not depend on what has been laid out: a message far from the window has no inner text yet.
    """
    from playwright.sync_api import expect
    expect.set_options(timeout=PATIENCE_MS)
    return expect(thing)


def told(page, words: str) -> None:
    """Wait until the page has said so in a notice, since it was loaded."""
    page.wait_for_function("words => told.some(text => text.includes(words))", arg=words)


def wait_ready(page) -> None:
    page.wait_for_selector("#message", state="attached")  # a page may lie over it
    until(page, lambda: ready(stats(page)))
    page.wait_for_selector(".banner:empty", state="attached")
    page.wait_for_selector("#near input[type=number]:enabled", state="attached")  # Gradio's controls have answered too


def ready(now: dict) -> bool:
    assert now["state"] != "failed", now["step"]
    return now["state"] == "ready"


def until(page, condition, seconds: float = SECONDS) -> None:
    """Wait for something outside the page's own document (Playwright's wait_for_function awaits no promise)."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        page.wait_for_timeout(100)


def stats(page) -> dict:
    """The engine's own numbers; nothing is ready while a busy program lets a connection go."""
    return page.evaluate("fetch('/stats').then(reply => reply.json()).catch(() => ({state: 'unheard'}))")


def send(page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def state(page) -> dict:
    """What the page is told when anything changes: model, answer, queue, conversations, work."""
    return page.evaluate("fetch('/api/state').then(reply => reply.json())")


def settled(page) -> None:
    """Wait until nothing is being answered and the page shows the conversation's newest message as finished."""
    until(page, lambda: page.evaluate(SETTLED))


SETTLED = """async () => {
  const told = async url => (await fetch(url, { signal: AbortSignal.timeout(10_000) })).json();
  const { live, waiting } = await told('/api/state').catch(() => ({ live: true }));  // no answer: asked again
  const drawn = [...document.querySelectorAll('.message')], id = location.hash.slice(2);
  if (live || waiting.length || !drawn.length || !id) return false;
  const { messages } = await told(`/api/conversations/${id}?limit=1`).catch(() => ({ messages: [{ id: 0 }] }));
  return drawn.at(-1).dataset.id === String(messages[0].id) && !drawn.some(m => m.classList.contains('running'));
}"""


# Presses Stop at the first sign of a phase (the beginning of its words), faster than any hand; then window.pressed.
STOP_AT = """words => new MutationObserver(() => {
  const phase = document.querySelector('.message.running .phase');
  if (!phase || !phase.textContent.startsWith(words) || window.pressed) return;
  window.pressed = true;
  document.querySelector('#stop').click();
}).observe(document.querySelector('.messages'), {childList: true, subtree: true, characterData: true})"""


def ask(page, text: str):
    """Send, wait for the whole answer; its element."""
    with page.expect_response(lambda reply: reply.url.endswith("/send")) as sent:
        send(page, text)
    settled(page)
    return page.locator(f".message[data-id='{sent.value.json()['message']}']")


@contextmanager
def begun(app, page, text: str) -> Iterator[None]:
    """Send, and wait until some words of the answer are there. Inside, it does not end by itself."""
    with app.endless():
        send(page, text)
        expect(page.locator(".message.running .answer")).to_have_text(re.compile(r".{10}", re.DOTALL))
        yield


def new_chat(page, question: str = "Hello!") -> None:
    page.click("#new-chat")
    page.wait_for_selector(".hero")
    ask(page, question)


def bring(page, title: str, messages: list[dict]) -> None:
    """Import a conversation, each message under the one before it, and open it."""
    numbered = [{"id": i, "parent_id": i - 1 or None} | message for i, message in enumerate(messages, 1)]
    document = {"format": "floechat-conversations", "version": 1,
                "conversations": [{"title": title, "leaf": len(messages), "messages": numbered,
                                   "created_at": time.time()}]}  # which tells it from one that is there
    made = page.evaluate("""text => fetch('/api/import', {method: 'POST', body: text,
        headers: {'content-type': 'text/plain'}}).then(reply => reply.json())""", json.dumps(document))["made"]
    page.evaluate(f"location.hash = 'c{made[0]['id']}'")
    newest = page.evaluate(f"fetch('/api/conversations/{made[0]['id']}?limit=1').then(reply => reply.json())")
    page.wait_for_selector(f".message[data-id='{newest['messages'][0]['id']}']")


def violations(page) -> list[str]:
    """What axe-core calls critical or serious, with the element."""
    package = pytest.importorskip("axe_playwright_python")
    source = next(Path(package.__file__).parent.rglob("axe.min.js")).read_text()
    page.evaluate(source + ";0")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{v['id']}: {node['html'][:120]}" for v in found if v["impact"] in ("critical", "serious")
            for node in v["nodes"]]
