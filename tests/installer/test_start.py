"""From a downloaded folder to an answer in the browser, with the real launcher, packages, desktop tools and Chromium.

One environment is installed for the whole file, in a folder with blanks and letters beyond ASCII; the tests run in
order on it, as a person would come back to it: killed while installing, double-clicked, started again without a
network, started twice, damaged, uninstalled.
"""
from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine import choose_models_dir
from tests.support import waiting
from tests.support.browser import CHROMIUM, ask, expect, until, wait_ready

ROOT = Path(__file__).resolve().parents[2]
until_there = waiting.until
PARTS = ("app", "assets", "engine", "installer", "kernels", "pyproject.toml")
PORT = 7961
PATIENCE = 1500     # seconds for a start on a machine that others keep busy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600),     # it installs everything, three times
              pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the Linux launcher")]


class Launch:
    """One start of the launcher, in a process group of its own."""

    def __init__(self, person: Person, *arguments: str, before: tuple[str, ...] = ()):
        self.output = person.home / f"output-{time.monotonic_ns()}"
        self.began = time.monotonic()
        self.process = subprocess.Popen([*before, "sh", person.folder / "installer" / "start.sh", *arguments],
                                        stdout=self.output.open("wb"), stderr=subprocess.STDOUT, env=person.variables,
                                        stdin=subprocess.DEVNULL, start_new_session=True)

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def wait_said(self, what: str, seconds: float = PATIENCE) -> None:
        while what not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() - self.began < seconds, self.said
            time.sleep(0.05)

    def end(self, with_signal: int = signal.SIGINT) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, with_signal)
            self.process.wait(300)


class Person:
    """A home, and the downloaded folder in it."""

    def __init__(self, home: Path):
        self.home, self.folder = home, home / "Heruntergeladen é" / "Floe Chat"
        for part in PARTS:
            source, target = ROOT / part, self.folder / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        dropped = ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "FLOECHAT_HOME", "PYTHONPATH", "BROWSER")
        self.variables = {name: value for name, value in os.environ.items() if name not in dropped}
        self.variables |= {"HOME": str(home)} | _pip_configuration()
        self.app = self.folder / ".app"
        self.data = home / ".local" / "share" / "floechat"
        self.launches: list[Launch] = []

    @property
    def stamps(self) -> list[Path]:
        return list((self.app / "ready").glob("*.json"))

    def start(self, *arguments: str, **options) -> Launch:
        self.launches.append(Launch(self, *arguments, **options))
        return self.launches[-1]

    def run(self, *arguments: str) -> tuple[int, str]:
        """A start that ends by itself."""
        launch = self.start(*arguments)
        launch.process.wait(600)
        return launch.process.returncode, launch.said


