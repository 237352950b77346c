"""What `check.sh` does before it tests: the system's packages, with an apt-get in the way that fails as told."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from installer import check, environment
from installer.screen import Screen

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the fake apt-get is a shell script")


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Put an apt-get on the path whose first `fails` installations of each package end with `reason`; -> its calls."""
    calls, tool = tmp_path / "calls", tmp_path / "bin" / "apt-get"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(environment, "PAUSES", (0, 0))
    wanted = (("no-such-tool", "some-tool"), ("no/such/file", "some-fonts"), ("sh", "dash"))    # the last is there
    monkeypatch.setattr(check, "SYSTEM", wanted)

    def failing(fails: int, reason: str = "E: Failed to fetch http://index/some.deb  Connection timed out") -> Path:
        tool.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >> "{calls}"\n'
                        f'if [ $(grep -c "^$last$" "{calls}") -le {fails} ]; then echo "{reason}" >&2; exit 100; fi\n')
        tool.chmod(0o755)
        return calls
    return failing


def installed(tmp_path, capsys) -> tuple[str, str]:
    """What was said, and the log."""
    check.system_packages(Screen(tmp_path / "log"))
    return capsys.readouterr().out, (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize("fails", [0, 2])
def test_a_download_that_fails_once_or_twice_is_tried_again(apt, tmp_path, capsys, fails):
    calls = apt(fails)
    said, log = installed(tmp_path, capsys)
    words = ("update", "some-tool", "some-fonts")
    assert calls.read_text().split() == [word for word in words for _ in range(fails + 1)]
    assert "Installing for the tests: some-tool some-fonts" in said and "could not be installed" not in said
    assert log.count("Connection timed out") == 3 * fails


def test_a_network_that_stays_away_costs_three_tries_a_package(apt, tmp_path, capsys):
    calls = apt(99)
    said, log = installed(tmp_path, capsys)
    assert len(calls.read_text().split()) == 9
    assert said.count("could not be installed (the reason is in") == 2 and "Connection timed out" in log


def test_a_package_that_there_is_not_is_asked_for_once(apt, tmp_path, capsys):
    calls = apt(99, "E: Unable to locate package some")
    installed(tmp_path, capsys)
    assert calls.read_text().split() == ["update", "some-tool", "some-fonts"]


def test_somebody_who_may_not_install_is_told_what_is_missing(apt, tmp_path, capsys, monkeypatch):
    calls = apt(0)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    said, _ = installed(tmp_path, capsys)
    assert "Not installed: some-tool some-fonts." in said and "will be skipped" in said and not calls.exists()
