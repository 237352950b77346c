"""Settings of a conversation: as drafts before the first message, under a name, and what is no setting."""
from __future__ import annotations

import threading

import pytest

from app.chat.chat_settings import DRAFTS, ChatSettings, Drafts, Presets, checked
from app.chat.chats import Chats
from engine import UserError

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
    for n in range(DRAFTS + 5):
        Drafts(chats).change(f"tab {n}", lambda stored, n=n: POET | {"top_k": n})
    assert Drafts(chats).settings("tab 4") == {} and Drafts(chats).settings("tab 5") == POET | {"top_k": 5}
    assert Drafts(chats).begin(f"tab {DRAFTS}").settings == POET | {"top_k": DRAFTS}


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


PIRATE = {"system": "You are a pirate.", "temperature": 0.4}


@pytest.fixture
def presets(chats):
    return Presets(chats)


def test_what_is_kept_replaces_everything_and_a_way_of_sampling_its_numbers(presets):
    assert presets.keep("  The \n pirate ", PIRATE) == "The pirate"
    assert ("The pirate", "The pirate") in presets.choices()
    other = {"system": "You are a poet.", "top_k": 3, "policy": "stop"}
    assert presets.chosen("The pirate", other) == PIRATE
    assert presets.chosen("precise", other) == {"system": "You are a poet.", "policy": "stop", "temperature": 0.2,
                                                "top_p": 0.9}
    assert presets.chosen("nothing of the kind", other) == other


def test_settings_are_called_by_what_they_are(presets):
    presets.keep("Pirate", PIRATE)
    presets.keep("Plain", {})
    presets.keep("Cold poet", {"system": "You are a poet.", "temperature": 0.0})
    for settings, name in ((PIRATE, "Pirate"), ({}, "model"), ({"temperature": 0.0}, "greedy"),
                           ({"system": "You are a poet.", "temperature": 0.0}, "Cold poet"),
                           ({"system": "You are a cook.", "temperature": 0.0}, "greedy"),
                           ({"temperature": 0.4}, "custom")):
        assert presets.name_of(settings) == name
    presets.keep("Pirate", {})
    presets.forget("Cold poet")
    assert presets.name_of(PIRATE) == "custom"
    assert presets.name_of({"system": "You are a poet.", "temperature": 0.0}) == "greedy"


@pytest.mark.parametrize("name", ["", "  ", "Precise", "precise", "Custom", "custom", "Model default", "x" * 61])
def test_a_name_that_cannot_be_is_refused(presets, name):
    with pytest.raises(UserError, match="a name of its own"):
        presets.keep(name, PIRATE)
    with pytest.raises(UserError, match="Only presets that you have saved"):
        presets.forget(name)


@pytest.mark.parametrize("settings, said", [
    ({"temperature": 77.0}, "Temperature must be 0–10"), ({"top_p": 0}, "Top-p must be above 0"),
    ({"policy": "none"}, "policy"), ({"effort": "some"}, "effort"), ({"max_tokens": 0}, "Max response tokens")])
def test_settings_out_of_range_are_refused_in_one_sentence(settings, said):
    with pytest.raises(UserError, match=said) as refused:
        checked(settings)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


def test_what_a_newer_program_has_set_is_left_out_and_whole_numbers_become_whole():
    assert checked({"top_k": 40.0, "seed": None, "colour": "blue"}) == {"top_k": 40}
    wishes = ChatSettings.of({"thinking": False, "effort": "low", "colour": "blue", "policy": "of tomorrow"})
    assert wishes.template() == {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}
    assert wishes.policy == "oldest" and ChatSettings().template() == {}
