"""The start link stands where only this user can read it, and as long as it works."""
from __future__ import annotations

import os
import shlex
import stat
import sys

import pytest

from app.http.start_link import StartLink
from tests.support import waiting

URL = "http://127.0.0.1:7860/?t=secret"


@pytest.mark.skipif(sys.platform == "win32", reason="there a browser is no command")
def test_the_browser_is_started_with_a_file_that_only_this_user_can_read(tmp_path, monkeypatch, capsys):
    told = tmp_path / "arguments"
    program = tmp_path / "browser"
    program.write_text(f'#!/bin/sh\nprintf %s "$*" > {shlex.quote(str(told))}.new; mv "{told}.new" "{told}"\n')
    program.chmod(0o700)
    monkeypatch.setenv("BROWSER", str(program))
    link = StartLink(tmp_path, browser=True)
    link.file.write_text("somebody else's")
    os.chmod(link.file, 0o666)
    link.announce(URL)
    waiting.until(told.exists)
    assert told.read_text() == link.file.as_uri(), "`ps` shows this to every user"
    assert stat.S_IMODE(link.file.stat().st_mode) == 0o600 and URL in link.file.read_text()
    assert URL in capsys.readouterr().out
    link.entered(URL + "2")
    assert not link.file.exists() and URL + "2" in capsys.readouterr().out


def test_without_a_browser_there_is_no_file(tmp_path, capsys):
    StartLink(tmp_path, browser=False).announce(URL)
    assert URL in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_a_window_that_is_gone_stops_nobody_from_coming_in(tmp_path, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError
    monkeypatch.setattr("builtins.print", gone)
    StartLink(tmp_path, browser=False).entered(URL)


def test_a_disk_that_takes_no_file_leaves_the_printed_link(tmp_path, capsys):
    StartLink(tmp_path / "gone", browser=True).announce(URL)
    assert URL in capsys.readouterr().out
