"""Titles: the first words at once, the model's own words after the first answer, and nobody waits for them."""
from __future__ import annotations

import shutil
import threading

import pytest

from app.chat.answers import Jobs
from app.chat.chats import Chats
from app.chat.titles import EXCERPTS, MODEL_TITLES, SAMPLING, WISHES, Titles, first_words, request, title_in
from app.library.machine_status import Surroundings
from app.library.open_model import Models
from app.strings import TEXT
from engine import Event, Options, UserError, demo_model
from tests.support import waiting

until = waiting.until
QUESTION = "Tell me a story about a dragon."


@pytest.mark.parametrize("text, title", [
    ("", ""), ("  Hello\n there ", "Hello there"),
    ("Tell me of the sea, and of everything, please, that is blue", "Tell me of the sea, and of everything, please…"),
    ("a" * 60, "a" * 48 + "…")])
def test_the_first_words(text, title):
    assert first_words(text) == title


@pytest.mark.parametrize("said, reason, title", [
    ('"The Old Dragon"', "stop", "The Old Dragon"), ("Title: **The Old Dragon**\n", "stop", "The Old Dragon"),
    ("The old dragon.", "stop", "The old dragon"), ("", "stop", ""), ("The old", "length", ""),
    ("The old dragon", "stopped", ""), ("one two three four five six seven eight nine ten eleven", "stop", "")])
def test_only_what_is_a_title_is_taken(said, reason, title):
    events = [Event("thinking", "hm"), *(Event("answer", character) for character in said),
              Event("end", "", 5, reason=reason)]
    assert title_in(events) == title
    assert title_in([]) == ""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The embedded model in a folder of its own: not the demonstration, which is never asked."""
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    data = tmp_path_factory.mktemp("data")
    (data / "cache").mkdir()
    folder = shutil.copytree(demo_model(), data / "models" / "Copy-floe")
    models = Models(folder, Options("exact", device="cpu"), Surroundings(data, "cpu"))
    models.open()
    assert models.wait(threading.Event())
    yield models
    models.close()


@pytest.fixture
def desk(tmp_path, models):
    chats = Chats(tmp_path / "chats.db")
    jobs = Jobs(chats, models)
    jobs.start()
    yield chats, jobs
    jobs.close()
    chats.close()


def asked(jobs: Jobs, chats: Chats, conversation_id: int, text: str) -> str:
    """The whole answer."""
    chats.set_settings(conversation_id, {"temperature": 0, "max_tokens": 30})
    number = jobs.send(conversation_id, text)["message"]
    until(lambda: chats.message(number).status not in ("running", "interrupted") and jobs.live is None)
    return chats.message(number).text


def test_the_models_title_follows_the_first_answer_and_its_cache_is_left_alone(desk, models):
    chats, jobs = desk
    conversation = chats.create().id
    question = "What is the capital of France?"  # the small model takes few requests for a title for one
    answer = asked(jobs, chats, conversation, question)
    until(lambda: chats.conversation(conversation).title != question, 60)
    said = title_in(list(models.engine.side_chat(request(question, answer, EXCERPTS[0]), SAMPLING, WISHES)))
    assert said and chats.conversation(conversation).title == said
    known = models.engine.snapshot()["context_used"]
    asked(jobs, chats, conversation, "And then?")
    assert models.engine.snapshot()["prompt"]["tokens"] < known  # the first question and answer were not read again
    assert Titles(chats, models).improve(conversation, lambda: True) is False  # it is not that of the beginning now
    assert chats.conversation(conversation).title == said


@pytest.mark.parametrize("prepare", [
    lambda chats, number: chats.rename(number, "Mine"), lambda chats, number: chats.set_preference(MODEL_TITLES, False),
    lambda chats, number: chats.rename(number, "From a file", by_user=False)])
def test_a_title_that_is_a_persons_own_stays(desk, models, prepare):
    chats, jobs = desk
    titles = Titles(chats, models)
    conversation = chats.create().id
    question = chats.add(conversation, None, "user", QUESTION)
    titles.begin(conversation)
    chats.add(conversation, question.id, "assistant", "Once upon a time.")
    prepare(chats, conversation)
    before = chats.conversation(conversation).title
    assert titles.improve(conversation, lambda: True) is False and chats.conversation(conversation).title == before


class Slow:
    """An engine that writes a title until it is closed, or says what it was given."""

    def __init__(self, *says: list[Event]):
        self.says, self.asked, self.closed = list(says), [], threading.Event()

    def side_chat(self, messages, sampling, wishes):
        self.asked.append(messages[0]["content"])
        return self

    def close(self):
        self.closed.set()

    def __iter__(self):
        if self.says:
            return iter(self.says.pop(0))
        self.closed.wait(30)
        return iter(())


class Holds:
    """What Models is to Titles."""

    def __init__(self, engine):
        self.engine = engine

    def info(self):
        return {"is_demo": False}


@pytest.fixture
def begun(tmp_path):
    chats = Chats(tmp_path / "chats.db")
    conversation = chats.create().id
    question = chats.add(conversation, None, "user", QUESTION * 100)
    Titles(chats, None).begin(conversation)
    chats.add(conversation, question.id, "assistant", "Once upon a time. " * 100)
    yield chats, conversation
    chats.close()


END = [Event("answer", "The Dragon"), Event("end", "", 2, reason="stop")]


def test_a_person_who_goes_on_does_not_wait_and_the_title_comes_later(begun):
    chats, conversation = begun
    engine, made = Slow(), []
    titles = Titles(chats, Holds(engine))
    writing = threading.Thread(target=lambda: made.append(titles.improve(conversation, lambda: True)))
    writing.start()
    until(lambda: engine.asked)
    titles.stop()
    writing.join(10)
    assert made == [False] and chats.conversation(conversation).title.startswith("Tell me")
    assert titles.improve(conversation, lambda: False) is False and len(engine.asked) == 1  # somebody waits
    engine.says.append(END)
    assert titles.improve(conversation, lambda: True) and chats.conversation(conversation).title == "The Dragon"
    assert titles.improve(conversation, lambda: True) is False and len(engine.asked) == 2


def test_what_is_too_long_for_the_small_cache_is_shortened(begun):
    chats, conversation = begun
    engine = Slow([Event("end", "too many", reason="error")], [Event("end", "too many", reason="error")], END)
    assert Titles(chats, Holds(engine)).improve(conversation, lambda: True)
    assert [len(text) for text in engine.asked] == [len(TEXT["title_request"].format(question="", answer="")) + 2 * n
                                                    for n in EXCERPTS[:3]]


def test_a_model_that_has_gone_changes_nothing(begun):
    chats, conversation = begun
    engine = Slow()

    def closed(*given):
        raise UserError("This model has been closed; open it again.")
    engine.side_chat = closed
    for gone in (engine, None):
        assert Titles(chats, Holds(gone)).improve(conversation, lambda: True) is False
    assert chats.conversation(conversation).title.startswith("Tell me")
