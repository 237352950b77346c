"""A tokenizer of another model: its words are refused before a weight is asked for them, the others are answered."""
from __future__ import annotations

import json
import shutil

from engine import Engine, Options, Sampling, UserError
from tests.support.folders import as_format_1


def test_a_word_without_a_weight_is_refused_and_the_next_question_answered(repository, tmp_path):
    folder = as_format_1(shutil.copytree(repository / "assets" / "demo", tmp_path / "model"))
    raw = json.loads((folder / "tokenizer.json").read_text())
    assert "Q" in raw["model"]["vocab"]
    raw["model"]["vocab"]["Q"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with Engine.open(folder, Options("exact", device="cpu")) as engine:
        def ask(text: str) -> list:
            return list(engine.chat([{"role": "user", "content": text}], Sampling(temperature=0, max_tokens=2)))
        answer = engine.chat([{"role": "user", "content": "Q"}])
        assert "words that its weights do not know" in list(answer)[-1].text and isinstance(answer.error, UserError)
        assert ask("hello")[-1].reason == "length"
