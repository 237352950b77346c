"""No worker of the program dies of one item: each kind of item is made to fail, and the same program answers."""
from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from app.chat import answers as jobs_module
from app.chat.answers import Jobs
from app.chat.chats import Chats
from app.http.events import TICK_SECONDS, Stream
from app.library.background_tasks import Works
from app.library.machine_status import Surroundings
from app.library.open_model import Models
from app.strings import TEXT
from engine import CardMeter, Engine, MachineError, Options, UserError, demo_model
from tests.app.chat.test_answers import Opened, say
from tests.support import waiting

until = waiting.until


class Desk:
    """Chats, jobs and a model, running; `heal` undoes what a test broke."""

    def __init__(self, file):
        self.chats, self.models = Chats(file), Opened()
        self.chats._rows("PRAGMA busy_timeout=50")
        self.jobs = Jobs(self.chats, self.models)
        self.heal = lambda: None
        self.jobs.start()

    def queued(self, **settings) -> int:
        """A conversation whose question is taken from the queue next; the one before it is being answered."""
        busy, conversation = self.chats.create(), self.chats.create(settings=settings)
        self.jobs.send(busy.id, "one")
        self.chats.wait(conversation.id, "two")
        return conversation.id

    def answers(self) -> None:
        conversation = self.chats.create()
        self.jobs.send(conversation.id, "Are you there?")
        while not self.models.engine.says.empty():  # what was meant for an answer that failed
            self.models.engine.says.get()
        for _ in range(5):  # whatever waits comes first
            say(self.models, "Yes.")
        until(lambda: [(m.text, m.status) for m in self.chats.path(conversation.id)][1:] == [("Yes.", "done")], 60)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "CHECKPOINT_SECONDS", 0.02)
    monkeypatch.setattr(jobs_module, "PAUSE_SECONDS", 0.02)
    desk = Desk(tmp_path / "chats.db")
    yield desk
    desk.heal()
    desk.jobs.close()
    assert not desk.jobs._worker.is_alive()
    desk.chats.close()


def once(desk, owner, name: str, action) -> None:
    """`action` instead of the first call of owner.name, or before it when it returns."""
    real = getattr(owner, name)

    def first(*given, **named):
        setattr(owner, name, real)
        action()
        return real(*given, **named)
    setattr(owner, name, first)


def raising(error: BaseException):
    def act():
        raise error
    return act


def deleted_as_it_is_taken(desk):
    conversation = desk.queued()
    until(lambda: desk.models.engine.asked)
    once(desk, desk.chats, "conversation", lambda: desk.chats.delete(conversation))
    say(desk.models, "first")


def swept_as_it_is_taken(desk):
    conversation = desk.queued()
    until(lambda: desk.models.engine.asked)
    sweep = "DELETE FROM conversations WHERE id=?"
    once(desk, desk.chats, "conversation", lambda: desk.chats._rows(sweep, conversation))
    say(desk.models, "first")


def swept_while_it_is_answered(desk):
    conversation = desk.chats.create()
    desk.jobs.send(conversation.id, "q")
    until(lambda: desk.models.engine.asked)
    desk.chats._rows("DELETE FROM conversations WHERE id=?", conversation.id)
    say(desk.models, "word")


def forbidden(desk, event: str, error: str = "ABORT"):
    desk.chats._rows(f"CREATE TRIGGER bomb BEFORE {event} ON messages BEGIN SELECT RAISE({error}, 'a bomb'); END")
    desk.heal = lambda: desk.chats._rows("DROP TRIGGER IF EXISTS bomb")


def the_database_refuses_the_queued_message(desk):
    desk.queued()
    until(lambda: desk.models.engine.asked)
    forbidden(desk, "INSERT")
    say(desk.models, "first")
    until(lambda: "a bomb" in desk.jobs.disk_trouble)


def the_database_refuses_the_answers_text(desk):
    desk.jobs.send(desk.chats.create().id, "q")
    until(lambda: desk.models.engine.asked)
    forbidden(desk, "UPDATE")
    say(desk.models, "word")
    until(lambda: "a bomb" in desk.jobs.disk_trouble and desk.jobs.live is None)


