"""The private environment: whole or not there at all. Real pip and real packages, but small ones in torch's place."""
from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from installer import bootstrap, environment
from installer.screen import Screen, Trouble

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "installer" / "pins" / "requirements.lock").read_text(encoding="utf-8")
BUILD = """
import sys
from pathlib import Path
from installer import environment
from installer.screen import Screen
app, torch, lock = map(Path, sys.argv[1:])
environment.build(app, environment.Recipe("cpu", torch, (lock,)), Screen(app / "log"))
"""


def block(name: str) -> str:
    """One package of the lock, with its hashes."""
    return re.search(rf"(?ms)^{name}==.*?(?=^\w|\Z)", LOCK)[0]


@pytest.fixture
def screen(tmp_path) -> Screen:
    return Screen(tmp_path / "log")


def recipe(folder: Path, *names: str, torch: str = "idna") -> environment.Recipe:
    """A lock of these packages; in torch's place another that is as small."""
    (folder / "torch-cpu.txt").write_text(f"# a comment\n{block(torch).split()[0]}\n", encoding="utf-8")
    (folder / "some.lock").write_text("".join(map(block, names)), encoding="utf-8")
    return environment.Recipe("cpu", folder / "torch-cpu.txt", (folder / "some.lock",))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, environment.Recipe]:
    """An environment of two small packages, made once for this file."""
    app = tmp_path_factory.mktemp("Flöe é Chat")
    made = recipe(app, "tqdm")
    try:
        environment.build(app, made, Screen(app / "log"))
    except Trouble as trouble:
        if "cannot be reached" in str(trouble):
            pytest.skip("needs the package index")
        raise
    return app, made


@pytest.mark.slow
def test_a_whole_environment_is_found_again(whole):
    app, made = whole
    found = environment.ready(app, made)
    assert found.folder == app / made.tag()
    listed = subprocess.run([found.python, "-c", "import tqdm, idna; print('both')"], capture_output=True, text=True,
                            env=found.variables(app / "cache"))
    assert listed.stdout == "both\n", listed.stderr


@pytest.mark.slow
def test_a_changed_lock_is_built_beside_the_old_one(whole, tmp_path, screen):
    app, made = tmp_path / "app", whole[1]
    shutil.copytree(whole[0], app, symlinks=True)
    newer = recipe(tmp_path, "tqdm", "h11")
    assert newer.tag() != made.tag() and environment.ready(app, newer) is None
    environment.build(app, newer, screen)
    assert environment.ready(app, newer) and environment.ready(app, made), "the old one is kept for going back"
    newest = recipe(tmp_path, "h11")
    environment.build(app, newest, screen)
    assert environment.ready(app, newest) and environment.ready(app, newer)
    assert environment.ready(app, made) is None and not (app / made.tag()).exists(), "but only one"


