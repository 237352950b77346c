"""What stands in the way of the start is one sentence, and the next start that nothing stands in the way of is fine."""
from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from app.__main__ import _keep_inside, _listen, main
from app.chat.chats import Chats
from engine import data_dir, only_one
from engine.__main__ import _keep_compiled
from tests.support.browser import SECONDS, ready, running
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]
START = [sys.executable, "-m", "app", "--no-browser", "--port", "0"]


@pytest.fixture(autouse=True)
def rights():
    """The program narrows what it writes to its owner; the tests go on as before."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder with a conversation."""
    made = data_dir(tmp_path / "data")
    chats = Chats(made / "chats.db")
    chats.add(chats.create("Rivers").id, None, "user", "Where does the Danube end? " * 2000)
    chats.close()
    return made


# What neither a page of this computer nor a model of the disk needs.
OUTSIDE = {"ALL_PROXY": "socks://127.0.0.1:9/", "all_proxy": "socks5://127.0.0.1:9/", "HTTP_PROXY": "ftp://127.0.0.1:9/",
           "HTTPS_PROXY": "socks5h://127.0.0.1:9/", "SSL_CERT_FILE": "/nonexistent/cacert.pem",
           "SSL_CERT_DIR": "/nonexistent", "REQUESTS_CA_BUNDLE": "/nonexistent/ca.pem", "CURL_CA_BUNDLE": "/none"}


def test_the_page_and_the_model_need_no_way_outside_and_a_search_says_which_variable_is_wrong(tmp_path, monkeypatch):
    with ExitStack() as stack:
        with monkeypatch.context() as around:
            for name, value in OUTSIDE.items():
                around.setenv(name, value)
            app = stack.enter_context(running(tmp_path))
        with httpx.Client(base_url=app.address, headers=app.credentials, timeout=SECONDS, trust_env=False) as client:
            assert "floe" in client.get("/").text
            until(lambda: ready(client.get("/stats").json()), SECONDS)
            told = client.get("/api/models/search", params={"q": "qwen"})
        assert told.status_code == 400 and re.search(r"The variable (\w+) names", told.text)[1] in OUTSIDE


def refused(said: str, code: int, *codes: int) -> str:
    lines = said.strip().splitlines()
    assert code in codes and len(lines) == 1 and lines[0].endswith("."), said
    return lines[0]


def test_a_second_program_on_one_data_folder_is_refused_and_the_next_is_not(data, capfd):
    with subprocess.Popen([*START, "--data", str(data)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert "http://127.0.0.1:" in first.stdout.readline()
            for same in (data, data / ".." / data.name):
                code = main(["--no-browser", "--port", "0", "--data", str(same)])
                assert "is running already with the data folder" in refused(capfd.readouterr().err, code, 2)
        finally:
            first.send_signal(signal.SIGKILL)
    with only_one(data / "floechat.lock", "the killed one holds it still"):
        pass
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (data, *data.rglob("*"))} == {0}


@pytest.mark.parametrize("damage", ["noise", "a folder", "a text"])
def test_a_database_that_cannot_be_opened_is_said(data, damage, capfd):
    file = data / "chats.db"
    for path in data.glob("chats.db*"):
        path.unlink()
    if damage == "a folder":
        file.mkdir()
    else:
        file.write_bytes({"noise": b"\xa5\x00\x3c" * 3000, "a text": b"Dear diary, " * 900}[damage])
    said = refused(*reversed((main(["--no-browser", "--port", "0", "--data", str(data)]), capfd.readouterr().err)), 2)
    assert str(file) in said


@pytest.mark.parametrize("folder, said", [("~nosuch/x", "no path on this computer"), ("/proc/x", "cannot be used"),
                                          ("/dev/null/x", "cannot be used"), ("/x\ny", "cannot be seen")])
def test_a_data_folder_that_cannot_be(folder, said, capfd):
    code = main(["--no-browser", "--port", "0", "--data", folder])
    assert said in refused(capfd.readouterr().err, code, 2)


def on_disk(data: Path, mount: str, fill: bool = False) -> tuple[str, int]:
    """The program on a disk of its own (a tmpfs in a mount namespace) with what is in the data folder; -> what it
    said, its exit code."""
    steps = [f'cp -r "{data}" "$1"', f'mount -t tmpfs -o size=2m none "{data}"', f'cp -r "$1/." "{data}"',
             *(f'dd if=/dev/zero of="{data}/{name}" bs={size} 2>/dev/null; true' for name, size in
               (("filler", "64k"), ("filler2", "1")) if fill), f'mount -o remount,{mount} "{data}"', 'shift; exec "$@"']
    inside = ["unshare", "-rm", "sh", "-c", " && ".join(steps), "sh", str(data.parent / "copy")]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs unprivileged mount namespaces (unshare -rm)")
    subprocess.run(["rm", "-rf", str(data.parent / "copy")], check=True)
    done = subprocess.run([*inside, *START, "--data", str(data)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.stderr, done.returncode


@pytest.mark.parametrize("mount, fill, there, words", [
    ("ro", False, True, "cannot be written to"), ("ro", False, False, "cannot be written to"),
    ("rw", True, True, "disk is full|has room"), ("rw", True, False, "disk is full|has room")])
def test_a_disk_that_takes_nothing_is_said(data, mount, fill, there, words):
    if not there:
        (data / "chats.db").unlink()
    assert re.search(words, refused(*on_disk(data, mount, fill), 2, 3))


def test_the_body_of_an_answer_does_not_wait_for_an_acknowledgement_of_its_head():
    async def accepted() -> int:
        options = asyncio.get_running_loop().create_future()

        def connected(_, writer: asyncio.StreamWriter) -> None:
            options.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
        with _listen(0) as listener:
            async with await asyncio.start_server(connected, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                writer.close()
                return await options
    assert asyncio.run(accepted())


def test_what_is_compiled_stays_in_the_data_folder(monkeypatch, tmp_path):
    """However the program is started, unless a person has named another place."""
    (tmp_path / "cache").mkdir()
    names = {"NUMBA_CACHE_DIR": "numba", "TRITON_CACHE_DIR": "triton"}
    for keep, folder in ((_keep_inside, tmp_path), (_keep_compiled, tmp_path / "cache")):
        monkeypatch.setattr(os, "environ", {})
        keep(folder)
        assert {name: os.environ[name] for name in names} == {
            name: str(tmp_path / "cache" / where) for name, where in names.items()}
        os.environ["TRITON_CACHE_DIR"] = "elsewhere"
        keep(folder)
        assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
