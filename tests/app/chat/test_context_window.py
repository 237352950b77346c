"""Dropping old turns: what fits, with little work however long the conversation is, and stopped at once."""
from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from app.chat.context_window import fit, spoken, to_prompt
from app.chat.rows import Message
from engine import Stopped, UserError
from engine.chat.tokenizer import LONG, Tokens

THOUSAND = [{"role": ("user", "assistant")[i % 2], "content": f"Message {i} tells of the sea. " * (1 + i % 5)}
            for i in range(999)]


class Counted:
    """A tokenizer's work: how often a conversation was rendered and counted, how often a message was weighed."""

    def __init__(self, around: int = 3, head: int = 7):
        self.around, self.head, self.counts, self.weighed = around, head, 0, 0

    def weigh(self, message):
        self.weighed += 1
        return len(message["content"])

    def count(self, messages):
        self.counts += 1
        return self.head + sum(len(message["content"]) + self.around for message in messages)


def talk(sizes: list[int], system: int = 0) -> list[dict]:
    head = [{"role": "system", "content": "x" * system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": "x" * size} for i, size in enumerate(sizes)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=120), st.integers(0, 40), st.integers(0, 30),
       st.integers(60, 900), st.sampled_from(["stop", "oldest", "newest"]))
def test_what_fits_is_given_and_little_more_than_that_is_dropped(sizes, system, around, room, policy):
    sizes, work = sizes[:len(sizes) - 1 + len(sizes) % 2], Counted(around)
    messages = talk(sizes, system)
    questions = [i for i in range(len(messages)) if messages[i]["role"] == "user"]
    allowed = {"stop": questions[:1], "oldest": questions, "newest": [questions[0], questions[-1]]}[policy]
    exact = Counted(around)
    best = next((q for q in allowed if exact.count(messages[:questions[0]] + messages[q:]) <= room), None)
    try:
        prompt = fit(messages, room + 10, 10, policy, work.count, work.weigh)
    except UserError as error:
        assert best is None and f"{room + 10}" in str(error)
        return
    assert best is not None and prompt.tokens == exact.count(prompt.messages) <= room
    assert prompt.dropped >= best - questions[0]
    if policy != "oldest" or best == questions[0]:
        assert prompt.dropped == best - questions[0]
    assert work.counts <= 3 + math.log2(len(sizes))


def test_a_template_that_writes_the_same_however_little_is_given_ends_soon():
    work = Counted()
    with pytest.raises(UserError, match="5000"):
        fit(talk([0] * 2001), 100, 10, "oldest", lambda messages: work.count([]) and 5000, work.weigh)
    assert work.counts <= 12


@pytest.fixture
def tokens(demo_checkpoint, monkeypatch):
    """The real tokenizer and template; `work` counts what they do."""
    tokens = Tokens(AutoTokenizer.from_pretrained(demo_checkpoint))
    tokens.work = {"rendered": 0, "encoded": 0}
    render, encode = tokens.template.render, tokens._encode

    def rendering(*given):
        tokens.work["rendered"] += 1
        return render(*given)

    def encoding(*given):
        tokens.work["encoded"] += 1
        return encode(*given)
    tokens.template.render, tokens._encode = rendering, encoding
    yield tokens
    tokens.close()


def fitted(tokens, messages, stopped=lambda: False):
    return fit(messages, 1024, 256, "oldest", lambda some: len(tokens.prompt(some, True, None, stopped).ids),
               lambda one: tokens.weigh(one, stopped))


def test_a_thousand_messages_are_fitted_by_a_few_renderings_and_nothing_is_counted_twice(tokens):
    first = fitted(tokens, THOUSAND)
    assert first.dropped > 900 and first.tokens <= 1024 - 256
    kept = len(THOUSAND) - first.dropped
    assert tokens.work["rendered"] <= 4 and tokens.work["encoded"] <= 2 * kept + 8
    tokens.work |= {"rendered": 0, "encoded": 0}
    longer = [*THOUSAND, {"role": "assistant", "content": "I see."}, {"role": "user", "content": "And then?"}]
    second = fitted(tokens, longer)
    assert second.dropped >= first.dropped and tokens.work["rendered"] <= 4
    assert tokens.work["encoded"] <= tokens.work["rendered"] + 2  # the prompts, and the two new messages


def test_what_stays_is_nearly_all_that_could(tokens):
    prompt = fitted(tokens, THOUSAND)
    more = next(i for i in range(prompt.dropped - 1, 0, -1) if THOUSAND[i]["role"] == "user")
    assert len(tokens.prompt(THOUSAND[more:]).ids) > (1024 - 256) * 0.9


@pytest.mark.parametrize("at", [0, 1, 5, 40])
def test_stop_is_heard_in_the_middle_of_counting(tokens, at):
    """However often it is asked, the first yes is the last thing that is done."""
    looks = iter([False] * at + [True] * 10_000)
    long = [{"role": "user", "content": "the sea is blue " * (LONG // 8)}, *THOUSAND[1:]] * 2
    with pytest.raises(Stopped):
        fit([*long, long[0]], 10 ** 9, 1, "oldest",
            lambda some: len(tokens.prompt(some, True, None, looks.__next__).ids),
            lambda one: tokens.weigh(one, looks.__next__))
    assert tokens.prompt(THOUSAND[:1]).ids  # whoever comes next is served


def test_a_stopped_tokenizer_hands_the_next_text_over_when_it_has_ended(tokens):
    stop, text = threading.Event(), "the sea is blue " * (LONG // 4)
    stop.set()
    with pytest.raises(Stopped):
        tokens.prompt([{"role": "user", "content": text}], True, None, stop.is_set)
    whole = tokens.prompt([{"role": "user", "content": text}])
    assert text in tokens.decode(whole.ids)


def said(role, text, thinking=""):
    return Message(1, 1, None, role, text, thinking, "done", 0.0, {}, [])


def test_an_empty_answer_is_not_sent_and_the_questions_around_it_are_one():
    path = [said("user", "One"), said("assistant", "", "hm"), said("user", "Two"), said("assistant", " \n"),
            said("user", "Three"), said("assistant", "Yes"), said("user", "Four")]
    assert to_prompt(path, "") == [{"role": "user", "content": "One\n\nTwo\n\nThree"},
                                   {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Four"}]


def test_of_questions_that_were_stopped_the_oldest_are_dropped():
    """Joined too early they would be one question, which is too long for ever."""
    path = [said("user", "a " * 30), said("assistant", ""), said("user", "b " * 30), said("assistant", " "),
            said("user", "c")]
    made = fit(spoken(path, "Be brief."), 60, 10, "oldest", lambda some: sum(map(words, some)), words)
    assert made.dropped == 1 and made.messages == [{"role": "system", "content": "Be brief."},
                                                   {"role": "user", "content": "b " * 30 + "\n\nc"}]
    with pytest.raises(UserError, match="needs 63 tokens"):
        fit(spoken(path, "Be brief."), 60, 10, "stop", lambda some: sum(map(words, some)), words)


def words(message: dict) -> int:
    return len(message["content"].split())
