"""The running program refuses everybody but its own browser, and ends with one sentence when it cannot start."""
from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from app.chat.chats import Chats
from app.http.sign_in import PREFERENCE, hashed, own_names
from app.http.start_link import StartLink
from engine import data_dir
from tests.support import browser, waiting
from tests.support.browser import expect

pytestmark = pytest.mark.browser
app, chromium, context, page = browser.app, browser.chromium, browser.context, browser.page
SECONDS = 300  # until an answer comes, on a machine that others keep busy


def get(app, path="/", headers=()):
    return httpx.get(app.address + path, headers=app.credentials | dict(headers), timeout=SECONDS)


def test_the_link_opens_the_page_and_its_parts(app):
    for path in ("/", "/stats", "/api/state", "/ui/conversation/chat.js", "/config"):
        assert get(app, path).status_code == 200, path


def test_the_page_is_there_only_for_this_computer(app):
    port = app.port
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in [a for a in addresses if not a.startswith("127.")]:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2)


@pytest.mark.parametrize("headers, status", [
    ({"host": "evil.example"}, 421), ({"host": "evil.example:80", "origin": "http://evil.example"}, 421),
    ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"sec-fetch-site": "cross-site"}, 403)])
def test_foreign_pages_are_refused_with_the_cookie_too(app, headers, status):
    for path in ("/", "/config", "/stats", "/gradio_api/upload", "/api/state"):
        reply = get(app, path, headers=headers)
        assert reply.status_code == status and "access-control-allow-origin" not in reply.headers


def test_without_the_token_there_is_nothing_and_no_file_is_written(app):
    for path in ("/", "/config", "/stats", "/events", "/api/state", "/ui/conversation/chat.js", "/api/export"):
        assert httpx.get(app.address + path, timeout=SECONDS).status_code == 401, path
    uploads = app.data / "cache" / "gradio"
    before = sorted(uploads.rglob("*"))
    reply = httpx.post(app.address + "/gradio_api/upload", files={"files": ("x.txt", b"x" * 1000)}, timeout=SECONDS)
    assert reply.status_code == 401 and sorted(uploads.rglob("*")) == before and not list(app.data.rglob("x.txt"))


@pytest.mark.parametrize("path", [
    "/ui/../server.py", "/ui/..%2f..%2fapp/server.py", "/ui/%2e%2e/%2e%2e/pyproject.toml", "/ui//etc/passwd",
    "/gradio_api/file=pyproject.toml", "/file=/etc/passwd", "/static//etc/passwd", "/static/../../../etc/passwd",
    "/gradio_api/file=C:/windows/win.ini", "/gradio_api/proxy=http://127.0.0.1:1/", "/monitoring",
    "/gradio_api/file=/etc/passwd",
    "/assets/..%5c..%5cpyproject.toml", "/svelte/../../app.py"])
def test_no_path_leads_to_a_file_of_the_computer(app, path):
    port = app.port
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as raw:  # a client would tidy the path up
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close",
                 *(f"{name}: {value}" for name, value in app.credentials.items()), "", ""]
        raw.sendall("\r\n".join(lines).encode())
        reply = b"".join(iter(lambda: raw.recv(65536), b""))
    status = int(reply.split(b" ", 2)[1])
    assert status in (400, 403, 404, 405, 422), (status, path)
    assert b"root:" not in reply and b"[project]" not in reply


def raw(app, text: str, body: bytes = b"") -> bytes:
    """What comes back on a connection of its own, with the credentials of a page."""
    port = app.port
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        lines = [text, f"Host: 127.0.0.1:{port}", *(f"{name}: {value}" for name, value in app.credentials.items())]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return connection.recv(65536)


def test_what_another_page_can_send_without_asking_is_refused(app):
    """A form, a file and a WebSocket, with the cookie and even the key; and a message of 100 MB before it is read."""
    before = sorted((app.data / "cache" / "gradio").rglob("*"))
    evil = app.credentials | {"origin": "http://evil.example"}
    for given in ({"data": {"text": "x"}}, {"files": {"files": ("x.txt", b"x" * 1000)}}, {"content": b"{}"}):
        for path in ("/api/welcomed", "/gradio_api/upload", "/api/conversations/1/send", "/v1/chat/completions"):
            assert httpx.post(app.address + path, headers=evil, timeout=SECONDS, **given).status_code == 403, path
    assert sorted((app.data / "cache" / "gradio").rglob("*")) == before
    upgrade = ("GET /events HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
               "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://evil.example")
    assert b" 101 " not in raw(app, upgrade)
    large = "POST /api/conversations/1/send HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100000000"
    assert b" 413 " in raw(app, large, b'{"text": "')