def another_program_holds_the_database(desk):
    desk.queued()
    until(lambda: desk.models.engine.asked)
    other = sqlite3.connect(desk.chats.file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    desk.heal = other.close
    say(desk.models, "first")
    until(lambda: "locked" in desk.jobs.disk_trouble)


def a_table_is_gone(desk):
    desk.jobs.send(desk.chats.create().id, "q")
    until(lambda: desk.models.engine.asked)
    desk.chats._rows("ALTER TABLE messages RENAME TO elsewhere")
    desk.heal = lambda: desk.chats._rows("ALTER TABLE elsewhere RENAME TO messages")
    say(desk.models, "word")
    until(lambda: "no such table" in desk.jobs.disk_trouble and desk.jobs.live is None)


def numbers_that_cannot_be_stored(desk):
    desk.jobs.send(desk.chats.create().id, "q")
    desk.jobs.live.stats["odd"] = {1, 2}
    say(desk.models, "word")
    until(lambda: "TypeError" in desk.jobs.disk_trouble)


def the_model_breaks(desk, name: str, error: BaseException):
    once(desk, desk.models.engine, name, raising(error))
    answer = desk.jobs.send(desk.chats.create().id, "q")["message"]
    until(lambda: desk.chats.message(answer).status == "error")
    said = desk.chats.message(answer).stats["error"]
    assert said.endswith(".") and "\n" not in said


def the_model_has_nothing_to_say(desk):
    answer = desk.jobs.send(desk.chats.create().id, "q")["message"]
    say(desk.models, "hm ")
    until(lambda: desk.chats.message(answer).status == "error")
    assert desk.chats.message(answer).stats["error"] == TEXT["empty_answer"]


def stored_nonsense(desk, settings=None, attachments=None):
    """What an old program or an import may have left in a row."""
    conversation = desk.chats.create()
    desk.chats._rows("UPDATE conversations SET settings=? WHERE id=?", json.dumps(settings or {}), conversation.id)
    question = desk.chats.add(conversation.id, None, "user", "q", attachments=attachments)
    answer = desk.jobs.regenerate(question.id)["message"]
    say(desk.models, "word")
    until(lambda: desk.jobs.live is None, 60)
    said = desk.chats.message(answer)
    assert said.status == "done" or said.stats["error"].endswith(".")  # what cannot be used may be passed over


def the_title_breaks(desk):
    desk.models.info = lambda: {"is_demo": False}
    desk.models.engine.side_chat = lambda *given: 1 // 0
    answer = desk.jobs.send(desk.chats.create().id, "q")["message"]
    say(desk.models, "word")
    until(lambda: desk.chats.message(answer).status == "done")


def the_page_cannot_be_told(desk):
    answer = desk.jobs.send(desk.chats.create().id, "q")["message"]
    until(lambda: desk.models.engine.asked)
    once(desk, desk.jobs, "on_change", raising(RuntimeError("no page")))
    say(desk.models, "word")
    until(lambda: desk.chats.message(answer).status != "running")


ITEMS = [deleted_as_it_is_taken, swept_as_it_is_taken, swept_while_it_is_answered, a_table_is_gone,
         the_database_refuses_the_queued_message, the_database_refuses_the_answers_text,
         another_program_holds_the_database, numbers_that_cannot_be_stored, the_model_has_nothing_to_say,
         the_title_breaks, the_page_cannot_be_told,
         *((the_model_breaks, name, error) for name in ("chat", "count_tokens", "weigh")
           for error in (UserError("No."), MachineError("No."), MemoryError(), SystemExit(1), RecursionError())),
         (stored_nonsense, {"stop": 5}), (stored_nonsense, {"temperature": "hot"}), (stored_nonsense, {}, [1]),
         (stored_nonsense, {}, [{"name": "gone.txt"}])]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: " ".join(
    each.__name__ if callable(each) else repr(each) for each in (item if isinstance(item, tuple) else (item,))))
