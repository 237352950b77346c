"""What the verbs that measure refuse before minutes of work."""
from __future__ import annotations

import pytest

from engine.__main__ import main

VERBS = {"trace": "{demo} --prompts {here}", "evidence": "{demo}", "fit-predictor": "{demo} {here}"}


def refused(capsys, verb: str, out, repository, *more: str) -> str:
    words = [word.format(demo=repository / "assets" / "demo", here=__file__) for word in VERBS[verb].split()]
    assert main([verb, *words, "--out", str(out), *more]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("verb", VERBS)
def test_where_nothing_can_be_written_nothing_is_measured(verb, repository, tmp_path, capsys):
    assert refused(capsys, verb, tmp_path, repository).endswith("is a folder; name the file to write.")
    assert refused(capsys, verb, tmp_path / "none" / "out", repository).endswith("make it first.")


@pytest.mark.parametrize("verb", ["trace", "evidence"])
def test_what_looks_at_every_step_refuses_a_card(verb, repository, tmp_path, capsys):
    assert refused(capsys, verb, tmp_path / "out", repository, "--device", "cuda").endswith("leave --device cuda out.")
