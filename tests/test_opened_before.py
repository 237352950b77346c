"""What an older version wrote opens as it did: tests/before/ was made before the tree had rooms (commit e883f49).

gpt_oss: a random model, compressed and calibrated; answers.json holds 12 greedy tokens of three levels behind PROMPT.
chats.db: two conversations, one with two versions and settings, one cut off in its answer, one deleted, one waiting.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from app.chat.chats import Chats
from engine.core import Options
from engine.model.load import load

BEFORE = Path(__file__).with_name("before")
PROMPT = (3, 14, 15, 92, 65, 35)


@pytest.mark.parametrize("level", ["exact", "balanced", "floe"])
@torch.no_grad()
def test_a_compressed_folder_says_what_it_said(level):
    model, said = load(BEFORE / "gpt_oss", Options(level, device="cpu")).model, []
    out = model(torch.tensor([PROMPT]), use_cache=True)
    for _ in range(12):
        said.append(out.logits[0, -1].argmax().item())
        out = model(torch.tensor([said[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    assert said == json.loads((BEFORE / "gpt_oss" / "answers.json").read_text(encoding="utf-8"))[level]


def test_the_conversations_are_all_there(tmp_path):
    chats = Chats(Path(shutil.copy(BEFORE / "chats.db", tmp_path)))
    capitals, cut_off = chats.conversations()
    assert (capitals.title, capitals.pinned) == ("Capitals", True)
    assert capitals.settings == {"system": "Answer in one word.", "temperature": 0.2}
    question, answer, other = (chats.message(number) for number in (1, 2, 3))
    assert question.text == "What is the capital of France?"
    assert question.attachments == [{"name": "a.txt", "text": "Paris"}]
    assert (answer.text, answer.thinking, answer.stats) == ("Paris.", "Easy.", {"tokens": 3})
    assert (other.text, other.parent_id, capitals.leaf_id) == ("Lyon.", question.id, other.id)
    last = chats.message(cut_off.leaf_id)
    assert (last.text, last.status) == ("half an ans", "interrupted")
    assert [waiting["text"] for waiting in chats.waiting()] == ["waiting words"]
    assert not [found for found in chats.conversations() if found.id == 3]
    chats.close()
