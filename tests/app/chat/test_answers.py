"""Answers that outlive a tab: saved while they grow, stopped only on purpose, one after another, whatever fails.

A small generator stands where the engine would be, so that a test can hold it at any point.
"""
from __future__ import annotations

import os
import queue
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from app.chat import answers as jobs_module
from app.chat.answers import AGAIN_TEMPERATURE, Jobs, _another
from app.chat.chats import Chats
from engine import PRESETS, Counters, Event, MachineError, Sampling, UserError
from tests.support import waiting

until = waiting.until


class Steps:
    """Answers with what the test puts into `says`: text, an exception, or None for the end."""

    def __init__(self):
        self.says: queue.Queue = queue.Queue()
        self.asked: list[list[dict]] = []
        self.stopped = threading.Event()
        self.lossy = ""

    info = {"name": "Boat", "context": 100, "sampling": {"temperature": 0.7}}
    folds_system = False

    def count_tokens(self, messages, wishes, stopped):
        return sum(self.weigh(message, stopped) + 1 for message in messages)

    def weigh(self, message, stopped):
        return len(message["content"].split())

    def stop(self):
        self.stopped.set()

    def chat(self, messages, sampling, wishes, stop):
        self.asked.append(messages)
        self.wishes = wishes
        self.stopped = stop
        yield Event("prefill", "Read 3 of 3", 3)
        n = 0
        while not self.stopped.is_set():
            try:
                word = self.says.get(timeout=0.02)
            except queue.Empty:
                if n == 0:
                    yield Event("prefill", "still reading", 3)
                continue
            if word is None:
                return (yield Event("end", "", n, 10.0, _moved(n), "stop"))
            if isinstance(word, Exception):
                raise word
            n += 1
            kind = "thinking" if word.startswith("hm") else "answer"
            yield Event(kind, word, n, 10.0, _moved(n), lossy=self.lossy)
        yield Event("end", "", n, 10.0, _moved(n), "stopped")


def _moved(n):
    return Counters(needed_bytes=10 * n, hit_bytes=5 * n, far_bytes=5 * n)


class Opened:
    """What Models is to Jobs."""

    def __init__(self):
        self.engine, self.title, self.level, self.ready = Steps(), "Boat", "exact", threading.Event()
        self.ready.set()
        self.broken = ""

    def wait(self, stop):
        while not self.ready.is_set() and not stop.is_set():
            time.sleep(0.01)
        if self.broken:
            raise UserError(self.broken)
        return None if stop.is_set() else self.engine

    def info(self):
        return {}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """Chats, jobs and models, running."""
    monkeypatch.setattr(jobs_module, "CHECKPOINT_SECONDS", 0.05)
    chats, models = Chats(tmp_path / "chats.db"), Opened()
    jobs = Jobs(chats, models)
    jobs.start()
    yield chats, jobs, models
    models.engine.stop()
    jobs.close()
    chats.close()


def say(models, *words, end=True):
    for word in words:
        models.engine.says.put(word)
    if end:
        models.engine.says.put(None)


def test_an_answer_is_saved_while_it_grows_and_finished_with_its_numbers(desk):
    chats, jobs, models = desk
    conversation = chats.create()
    answer = jobs.send(conversation.id, "Tell me of the sea, and of everything else that is large and blue")["message"]
    assert chats.conversation(conversation.id).title == "Tell me of the sea, and of everything else that…"
    time.sleep(0.01)  # until the first word
    say(models, "hm ", "blue ", "deep", end=False)
    until(lambda: chats.message(answer).text == "blue deep")
    assert chats.message(answer).status == "running" and jobs.live.thinking == "hm "
    say(models)
    until(lambda: jobs.live is None)
    message = chats.message(answer)
    assert (message.status, message.thinking) == ("done", "hm ")
    assert message.stats["tokens"] == 3 and message.stats["hit_rate"] == 0.5
    assert message.stats["far_bytes_per_token"] == 5 and message.stats["first_token_ms"] > 0
    assert (message.stats["model"], message.stats["level"]) == ("Boat", "exact")
    assert len(models.engine.asked) == 1  # the title was no second question, so it has evicted nothing


def test_what_was_written_under_an_approximate_choice_stays_marked(desk):
    chats, jobs, models = desk
    models.engine.lossy = PRESETS["prefer_cached"]
    answer = jobs.send(chats.create().id, "Tell me of the sea")["message"]
    say(models, "It is ", "deep ")
    until(lambda: jobs.live is None)
    assert chats.message(answer).stats["lossy"] == "prefer_cached"
    models.engine.lossy = ""
    jobs.resume(answer)
    say(models, "and blue")
    until(lambda: jobs.live is None)
    message = chats.message(answer)
    assert (message.text, message.stats["lossy"]) == ("It is deep and blue", "prefer_cached")
    exact = jobs.regenerate(answer)["message"]
    say(models, "It is wide")
    until(lambda: jobs.live is None)
    assert chats.message(exact).text == "It is wide" and "lossy" not in chats.message(exact).stats


