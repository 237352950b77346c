"""Settings made before the first message reach the conversation that begins with it, and no other."""
from __future__ import annotations

import threading

import pytest

from app.chat.chats import Chats
from app.chat.drafts import MOST, Drafts

POET = {"system": "You are a poet."}


@pytest.fixture
def chats(tmp_path):
    chats = Chats(tmp_path / "chats.db")
    yield chats
    chats.close()


def test_a_draft_becomes_the_conversation_of_its_tab(chats):
    drafts = Drafts(chats)
    drafts.change("one tab", lambda stored: POET)
    assert drafts.conversation("one tab") is None and drafts.settings("one tab") == POET
    other, own = drafts.begin("another tab"), drafts.begin("one tab")
    assert (other.settings, own.settings) == ({}, POET)
    assert drafts.settings(str(own.id)) == POET and drafts.conversation(str(own.id)) == own.id


def test_what_comes_late_is_stored_for_the_conversation_that_has_begun(chats):
    drafts = Drafts(chats)
    begun = drafts.begin("tab")
    drafts.change("tab", lambda stored: POET)
    assert chats.conversation(begun.id).settings == POET == drafts.settings("tab")
    assert drafts.begin("tab, again").settings == {}


def test_a_draft_outlives_the_program_and_old_ones_do_not_pile_up(chats):
    for n in range(MOST + 5):
        Drafts(chats).change(f"tab {n}", lambda stored, n=n: POET | {"top_k": n})
    assert Drafts(chats).settings("tab 4") == {} and Drafts(chats).settings("tab 5") == POET | {"top_k": 5}
    assert Drafts(chats).begin(f"tab {MOST}").settings == POET | {"top_k": MOST}


def test_a_conversation_that_was_deleted_has_no_settings(chats):
    drafts = Drafts(chats)
    begun = drafts.begin("tab")
    chats.delete(begun.id)
    assert drafts.settings(str(begun.id)) == {} == drafts.settings("tab")


@pytest.mark.parametrize("name", ["tab", "1"])
def test_two_controls_at_once_keep_both_values(chats, name):
    drafts, inside, go = Drafts(chats), threading.Event(), threading.Event()
    assert drafts.begin("a tab").id == 1

    def slowly(stored: dict) -> dict:
        inside.set()
        go.wait(10)
        return stored | POET
    first = threading.Thread(target=drafts.change, args=(name, slowly))
    second = threading.Thread(target=drafts.change, args=(name, lambda stored: stored | {"top_k": 5}))
    first.start()
    assert inside.wait(10)
    second.start()
    second.join(0.2)  # as long as it likes: the first one has not finished
    go.set()
    first.join(10)
    second.join(10)
    assert drafts.settings(name) == POET | {"top_k": 5}