def test_whatever_an_answer_dies_of_the_next_one_comes(desk, item):
    kind, *given = item if isinstance(item, tuple) else (item,)
    kind(desk, *given)
    heal, desk.heal = desk.heal, lambda: None
    heal()
    desk.answers()
    until(lambda: not desk.jobs.disk_trouble and not desk.chats.waiting(), 60)


@pytest.mark.parametrize("error", [UserError("Say it."), MachineError("Say it."), MemoryError(), KeyError("x"),
                                   SystemExit(1), KeyboardInterrupt(), RecursionError()])
def test_work_that_ends_in_any_error_says_so_and_can_be_begun_again(error):
    works, told = Works(lambda: None), []
    works.start("boat", "download", {}, lambda report, stop: raising(error)())
    until(lambda: works.shown()[0]["state"] == "failed")
    assert works.shown()[0]["text"].strip()
    works.start("boat", "download", {}, lambda report, stop: told.append(1))
    until(lambda: works.finished)
    assert told == [1] and works.shown() == []


def test_what_is_in_the_middle_of_a_step_is_not_deleted_under_its_hands():
    works, gate = Works(lambda: None), threading.Event()
    works.start("boat", "compress", {}, lambda report, stop: gate.wait(60))
    with pytest.raises(UserError, match="still in the middle"):
        works.pause("boat", 0.01)
    threading.Timer(0.05, gate.set).start()
    works.pause("boat")  # it has ended in between, and nobody waits for it any longer
    assert works.shown() == [] and len(works.finished) == 1


@pytest.mark.parametrize("error", [UserError("Say it."), MemoryError(), SystemExit(1), RecursionError()])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_cannot_be_opened_is_said_and_the_next_one_is_asked(tmp_path, monkeypatch, error):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "openings.json").write_text("[" * 100_000)  # what else can go wrong on the way
    models = Models(demo_model(), Options(device="cpu"), Surroundings(tmp_path, "cpu"))
    opening = Engine.open
    monkeypatch.setattr(Engine, "open", lambda *given, **named: raising(error)())
    models.open()
    with pytest.raises(UserError, match=r".\w"):
        models.wait(threading.Event())
    monkeypatch.setattr(Engine, "open", opening)
    models.open()
    with pytest.raises(UserError, match="being loaded"):  # and not two at once
        models.open()
    assert models.wait(threading.Event())
    models.close()


def test_lines_that_a_driver_writes_between_the_meters_numbers_are_passed_over(tmp_path):
    meter = CardMeter(SimpleNamespace(gpu=None, gpus=[], notes=[]))
    lines = ["NVRM: warning", "\\xff", "5", '{"odd": 1}', '{"to_card": 7}', "[", "\"error\""]
    program = f"import sys; [sys.stdout.buffer.write(line.encode('latin-1') + b'\\n') for line in {lines!r}]"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        meter._read(child)
    assert meter._last == {"to_card": 7}


class Watched:
    """A panel and a state that fail when they are told to."""

    history = ()
    broken = True

    def sample(self):
        return 1 // 0 if self.broken else {"n": 1}

    def state(self):
        return json.loads("damaged") if self.broken else {"well": True}


def test_a_page_that_cannot_be_told_hears_so_and_is_told_when_it_can_be():
    async def watch() -> list[str]:
        source, heard = Watched(), []
        stream = Stream(source, lambda: None, source.state)
        running = asyncio.create_task(stream.run())

        async def listen():
            async for text in stream.events():
                heard.append(text)
        listening = asyncio.create_task(listen())
        await asyncio.sleep(10 * TICK_SECONDS)
        source.broken = False
        while not any("well" in text for text in heard) or not any('"n"' in text for text in heard):
            await asyncio.sleep(TICK_SECONDS)
        stream.close()
        await asyncio.wait_for(listening, 30)
        running.cancel()
        return heard
    heard = asyncio.run(asyncio.wait_for(watch(), 60))
    assert 1 <= sum("event: trouble" in text for text in heard) <= 3  # at first, and once for each; not with every tick
