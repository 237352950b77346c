"""The running program refuses everybody but its own browser, and ends with one sentence when it cannot start."""
from __future__ import annotations

import socket
import subprocess
import sys

import browser
import httpx
import pytest

pytestmark = pytest.mark.browser
app = browser.app
SECONDS = 300  # until an answer comes, on a machine that others keep busy


def get(app, path="/", **options):
    with httpx.Client(timeout=SECONDS) as client:
        client.get(app.link)  # the cookie
        return client.request(options.pop("method", "GET"), app.address + path, **options)


def test_the_link_opens_the_page_and_its_parts(app):
    for path in ("/", "/stats", "/api/state", "/ui/chat.js", "/config"):
        assert get(app, path).status_code == 200, path


def test_the_page_is_there_only_for_this_computer(app):
    port = int(app.address.rsplit(":", 1)[1])
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
    for path in ("/", "/config", "/stats", "/events", "/api/state", "/ui/chat.js", "/api/export"):
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
    with httpx.Client(timeout=SECONDS) as client:
        client.get(app.link)
        port = int(app.address.rsplit(":", 1)[1])
        jar = "; ".join(f"{cookie.name}={cookie.value}" for cookie in client.cookies.jar)
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as raw:  # a client would tidy the path up
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Cookie: {jar}", "Connection: close", "", ""]
        raw.sendall("\r\n".join(lines).encode())
        reply = b"".join(iter(lambda: raw.recv(65536), b""))
    status = int(reply.split(b" ", 2)[1])
    assert status in (400, 403, 404, 405, 422), (status, path)
    assert b"root:" not in reply and b"[project]" not in reply


def test_a_port_in_use_is_said_in_one_sentence(app, tmp_path):
    port = app.address.rsplit(":", 1)[1]
    done = subprocess.run([sys.executable, "-m", "app", "--no-browser", "--port", port, "--data", str(tmp_path)],
                          cwd=browser.REPOSITORY, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"Port {port} is in use" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_written_is_in_the_data_folder(app):
    names = {path.relative_to(app.data).parts[0] for path in app.data.iterdir()}
    assert names <= {"models", "logs", "cache", "chats.db", "chats.db-wal", "chats.db-shm", "program.log"}
