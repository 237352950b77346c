"""Settings under a name: the program's ways of sampling, and what a person has kept."""
from __future__ import annotations

import pytest

from app.chat.chat_settings import Wishes, checked
from app.chat.chats import Chats
from app.chat.presets import Presets
from engine import UserError

PIRATE = {"system": "You are a pirate.", "temperature": 0.4}


@pytest.fixture
def presets(tmp_path):
    chats = Chats(tmp_path / "chats.db")
    yield Presets(chats)
    chats.close()


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


@pytest.mark.parametrize("name", ["", "  ", "Precise", "precise", "Custom", "custom", "The model's own", "x" * 61])
def test_a_name_that_cannot_be_is_refused(presets, name):
    with pytest.raises(UserError, match="a name of its own"):
        presets.keep(name, PIRATE)
    with pytest.raises(UserError, match="Only presets that you have kept"):
        presets.forget(name)


@pytest.mark.parametrize("settings, said", [({"temperature": 77.0}, "temperature"), ({"top_p": 2.0}, "top_p"),
                                            ({"policy": "none"}, "policy"), ({"effort": "some"}, "effort"),
                                            ({"max_tokens": 0}, "max_tokens")])
def test_settings_out_of_range_are_refused_in_one_sentence(settings, said):
    with pytest.raises(UserError, match=said) as refused:
        checked(settings)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


def test_what_a_newer_program_has_set_is_left_out_and_whole_numbers_become_whole():
    assert checked({"top_k": 40.0, "seed": None, "colour": "blue"}) == {"top_k": 40}
    wishes = Wishes.of({"thinking": False, "effort": "low", "colour": "blue", "policy": "of tomorrow"})
    assert wishes.template() == {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}
    assert wishes.policy == "oldest" and Wishes().template() == {}
