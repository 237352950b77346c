"""What a person reads stands in one place: every text there is used, and every text that is used is there."""
from __future__ import annotations

import re

import pytest

from app.strings import TEXT


@pytest.fixture(scope="module")
def asked(repository):
    """(names, beginnings of names) that the program's Python and the page's scripts ask for."""
    python, scripts = (source(repository / folder, ending) for folder, ending in (("app", "py"), ("assets/ui", "js")))
    said = " ".join(re.findall(r"\bsay\(([^{]*)", scripts))  # what may stand before the values
    names = {*re.findall(r"""TEXT\[["'](\w+)["']\]""", python), *re.findall(r"TEXT\.(\w+)", scripts),
             *re.findall(r'"(\w+)"', said)}
    return names, {*re.findall(r'TEXT\[f"(\w+_)\{', python), *re.findall(r"TEXT\[`(\w+_)\$\{", scripts)}


def source(folder, ending: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob(f"*.{ending}")))


def test_every_text_that_is_asked_for_is_there(asked):
    names, beginnings = asked
    assert len(names) > 150 and names <= TEXT.keys()
    assert all(any(name.startswith(beginning) for name in TEXT) for beginning in beginnings)


def test_every_text_is_asked_for(asked):
    names, beginnings = asked
    assert TEXT.keys() - names - {name for name in TEXT if name.startswith(tuple(beginnings))} == set()


def test_scripts_hold_no_sentence_of_their_own(repository):
    for path in sorted((repository / "assets" / "ui").rglob("*.js")):
        code = re.sub(r"^\s*//.*$|\s//\s.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        sentences = [text for text in re.findall(r'"([^"\n]*)"', code) if re.match(r"[A-Z][a-z]+ [a-z]+ ", text)]
        assert sentences in ([], ["The program does not answer."]), (path.name, sentences)  # before the texts are there
