"""One running program per folder, shown in the browser only when its port answers. The program is a small server."""
from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from installer import instance
from installer.screen import Screen, Trouble
from tests.support import waiting

ROOT = Path(__file__).resolve().parents[2]
wait_for = waiting.until
SERVER = """
import socket, sys, time
place = socket.create_server(("127.0.0.1", 0)) if len(sys.argv) < 2 else None
port = place.getsockname()[1] if place else 9
print("loading", flush=True)
time.sleep(0.5)
print(f"http://127.0.0.1:{port}/?t=used", flush=True)
print(f"http://127.0.0.1:{port}/?t=abc-DEF_123", flush=True)
time.sleep(60)
"""
HOLDER = """
import sys
from pathlib import Path
from installer import instance
from installer.screen import Screen
app = Path(sys.argv[1])
lock = instance.Lock(app / "run.lock")
assert lock.taken
instance.run([sys.executable, "-c", sys.argv[2]], app, lock, Screen(app / "log"), browser=False)
"""


@pytest.fixture
def app(tmp_path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.fixture
def holder(app):
    """Another launcher, with its program."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(app), SERVER], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()  # it has announced its page
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Links that the browser is led to by the private file that it is started with, while their port answers."""
    links = []

    def browse(address: str) -> bool:
        file = Path(url2pathname(urlsplit(address).path))
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 or sys.platform == "win32"
        link = instance.LINK.search(file.read_bytes())[0].decode()
        port = int(link.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            links.append(link)
        return True
    monkeypatch.setattr(instance.webbrowser, "open", browse)
    monkeypatch.setenv("DISPLAY", ":0")
    return links


def test_the_browser_opens_when_the_port_answers(app, opened):
    def press_ctrl_c() -> None:
        wait_for(lambda: opened)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=press_ctrl_c).start()
    lock = instance.Lock(app / "run.lock")
    assert instance.run([sys.executable, "-c", SERVER], app, lock, Screen(app / "log"), True) == 0
    assert len(opened) == 1 and opened[0].endswith("/?t=abc-DEF_123")
    assert "abc-DEF_123" not in (app / "log").read_text(), "the key to the page does not belong into the log"


def test_a_second_start_shows_the_first_page(app, holder, opened):
    lock = instance.Lock(app / "run.lock")
    assert not lock.taken
    assert instance.show_running(app, lock, Screen(app / "log"), browser=True)
    assert opened == [instance.running(app)]


@pytest.mark.skipif(sys.platform == "win32", reason="there the program ends with its window")
def test_the_page_is_found_after_the_launcher_was_killed(app, holder):
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(holder.pid)], capture_output=True, text=True).stdout
    holder.kill()
    holder.wait()
    try:
        lock = instance.Lock(app / "run.lock")
        assert not lock.taken, "the program itself still holds the lock"
        assert instance.show_running(app, lock, Screen(app / "log"), browser=False)
    finally:
        os.kill(int(children), signal.SIGKILL)
    wait_for(lock.take)


def test_ending_the_launcher_ends_the_program(app, holder):
    assert instance.running(app)
    holder.send_signal(signal.SIGINT)
    holder.wait(300)
    assert instance.running(app) is None
    assert instance.Lock(app / "run.lock").taken


def test_a_lock_that_comes_free_is_taken_over(app, holder):
    instance.forget(app)  # as if it were still installing
    lock = instance.Lock(app / "run.lock")
    threading.Timer(1, lambda: holder.send_signal(signal.SIGINT)).start()
    assert not instance.show_running(app, lock, Screen(app / "log"), browser=False)
    assert lock.taken


def test_only_this_user_can_read_the_key(app, holder):
    assert stat.S_IMODE((app / "logs" / "app.log").stat().st_mode) == 0o600


def test_a_program_that_ends_at_once_gets_its_sentence_shown(app):
    lock = instance.Lock(app / "run.lock")
    code = "import sys; print('noise'); print('Port 80 is taken; choose another.', file=sys.stderr); sys.exit(2)"
    with pytest.raises(Trouble, match="Port 80 is taken") as caught:
        instance.run([sys.executable, "-c", code], app, lock, Screen(app / "log"), browser=True)
    assert caught.value.code == 2


def test_a_link_without_a_port_behind_it_is_no_page(app):
    (app / "logs" / "app.log").write_text("http://127.0.0.1:9/?t=abc")
    assert instance.running(app) is None