def _pip_configuration() -> dict[str, str]:
    """The settings of this computer's pip, which another HOME would hide."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = re.findall(r"^global\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
    return {"PIP_" + name.upper().replace("-", "_"): value.replace("\\n", " ") for name, value in found}


@pytest.fixture(scope="module")
def person(tmp_path_factory) -> Iterator[Person]:
    """Installed in two goes: the first is killed in the middle."""
    person = Person(tmp_path_factory.mktemp("home"))
    try:
        _install(person)
        yield person
    finally:
        for launch in person.launches:
            launch.end(signal.SIGKILL)


def _install(person: Person) -> None:
    first = person.start("--no-browser", "--cpu")
    while not list(person.app.glob("cpu-*/lib/python*/site-packages/gradio*")):
        if first.process.poll() is not None and "cannot be reached" in first.said:
            pytest.skip("needs the package index")
        assert first.process.poll() is None, first.said
        time.sleep(0.1)
    first.end(signal.SIGKILL)
    assert person.stamps == []
    second = person.start("--no-browser", "--cpu")
    second.wait_said("Starting ...")
    compiled = list(person.app.glob("cpu-*/lib/python*/site-packages/gradio/__pycache__/blocks.*.pyc"))
    assert compiled, "the first start would compile what it imports"
    second.wait_said("Floe Chat is at")
    second.end()


def test_the_second_go_installed_everything(person):
    log = (person.app / "logs" / "launcher.log").read_text(encoding="utf-8")
    assert len(person.stamps) == 1 and log.count("Installing what Floe Chat needs") == 2
    assert re.search(r"Self-check on processor.* the kernels work\.", log)
    assert not list(person.app.glob("*/lib/python*/site-packages/nvidia")), "gigabytes of CUDA for nothing"
    python = next(person.app.glob("cpu-*")) / "bin" / "python"
    shown = subprocess.run([python, "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True)
    assert shown.stdout == "None\n"


@pytest.mark.browser
def test_a_double_click_ends_in_an_answer(person, tmp_path):
    """install_shortcut.sh, gtk-launch, a terminal window, the default browser: nothing between is ours."""
    for tool in ("gtk-launch", "xvfb-run", "xterm"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    if not (ROOT / "assets" / "demo" / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    sync_api = pytest.importorskip("playwright.sync_api")
    with socket.create_server(("127.0.0.1", 0)) as free:
        debugging = free.getsockname()[1]
    browser = tmp_path / "browser"
    flags = f'--no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-port={debugging}'
    browser.write_text(f'#!/bin/sh\nexec "{CHROMIUM}" {flags} --user-data-dir="{tmp_path}/profile" "$@"\n')
    browser.chmod(0o755)
    subprocess.run(["sh", person.folder / "installer/menus/install_shortcut.sh"], check=True, env=person.variables,
                   stdout=subprocess.DEVNULL)
    # A number of its own: two that look for a free screen at one moment (test_scripts.py) find the same.
    clicked = subprocess.Popen(["xvfb-run", "-a", "-n", "150", "sh", "-c", f"gtk-launch floechat; sleep {PATIENCE}"],
                               start_new_session=True, env=person.variables | {"BROWSER": str(browser)},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with sync_api.sync_playwright() as playwright:
            chromium = _connect(playwright, debugging)
            page = next(page for page in chromium.contexts[0].pages if "127.0.0.1" in page.url)
            page.set_default_timeout(300_000)
            wait_ready(page)
            expect(ask(page, "Tell me a story about a small boat.").locator(".answer")).not_to_be_empty()
            until(page, lambda: "t=" not in page.url)
    finally:
        _end_session(person, clicked)


def _connect(playwright, port: int):
    """To the browser that the launcher has opened, as soon as it shows the program: Playwright learns of a page's
    later addresses only while one of its own calls runs."""
    def shows() -> bool:
        try:
            tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=10).json()
        except httpx.TransportError:
            return False
        return any(tab["url"].startswith("http://127.0.0.1") for tab in tabs)
    until_there(shows, PATIENCE)
    return playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}")


def _end_session(person: Person, clicked: subprocess.Popen) -> None:
    """The window is closed: the launcher in it gets the signal that a closed terminal sends."""
    os.killpg(clicked.pid, signal.SIGTERM)
    clicked.wait(300)
    until_there(lambda: _lock_is_free(person))


def _lock_is_free(person: Person) -> bool:
    import fcntl
    with (person.app / "run.lock").open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def test_the_second_start_is_quick(person):
    """Nothing is installed or asked again; under 3 s of work before the program starts, however busy the computer."""
    launch = person.start("--no-browser", "--cpu")
    launch.wait_said("Starting ...")
    numbers = Path(f"/proc/{launch.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    assert sum(map(int, numbers[11:15])) / os.sysconf("SC_CLK_TCK") < 3  # its own time and that of what it ran
    launch.wait_said("Floe Chat is at")
    launch.end()
    assert "Installing what Floe Chat needs" not in launch.said
    assert launch.process.returncode in (0, 130)


def test_two_at_once_are_one(person):
    first, second = person.start("--no-browser", "--cpu"), person.start("--no-browser", "--cpu")
    until_there(lambda: "Floe Chat is at" in first.said and "Floe Chat is at" in second.said)
    links = {re.search(r"http://\S+", launch.said)[0] for launch in (first, second)}
    said = [launch for launch in (first, second) if "already running" in launch.said]
    assert len(links) == 1 and len(said) == 1
    until_there(lambda: said[0].process.poll() is not None)
    assert said[0].process.returncode == 0
    code, refused = person.run("--uninstall")
    assert code == 2 and "Close it first" in refused
    first.end()
    second.end()


def test_a_port_in_use_is_one_sentence(person):
    with socket.create_server(("127.0.0.1", PORT)):
        code, said = person.run("--no-browser", "--cpu", "--port", str(PORT))
    assert code == 2 and str(PORT) in said and "Traceback" not in said and "launcher.log" in said


def test_the_second_start_needs_no_network(person):
    """In a network of its own that reaches nothing but itself, where this user may make one."""
    alone = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a network namespace")
    launch = person.start("--no-browser", "--cpu", before=alone)
    launch.wait_said("Floe Chat is at")
    launch.end()


def test_offline_with_half_of_the_environment_gone(person):
    files = sorted(next(person.app.glob("cpu-*/lib/python*/site-packages/transformers")).rglob("*.py"))
    for file in files[::2]:
        file.unlink()
    code, said = person.run("--no-browser", "--cpu", "--offline")
    assert code == 3 and "--offline" in said and "Traceback" not in said


def test_half_of_the_environment_gone(person):
    """After the test above: it is made anew."""
    launch = person.start("--no-browser", "--cpu")
    launch.wait_said("Floe Chat is at")
    launch.end()
    assert "Installing what Floe Chat needs" in launch.said and len(person.stamps) == 1


def test_uninstalling_leaves_only_what_was_kept(person):
    subprocess.run(["sh", person.folder / "installer/menus/install_shortcut.sh"], check=True, env=person.variables,
                   stdout=subprocess.DEVNULL)
    choose_models_dir(str(person.home / "large disk"), person.data)
    code, said = person.run("--uninstall")
    assert code == 0 and str(person.data) in said and str(person.home / "large disk") in said
    assert not person.app.exists() and not list(person.folder.rglob("__pycache__"))
    left = [path.relative_to(person.home) for path in person.home.rglob("*") if "floe" in path.name.lower()]
    kept = {Path(".local/share/floechat"), person.folder.relative_to(person.home)}
    inside = [path for path in left if not any(one in (path, *path.parents) for one in kept)]
    assert inside == [], "neither shortcut nor settings stay"