@pytest.mark.slow
def test_without_the_index_the_previous_one_is_used(whole, tmp_path, screen, monkeypatch):
    for name, value in (("PIP_INDEX_URL", "http://127.0.0.1:9/simple"), ("PIP_CONFIG_FILE", os.devnull),
                        ("PIP_RETRIES", "0"), ("PIP_FIND_LINKS", ""), ("PIP_EXTRA_INDEX_URL", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "PAUSES", ())
    with pytest.raises(Trouble, match="cannot be reached|no "):
        environment.build(tmp_path, recipe(tmp_path, "h11"), screen)
    assert environment.previous(tmp_path) is None
    app = tmp_path / "app"
    shutil.copytree(whole[0], app, symlinks=True)
    monkeypatch.setattr(bootstrap, "PINS", ROOT / "installer" / "pins")
    args = bootstrap._parser().parse_args(["--cpu"])
    assert bootstrap._environment(args, app, screen).folder == app / whole[1].tag()
    assert "previous installation" in (tmp_path / "log").read_text(encoding="utf-8")


class Index(BaseHTTPRequestHandler):
    """A package index on the loopback interface with one wheel; `refuses` answers of it are errors."""

    wheel: bytes
    refuses: int
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        page = f'<a href="/tiny-1.0-py3-none-any.whl#sha256={hashlib.sha256(self.wheel).hexdigest()}">tiny</a>'
        body = self.wheel if self.path.endswith(".whl") else page.encode()
        self.send_response(503 if len(self.asked) <= self.refuses else 200)
        self.send_header("Content-Type", "text/html" if body is not self.wheel else "application/zip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def index(monkeypatch):
    """Call it with the number of requests that are refused; -> what was asked for. pip alone would not try again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    asked: list[str] = []
    handler = type("Handler", (Index,), {"wheel": buffer.getvalue(), "refuses": 0, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for name, value in (("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple"),
                            ("PIP_CONFIG_FILE", os.devnull), ("PIP_RETRIES", "0"), ("PIP_EXTRA_INDEX_URL", ""),
                            ("PIP_FIND_LINKS", ""), ("NO_PROXY", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(environment, "PAUSES", (0, 0))

        def refuse(n: int) -> list[str]:
            handler.refuses = n
            return asked
        yield refuse
        server.shutdown()


@pytest.fixture
def empty(tmp_path) -> environment.Environment:
    made = environment.Environment(tmp_path / "env")
    subprocess.run([sys.executable, "-m", "venv", made.folder], check=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("refused, whole", [(0, True), (2, True), (99, False)])
def test_a_network_that_fails_for_a_moment_is_tried_again_and_not_for_ever(index, empty, tmp_path, screen, refused,
                                                                           whole):
    asked = index(refused)
    wanted = partial(environment.install, empty, ["tiny==1.0"], tmp_path, screen)
    if not whole:
        with pytest.raises(Trouble, match="no tiny==1.0"):
            wanted()
        assert len(asked) == 1 + len(environment.PAUSES)
        return
    wanted()
    assert list(empty.folder.glob("lib/python*/site-packages/tiny.py")) and len(asked) == refused + 2   # page and wheel
    log = (tmp_path / "log").read_text(encoding="utf-8") if refused else ""
    assert log.count("Trying again") == refused


@pytest.mark.slow
def test_repair_makes_it_anew_though_nothing_seems_wrong(tmp_path, screen, monkeypatch):
    made = recipe(tmp_path, "h11")
    (tmp_path / "requirements.lock").write_text(made.locks[0].read_text())
    monkeypatch.setattr(bootstrap, "PINS", tmp_path)
    monkeypatch.setattr(bootstrap, "FIRST_IMPORTS", "import h11")
    parse = bootstrap._parser().parse_args
    file = bootstrap._environment(parse(["--cpu"]), tmp_path, screen).folder
    file = next(file.glob("lib/python*/site-packages/h11/_version.py"))
    before = file.read_text()
    file.write_text("spoiled, and of the same name")
    bootstrap._environment(parse(["--cpu"]), tmp_path, screen)
    assert file.read_text() != before
    bootstrap._environment(parse(["--cpu", "--repair"]), tmp_path, screen)
    assert file.read_text() == before


@pytest.mark.slow
def test_a_package_that_was_tampered_with_is_refused(tmp_path, screen):
    made = recipe(tmp_path, "h11")
    lock = made.locks[0]
    lock.write_text(re.sub(r"sha256:\w{64}", "sha256:" + "0" * 64, lock.read_text()))
    with pytest.raises(Trouble, match="not the one|cannot be reached"):
        environment.build(tmp_path, made, screen)
    assert environment.ready(tmp_path, made) is None


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_nothing_that_counts(tmp_path, screen):
    made = recipe(tmp_path, "h11")
    process = subprocess.Popen([sys.executable, "-c", BUILD, tmp_path, made.torch, made.locks[0]], cwd=ROOT,
                               start_new_session=True, stdout=subprocess.DEVNULL)
    while not list((tmp_path / made.tag()).glob("lib/python*/site-packages/*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert environment.ready(tmp_path, made) is None
    environment.build(tmp_path, made, screen)
    assert environment.ready(tmp_path, made)


@pytest.mark.parametrize("lost", ["bin/python", "half"])
@pytest.mark.slow
def test_a_damaged_environment_is_noticed(whole, tmp_path, lost):
    app = tmp_path / "app"
    shutil.copytree(whole[0], app, symlinks=True)
    assert environment.ready(app, whole[1])
    folder = app / whole[1].tag()
    for file in sorted(folder.glob("lib/python*/site-packages/**/*.py"))[::2] if lost == "half" else [folder / lost]:
        file.unlink()
    assert environment.ready(app, whole[1]) is None


@pytest.mark.parametrize("written", ["", "{", "[]", "7", "{}", '{"cc": null}', '{"cc": null, "n_files": "many"}',
                                     "[" * 100_000])
def test_a_damaged_stamp_counts_as_none(tmp_path, written):
    stamp = tmp_path / "ready" / "x.json"
    stamp.parent.mkdir()
    stamp.write_text(written)
    (tmp_path / "x" / "bin").mkdir(parents=True)
    (tmp_path / "x" / "bin" / "python").touch()
    assert environment._stamped(tmp_path, stamp) is None


def test_not_enough_room_is_said_before_anything_is_done(tmp_path, screen, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    made = recipe(tmp_path, "h11")
    with pytest.raises(Trouble, match=r"4\.3 GB are needed in .*, 0\.2 GB are free"):
        environment.build(tmp_path, made, screen)
    assert not (tmp_path / made.tag()).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_meanwhile(tmp_path, monkeypatch):
    small = tmp_path / "disk"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setattr(environment, "_check_disk", lambda app, recipe: None)
        with pytest.raises(Trouble, match="disk is full"):
            environment.build(small, recipe(tmp_path, "h11"), Screen(small / "log"))
        assert environment.ready(small, recipe(tmp_path, "h11")) is None
    finally:
        subprocess.run(["umount", "-l", small])


@pytest.mark.parametrize("output, sentence", [
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
    ("WARNING: Retrying ... Failed to establish a new connection: NewConnectionError(...)\nERROR: No matching "
     "distribution found for torch==2.13.0+cpu", "cannot be reached"),
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "not the one"),
    ("ERROR: No matching distribution found for torch==2.13.0+cpu", "no torch==2.13.0+cpu"),
    ("ERROR: HTTP error 503 while getting https://index/torch.whl", "cannot be reached"),
    ("WARNING: Connection timed out while downloading.\npip._vendor.urllib3.exceptions.ProtocolError: ('Connection "
     "broken: IncompleteRead(1 bytes read, 2 more expected)')", "cannot be reached"),
    ("something else", "why is not known"),
    ("ERROR: Could not install packages due to an OSError: Missing dependencies for SOCKS support.", "names a proxy"),
    ("OSError: Could not find a suitable TLS CA certificate bundle, invalid path: /no/ca.pem", "file of certificates"),
])
def test_what_pip_says_becomes_a_sentence(output, sentence):
    trouble = environment.why(output)
    assert sentence in str(trouble) and isinstance(trouble, environment.Passing) == (sentence == "cannot be reached")


def test_other_pythons_do_not_leak_in(monkeypatch, tmp_path):
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONOPTIMIZE", "PIP_TARGET", "VIRTUAL_ENV",
                 "PIP_CONSTRAINT", "PIP_REQUIRE_HASHES", "PIP_DRY_RUN", "PIP_ROOT", "TMPDIR"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    variables = environment.clean_variables(tmp_path)
    assert "/elsewhere" not in variables.values()
    assert variables["PIP_INDEX_URL"] == "https://mirror.example/simple", "the computer's own configuration is honoured"
    assert Path(variables["TMPDIR"]).is_dir() and variables["TMPDIR"].startswith(str(tmp_path))
    assert variables["PIP_USER"] == "0" and variables["PIP_CACHE_DIR"].startswith(str(tmp_path))


def test_what_killed_programs_left_goes_after_a_day(tmp_path):
    temporary = tmp_path / "tmp"
    for name in ("old", "young"):
        (temporary / name).mkdir(parents=True)
        (temporary / name / "part").write_text("x")
        (temporary / f"{name}.txt").write_text("x")
    (temporary / "link").symlink_to(tmp_path)
    for name in ("old", "old.txt", "link"):
        os.utime(temporary / name, (1, 1), follow_symlinks=False)
    environment.clear_temporary(tmp_path)
    assert sorted(path.name for path in temporary.iterdir()) == ["young", "young.txt"]
    assert (temporary / "young" / "part").is_file() and tmp_path.is_dir()


def test_of_pips_own_files_only_the_way_to_the_index_counts(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    own = tmp_path / "pip.conf"
    own.write_text("[global]\nindex-url = https://mirror.example/simple\nextra-index-url =\n    https://a.example\n"
                   "    https://b.example\nrequire-hashes = true\n[install]\ntarget = /elsewhere\ndry-run = true\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(own))
    variables = environment.pip_variables(sys.executable, tmp_path)
    assert variables["PIP_INDEX_URL"] == "https://mirror.example/simple"
    assert variables["PIP_EXTRA_INDEX_URL"].split() == ["https://a.example", "https://b.example"]
    assert "/elsewhere" not in variables.values() and variables["PIP_CONFIG_FILE"] == os.devnull
    kept = {name for name in variables if name.startswith("PIP_")}
    assert kept.isdisjoint({"PIP_TARGET", "PIP_DRY_RUN", "PIP_REQUIRE_HASHES"})


def test_the_variable_that_cannot_be_used_is_named(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9/")
    assert "ALL_PROXY=socks://127.0.0.1:9/" in str(environment.why("Missing dependencies for SOCKS support."))