@pytest.mark.parametrize("settings, given, wishes", [
    ({}, {"role": "assistant", "content": "two"}, {}),
    ({"keep_thinking": True, "thinking": False, "effort": "low"},
     {"role": "assistant", "content": "two", "reasoning_content": "hm "},
     {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"})])
def test_earlier_thinking_is_left_out_unless_it_is_wanted(desk, settings, given, wishes):
    chats, jobs, models = desk
    conversation = chats.create(settings=settings)
    for question in ("one?", "more?"):
        jobs.send(conversation.id, question)
        say(models, "hm ", "two")
        until(lambda: jobs.live is None)
    assert models.engine.asked[1] == [{"role": "user", "content": "one?"}, given, {"role": "user", "content": "more?"}]
    assert models.engine.wishes == wishes


def test_stop_keeps_what_was_said_and_lets_the_next_one_in(desk):
    chats, jobs, models = desk
    conversation = chats.create()
    answer = jobs.send(conversation.id, "q")["message"]
    say(models, "half", end=False)
    until(lambda: jobs.live and jobs.live.text == "half")
    jobs.stop()
    until(lambda: jobs.live is None)
    assert (chats.message(answer).text, chats.message(answer).status) == ("half", "stopped")
    again = jobs.send(conversation.id, "q2")["message"]
    say(models, "whole")
    until(lambda: chats.message(again).status == "done")
    assert [m["content"] for m in models.engine.asked[1]] == ["q", "half", "q2"]


def test_stop_works_while_the_model_opens(desk):
    chats, jobs, models = desk
    models.ready.clear()
    answer = jobs.send(chats.create().id, "q")["message"]
    jobs.stop()
    until(lambda: chats.message(answer).status == "stopped")
    assert models.engine.asked == []


def test_what_is_sent_meanwhile_waits_in_order_and_can_be_taken_back(desk):
    chats, jobs, models = desk
    first, other = chats.create(), chats.create()
    jobs.send(first.id, "one")
    waiting = [jobs.send(first.id, "two")["waiting"], jobs.send(other.id, "three")["waiting"],
               jobs.send(first.id, "never")["waiting"]]
    assert [item["id"] for item in chats.waiting()] == waiting
    chats.unwait(waiting[2])
    for word in ("a", "b", "c"):
        say(models, word)
    until(lambda: len(models.engine.asked) == 3 and jobs.live is None)
    assert [m.text for m in chats.path(first.id)] == ["one", "a", "two", "b"]
    assert [m.text for m in chats.path(other.id)] == ["three", "c"]


def test_versions_edits_and_going_on(desk):
    chats, jobs, models = desk
    conversation = chats.create()
    first = jobs.send(conversation.id, "q")["message"]
    say(models, "one")
    until(lambda: jobs.live is None)
    second = jobs.regenerate(first)["message"]
    say(models, "two")
    until(lambda: jobs.live is None)
    assert chats.versions(conversation.id)[second] == [first, second]
    edited = jobs.edit(second, "TWO")["message"]
    assert chats.path(conversation.id)[-1].id == edited
    question = chats.path(conversation.id)[0].id
    jobs.edit(question, "Q")
    say(models, "three")
    until(lambda: jobs.live is None)
    assert [m.text for m in chats.path(conversation.id)] == ["Q", "three"]
    with pytest.raises(UserError):
        jobs.send(conversation.id, "  ")


@pytest.mark.parametrize("error, said", [(MachineError("The card is full."), "The card is full."),
                                         (RuntimeError("bug"), "RuntimeError: bug")])
def test_a_failure_is_said_under_the_answer_and_the_next_one_works(desk, error, said):
    chats, jobs, models = desk
    conversation = chats.create()
    answer = jobs.send(conversation.id, "q")["message"]
    say(models, "some", error, end=False)
    until(lambda: chats.message(answer).status == "error")
    assert said in chats.message(answer).stats["error"] and chats.message(answer).text == "some"
    again = jobs.regenerate(answer)["message"]
    say(models, "fine")
    until(lambda: chats.message(again).status == "done")


@pytest.mark.parametrize("policy, given, dropped", [("oldest", ["q1 " * 20, "a", "now"], 2), ("newest", ["now"], 4),
                                                    ("stop", None, None)])
def test_a_full_context_follows_the_policy_and_says_so(desk, policy, given, dropped):
    chats, jobs, models = desk
    conversation = chats.create(settings={"policy": policy, "max_tokens": 25})
    parent = None
    for text in ("q0 " * 60, "a", "q1 " * 20, "a"):
        role = "assistant" if text == "a" else "user"
        parent = chats.add(conversation.id, parent, role, text.strip()).id
    answer = jobs.send(conversation.id, "now")["message"]
    say(models, "yes")
    until(lambda: chats.message(answer).status in ("done", "error"))
    if given is None:
        assert "100" in chats.message(answer).stats["error"] and models.engine.asked == []
    else:
        assert [m["content"] for m in models.engine.asked[0]] == [text.strip() for text in given]
        assert chats.message(answer).stats["dropped"] == dropped


def test_a_full_disk_is_said_loses_nothing_and_the_chat_goes_on_when_there_is_room(desk):
    chats, jobs, models = desk
    conversation = chats.create()
    answer = jobs.send(conversation.id, "q")["message"]
    pages = chats._rows("PRAGMA page_count")[0][0]
    chats._rows(f"PRAGMA max_page_count={pages}")  # SQLite's own limit: the same error as a full disk
    say(models, *["lorem ipsum dolor " * 500] * 4)
    until(lambda: jobs.disk_trouble)
    assert "room" in jobs.disk_trouble and jobs.live.text.startswith("lorem")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        for _ in range(50):
            chats.wait(conversation.id, "no room " * 500)
    chats._rows("PRAGMA max_page_count=1000000")
    until(lambda: jobs.live is None or chats.message(answer).status == "done")
    assert chats.message(answer).text == "lorem ipsum dolor " * 2000 and not jobs.disk_trouble


BUSY_HOUR = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}]
from app.chat.chats import Chats
from app.chat.answers import AGAIN_TEMPERATURE, Jobs, _another
from tests.app.chat.test_answers import Opened
chats, models = Chats(Path({file!r})), Opened()
jobs = Jobs(chats, models)
for item in chats.waiting():
    chats.unwait(item["id"])
jobs.start()
n = 0
while True:  # an hour's variety: versions, branches, names, pins, deletions, files, and a queue
    conversation = chats.create()
    message = jobs.send(conversation.id, f"question {{n}}", [{{"name": "a.txt", "text": "x" * 3000}}])["message"]
    jobs.send(conversation.id, "waiting")
    for old in chats.conversations()[1:4]:
        chats.rename(old.id, f"renamed {{n}}")
        chats.pin(old.id, n % 2 == 0)
        if old.leaf_id:
            jobs.edit(old.leaf_id, f"edited {{n}}") if chats.message(old.leaf_id).role == "assistant" else None
            chats.branch(old.leaf_id)
    for old in chats.conversations()[20:]:
        chats.delete(old.id)
    for _ in range(60):
        models.engine.says.put(f"w{{n}} ")
        n += 1
        print(message, n, time.time(), flush=True)
        time.sleep(0.002)
    models.engine.says.put(None)
    models.engine.says.put("second")
    models.engine.says.put(None)
    while jobs.live or chats.waiting():
        time.sleep(0.002)
"""


@pytest.mark.slow
def test_killed_at_random_moments_the_database_opens_and_only_the_last_second_is_missing(tmp_path, repository):
    file, chance = tmp_path / "chats.db", random.Random(5)
    program = BUSY_HOUR.format(root=str(repository), file=str(file))
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        first = process.stdout.readline()
        assert first
        time.sleep(chance.uniform(0.1, 1.8))
        os.kill(process.pid, signal.SIGKILL)
        killed = time.time()
        lines = [first, *process.stdout.read().splitlines()]
        process.wait()
        said = [line.split() for line in lines if len(line.split()) == 3]
        chats = Chats(file)
        assert chats._rows("PRAGMA integrity_check")[0][0] == "ok"
        for message_id, n, moment in said:
            if killed - float(moment) > 1.0:
                assert f"w{int(n) - 1} " in chats.message(int(message_id)).text
        assert all(row["status"] != "running" for row in chats._rows("SELECT status FROM messages"))
        assert not chats._rows("SELECT 1 FROM conversations c WHERE leaf_id IS NOT NULL AND NOT EXISTS "
                               "(SELECT 1 FROM messages m WHERE m.id = c.leaf_id AND m.conversation_id = c.id)")
        chats.close()


@pytest.mark.parametrize("wished, recommended, temperature, certain", [
    ({}, 0.0, AGAIN_TEMPERATURE, 0), ({}, 0.6, None, 0), ({"temperature": 0.0}, 0.6, 0.0, 1),
    ({"temperature": 0.3}, 0.0, 0.3, 0), ({"seed": 4}, 0.6, None, 1), ({"seed": 4}, 0.0, AGAIN_TEMPERATURE, 1)])
def test_one_more_version_is_drawn_unless_the_person_has_set_otherwise(wished, recommended, temperature, certain):
    sampling, same = _another(Sampling(**wished), {"temperature": recommended})
    assert (sampling.temperature, same) == (temperature, certain) and sampling.seed == wished.get("seed")