def test_a_thousand_connections_that_say_nothing_shut_nobody_out(app):
    """Who is in is answered all the while; who comes newly, once the others have been let go."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    port, crowd = app.port, []
    try:
        with httpx.stream("GET", app.address + "/events", headers=app.credentials, timeout=SECONDS) as page:
            told = page.iter_lines()
            for i in range(1000):
                crowd.append(socket.create_connection(("127.0.0.1", port), timeout=SECONDS))
                with suppress(OSError):  # let go already
                    crowd[-1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
                if i % 100 == 0:
                    next(line for line in told if line.startswith("event: stats"))
            next(line for line in told if line.startswith("event: stats"))

        def newcomer() -> bool:
            with suppress(httpx.TransportError):
                return get(app, "/api/state").status_code == 200
            return False
        waiting.until(newcomer)
    finally:
        for each in crowd:
            each.close()


class Thief(BaseHTTPRequestHandler):
    """Another server of this computer: keeps what the browser sends, and sets cookies as programs do."""

    def do_GET(self):
        self.server.seen.append(dict(self.headers))
        self.send_response(200)
        for cookie in ('state={"a": [1, "b c"]}', "list=[1] (x) @", f"floechat_{self.server.other}=mine; Path=/x"):
            self.send_header("set-cookie", cookie)
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>other</title>")

    def log_message(self, *_):
        pass


@pytest.fixture
def thief(app) -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Thief)
    server.seen, server.other = [], str(app.port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_port_learns_nothing_that_opens_a_conversation(app, page, thief):
    """It is sent the cookie by the browser, and gets the bare page with it; its cookies harm nobody."""
    browser.bring(page, "The secret garden", [{"role": "user", "text": "Where is the key?"}])
    other = page.context.new_page()
    other.goto(f"http://127.0.0.1:{thief.server_port}/")
    stolen = {name: value for name, value in thief.seen[0].items() if name.lower() not in ("host", "connection")}
    assert "floechat_" in stolen["Cookie"] and "x-floe-key" not in map(str.lower, stolen)
    assert other.evaluate("localStorage.getItem('floe-key')") is None
    for path in ("/api/state", "/api/export", "/events", "/stats", "/config", "/api/conversations/1"):
        reply = httpx.get(app.address + path, headers=stolen, timeout=SECONDS)
        assert reply.status_code == 401, path
    bare = httpx.get(app.address + "/", headers=stolen, timeout=SECONDS)
    assert bare.status_code == 200 and "secret garden" not in bare.text
    assert app.credentials["x-floe-key"] not in bare.text
    page.reload()
    browser.ask(page, "Hello!")


def test_a_reload_and_a_second_tab_go_on_and_the_address_has_no_link_in_it(app, page):
    assert page.url.startswith(app.address + "/") and "?" not in page.url
    page.reload()
    browser.wait_ready(page)
    second = page.context.new_page()
    second.goto(app.address)
    browser.wait_ready(second)
    browser.ask(second, "Hello!")
    second.goto(app.link)  # a new one, and then a used one: it is in already
    browser.wait_ready(second)
    second.goto(f"{app.address}/?t=used")
    browser.wait_ready(second)
    assert second.url == app.address + "/"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_pages_that_stayed_open_say_that_the_program_is_gone_and_go_on_later(chromium, tmp_path, ending):
    context = chromium.new_context()
    context.set_default_timeout(browser.PATIENCE_MS)
    with browser.running(tmp_path, program="tests.browser.program") as first:
        pages = [context.new_page(), context.new_page()]  # one holds the stream, the other hears through it
        pages[0].goto(first.link)
        browser.wait_ready(pages[0])
        pages[1].goto(first.address)
        browser.ask(pages[0], "Hello!")
        talk = pages[0].url
        pages[1].goto(talk)
        with first.endless():
            browser.send(pages[1], "Tell me a story about a princess and a wolf.")
            pages[1].wait_for_selector(".message.running")
            first.process.send_signal(ending)
            first.process.wait()
    for page in pages:
        expect(page.locator(".banner.bad")).to_contain_text("Floe Chat isn't running. Start it again")
        expect(page.locator(".spinner:visible, .phase:visible, .work, #stop:visible")).to_have_count(0)
        browser.send(page, "Is anybody there?")
        expect(page.locator("#message")).to_have_value("Is anybody there?")
    with browser.running(tmp_path, "--port", str(first.port)) as again:
        for page in pages:
            expect(page.locator(".banner.bad")).to_contain_text("newest link")
        bookmark = context.new_page()
        bookmark.goto(first.address)
        expect(bookmark.locator("p")).to_contain_text("newest link")
        other = context.new_page()
        other.goto(again.link)
        for page in (other, bookmark, *pages):
            browser.wait_ready(page)
        for page in pages:
            assert page.url == talk
            expect(page.locator("#message")).to_have_value("Is anybody there?")
            expect(page.locator(".message.running")).to_have_count(0)
            page.press("#message", "Enter")
            expect(page.locator(".message.user", has_text="Is anybody there?").last).to_be_visible()
            browser.settled(page)
    context.close()


def test_who_asks_for_a_page_gets_a_page_and_a_script_a_sentence(app):
    for accept, kind in (("text/html,*/*;q=0.8", "text/html"), ("*/*", "text/plain")):
        for place in ("/", "/?t=used", "/api/state"):
            reply = httpx.get(app.address + place, headers={"accept": accept}, timeout=SECONDS)
            assert reply.status_code == 401 and reply.headers["content-type"].startswith(kind)
            assert "newest" in reply.text and "default-src 'self'" in reply.headers["content-security-policy"]
    assert httpx.post(app.address, headers={"accept": "text/html"}, timeout=SECONDS).headers["content-type"].startswith(
        "text/plain")


def test_the_file_that_the_browser_is_started_with_opens_the_page(app, chromium, tmp_path):
    link = StartLink(tmp_path, browser=False)
    link._write(app.link)
    page = chromium.new_context().new_page()
    page.set_default_timeout(browser.PATIENCE_MS)
    page.goto(link.file.as_uri())
    browser.wait_ready(page)
    page.context.close()


def test_a_port_in_use_is_said_in_one_sentence(app, tmp_path):
    port = str(app.port)
    done = subprocess.run([sys.executable, "-m", "app", "--no-browser", "--port", port, "--data", str(tmp_path)],
                          cwd=browser.REPOSITORY, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"Port {port} is in use" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_written_is_in_the_data_folder(app):
    names = {path.relative_to(app.data).parts[0] for path in app.data.iterdir()}
    assert names <= {"models", "logs", "cache", "chats.db", "chats.db-wal", "chats.db-shm", "program.log",
                     "floechat.lock"}


def test_another_device_comes_in_by_the_password(chromium, tmp_path):
    """Over this computer's address in its network, where a browser gives a page no clipboard and no locks."""
    address = next((name for name in own_names() if name[0].isdigit()), None)
    if address is None:
        pytest.skip("this computer is in no network")
    chats = Chats(data_dir(tmp_path) / "chats.db")
    chats.set_preference("welcomed", True)
    command = [sys.executable, "-m", "app", "--lan", "--no-browser", "--port", "0", "--data", str(tmp_path)]
    refused = subprocess.run(command, cwd=browser.REPOSITORY, capture_output=True, text=True, timeout=SECONDS)
    assert refused.returncode == 2 and "Settings, Other devices" in refused.stderr
    chats.set_preference(PREFERENCE, hashed("correct horse battery"))
    chats.close()
    with browser.running(tmp_path, "--lan") as program:
        assert "What is sent is not encrypted" in (tmp_path / "program.log").read_text()
        page = chromium.new_context().new_page()
        page.set_default_timeout(browser.PATIENCE_MS)
        page.goto(f"http://{address}:{program.address.rsplit(':', 1)[1]}/")
        page.get_by_label("Password").fill("a wrong password")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert")).to_have_text("Wrong password.")
        page.get_by_label("Password").fill("correct horse battery")
        page.get_by_role("button", name="Open").click()
        browser.wait_ready(page)
        assert page.evaluate("!navigator.clipboard && !navigator.locks")
        browser.ask(page, "Hello!")
        page.context.close()
