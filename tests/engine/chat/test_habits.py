"""Habits: what the answers to the nearest questions took, bounded, kept for the next start, and gone when asked to."""
from __future__ import annotations

import numpy as np
import pytest

from engine.chat import habits as kept
from engine.chat.habits import FULL, Habits
from engine.core import Picks

ONE, OTHER = np.array([1.0, 0.0], np.float32), np.array([0.0, 2.0], np.float32)


def took(expert: int, layers: int = 2) -> Picks:
    counts = np.zeros((layers, 3), int)
    counts[:, expert] = 4
    return Picks(layers, 3, 4, tuple(counts.ravel().tolist()))


def test_the_nearest_answer_says_what_comes_and_a_new_start_knows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "NEAREST", 1)
    habits = Habits(tmp_path / "deep" / "a.npz")
    assert habits.likely(ONE, 2, 3) is None
    habits.add(ONE, took(1))
    habits.add(OTHER, took(2))
    for store in (habits, Habits(habits.path)):
        assert len(store) == 2
        assert store.likely(3 * ONE, 2, 3).busiest() == [(0, 1), (1, 1)]
        assert store.likely(OTHER + 0.1 * ONE, 2, 3).busiest() == [(0, 2), (1, 2)]
        assert store.likely(ONE, 1, 3) is None and store.likely(np.ones(5, np.float32), 2, 3) is None


def test_of_several_each_answer_counts_alike_however_long(tmp_path):
    habits = Habits(tmp_path / "a.npz")
    habits.add(ONE, Picks(1, 3, 4, (4, 0, 0)))
    habits.add(ONE, Picks(1, 3, 400, (0, 400, 0)))
    habits.add(ONE, Picks(1, 3, 2, (2, 0, 0)))
    habits.add(ONE, Picks(1, 3, 0, (0, 0, 0)))      # stopped before its first token
    found = habits.likely(ONE, 1, 3)
    assert found.counts == (2 * FULL * FULL, FULL * FULL, 0) and found.tokens == 3


def test_it_is_bounded_and_the_most_alike_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 2)
    monkeypatch.setattr(kept, "NEAREST", 1)
    habits = Habits(tmp_path / "a.npz")
    habits.add(ONE, took(0))
    habits.add(OTHER, took(1))
    habits.add(OTHER + 0.1 * ONE, took(2))
    assert len(habits) == 2 and habits.likely(OTHER, 2, 3).busiest() == [(0, 2), (1, 2)]
    assert habits.likely(ONE, 2, 3).busiest() == [(0, 0), (1, 0)]


def test_another_model_begins_anew_and_forgetting_leaves_no_file(tmp_path):
    habits = Habits(tmp_path / "a.npz")
    habits.add(ONE, took(0))
    habits.add(ONE, took(0, layers=1))
    assert len(habits) == 1 and habits.likely(ONE, 2, 3) is None
    habits.forget()
    assert len(habits) == 0 and list(tmp_path.iterdir()) == [] and habits.likely(ONE, 1, 3) is None
    habits.add(ONE, took(0))
    assert len(Habits(habits.path)) == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"rubbish", None])
def test_a_damaged_file_is_none(tmp_path, content):
    path = tmp_path / "a.npz"
    if content is None:
        np.savez(path, keys=np.full((1, 2), np.nan, np.float16), maps=np.zeros((1, 2, 3), np.uint8))
    else:
        path.write_bytes(content)
    habits = Habits(path)
    assert len(habits) == 0
    habits.add(ONE, took(0))
    assert len(Habits(path)) == 1


def test_a_place_that_cannot_be_written_only_forgets(tmp_path):
    (tmp_path / "a").write_text("a file")
    habits = Habits(tmp_path / "a" / "b.npz")
    habits.add(ONE, took(0))
    assert len(habits) == 1 and len(Habits(habits.path)) == 0
