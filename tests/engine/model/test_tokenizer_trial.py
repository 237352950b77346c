"""Tokenizers that would hang or fill the program: tried in a process of their own and refused in words."""
from __future__ import annotations

import json
import shutil

import pytest

from engine.core import UserError
from engine.model import tokenizer_trial
from engine.model.load import load_tokenizer


def replace(content: str, **pattern: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.fixture
def folder(repository, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(repository / "assets" / "demo" / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("change, words", [
    ({"normalizer": replace("a" * 10_000, String="a")}, "thousands of characters of one"),
    ({"normalizer": {"type": "Sequence", "normalizers": [replace("aaaaaaa", String="a")] * 12}}, "thousands"),
    ({"normalizer": {"type": "Prepend", "prepend": "x" * 10_000}}, "thousands"),
    ({"decoder": replace("a" * 10_000, String="a")}, "thousands"),
    ({"normalizer": replace("b", Regex="(a+)+$")}, "tokenizer.json"), ({"model": {}}, "is damaged")])
def test_a_tokenizer_that_makes_a_book_of_a_page_is_refused(folder, change, words):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(folder)
    assert str(caught.value).endswith("download the model again.")


@pytest.mark.parametrize("where", ["vocabulary", "added"])
def test_a_token_of_ten_thousand_characters_is_refused(folder, where):
    raw = json.loads((folder / "tokenizer.json").read_text())
    if where == "added":
        raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 9999, "content": "y" * 10_000})
    else:
        raw["model"]["vocab"]["y" * 10_000] = 9999
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="tokens of more than"):
        load_tokenizer(folder)


@pytest.mark.parametrize("limit, value, words", [("MOST_SECONDS", 0.001, "seconds for a page"),
                                                 ("MOST_BYTES", 1 << 20, "too much memory")])
def test_one_that_takes_too_much_is_ended(folder, monkeypatch, limit, value, words):
    monkeypatch.setattr(tokenizer_trial, limit, value)
    assert words in tokenizer_trial.what_is_wrong(folder / "tokenizer.json")


def test_good_ones_pass_and_are_tried_once(folder, monkeypatch):
    tried = []
    monkeypatch.setattr("engine.model.load.what_is_wrong", lambda path: tried.append(path) or "")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(folder).get_vocab()
    assert len(tried) == 1
    assert tokenizer_trial.what_is_wrong(folder / "tokenizer.json") == ""
