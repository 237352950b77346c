"""The log turns over and holds nobody's words; the zip holds what helps, and names nobody."""
from __future__ import annotations

import getpass
import io
import json
import logging
import socket
import zipfile
from pathlib import Path, PureWindowsPath

import pytest

from app import diagnostics
from app.diagnostics import LOG, LOGS, Redaction, bundle, start_log
from app.server import Parts
from engine import FIRST_LIGHT, Options, data_dir, demo_model

TEXT = "Where did I bury the treasure of Captain Flint?"
KEY = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def parts(tmp_path):
    parts = Parts.make(data_dir(tmp_path / "data of Zoë"), demo_model(), Options(device="cpu"))
    parts.jobs.start()
    yield parts
    parts.close()


@pytest.fixture
def log(parts):
    handler = start_log(parts.around.data)
    yield logging.getLogger("app.somewhere")
    logging.getLogger().removeHandler(handler)
    handler.close()


def opened(data: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_zip_helps_and_names_nobody(parts, log, tmp_path):
    conversation = parts.chats.create(settings={"system": "You are Flint's parrot."})
    parts.chats.add(conversation.id, None, "user", TEXT)
    parts.chats.set_preference("server", {"address": "http://10.0.0.7/v1", "key": KEY, "models": ["m"]})
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.jsonl").write_text('{"step": "fill", "gigabytes_per_second": 21.5}\n')
    (parts.around.data / "cache" / FIRST_LIGHT).write_text(str(rows))
    home, data = Path.home(), parts.around.data
    log.warning("%s/models and %s, of %s at %s: Bearer abc.def, /?t=%s, %s", home, data, getpass.getuser(),
                socket.gethostname(), "x" * 43, KEY)
    parts.around.look()
    assert opened(bundle(parts, None))["plan.txt"] == parts.models.step + "\n"
    parts.models.state = "failed"
    files = opened(bundle(parts, None))
    about = json.loads(files["about.json"])
    assert about["machine"]["ram_total_bytes"] > 0 and about["libraries"]["torch"] and about["conversations"] == 1
    assert "tokens" in files["plan.txt"] and "gigabytes_per_second" in files["first-light.jsonl"]
    assert "HOME/models and DATA, of USER at HOST: SECRET, /?t=SECRET, SECRET" in files["log.txt"]
    everything = "\n".join(files.values())
    for word in (TEXT, "parrot", KEY, "Zo", "10.0.0.7", *([str(home)] if len(str(home)) > 1 else [])):
        assert word not in everything, word
    given = opened(bundle(parts, conversation.id))
    assert TEXT in given["conversation.json"] and "parrot" in given["conversation.json"]


def test_an_error_is_logged_without_the_words_it_was_about(parts, log):
    try:
        json.loads("{" + TEXT)
        raise AssertionError
    except ValueError as error:
        log.error("It failed", exc_info=ValueError(f"first line\n{TEXT}").with_traceback(error.__traceback__))
    text = (parts.around.data / "logs" / LOG).read_text()
    assert "It failed" in text and "ValueError: first line" in text and "decoder.py:" in text and TEXT not in text


def test_the_log_turns_over_and_a_full_disk_stops_nobody(parts, monkeypatch):
    monkeypatch.setattr(diagnostics, "LOG_BYTES", 5_000)
    handler = start_log(parts.around.data)
    try:
        for i in range(400):
            logging.getLogger("app").warning("line %d %s", i, "x" * 90)
        folder = parts.around.data / "logs"
        assert len(list(folder.glob(f"{LOG}*"))) == LOGS + 1
        assert max(path.stat().st_size for path in folder.glob(f"{LOG}*")) <= 5_000
        monkeypatch.setattr(handler, "emit", lambda record: handler.handleError(record))
        logging.getLogger("app").warning("nobody hears this")
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@pytest.mark.parametrize("text, redacted", [
    ("token sk-abcdefgh1234 end", "token SECRET end"), ("http://127.0.0.1:7860/?t=a-b_c", "http://127.0.0.1:7860/?t=SECRET"),
    ("authorization: bearer x.y.z", "authorization: SECRET"), ("a plain line of 8 words stays as it is", None)])
def test_what_looks_like_a_key(tmp_path, text, redacted):
    assert Redaction(tmp_path)(text) == (redacted or text)


def test_folders_as_windows_writes_them(tmp_path, monkeypatch):
    home = "C:\\Users\\Someone Else"
    monkeypatch.setattr(Path, "home", lambda: PureWindowsPath(home))
    monkeypatch.setattr(PureWindowsPath, "resolve", lambda self: self, raising=False)
    redact = Redaction(tmp_path)
    for written in (home, home.lower(), home.replace("\\", "/"), json.dumps(home)[1:-1]):
        assert redact(f"<{written}>") == "<HOME>", written
