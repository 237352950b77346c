"""An answer that is continued is the answer that would have been, and the user's wishes reach the chat template."""
from __future__ import annotations

import pytest

from engine import Engine, Options, Sampling, UserError, demo_model

QUESTION = {"role": "user", "content": "Tell me a story about a small boat."}


@pytest.fixture(scope="module")
def engine():
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    with Engine.open(demo_model(), Options(level="exact", device="cpu")) as engine:
        yield engine


def text(events) -> str:
    return "".join(event.text for event in events if event.kind == "answer")


@pytest.mark.parametrize("n", [1, 7, 20])
def test_going_on_after_a_length_limit_gives_the_uninterrupted_answer(engine, n):
    whole = text(engine.chat([QUESTION], Sampling(temperature=0, max_tokens=40)))
    begun = text(engine.chat([QUESTION], Sampling(temperature=0, max_tokens=n)))
    rest = text(engine.chat([QUESTION, {"role": "assistant", "content": begun}],
                            Sampling(temperature=0, max_tokens=40 - n)))
    assert begun and whole.startswith(begun) and begun + rest == whole


def test_the_prompt_ends_inside_the_answer(engine):
    tokens = engine._turns.tokens
    prompt = tokens.prompt([QUESTION, {"role": "assistant", "content": "Once <|im_end|> upon a "}])
    assert prompt.continues and prompt.text.endswith("<|im_start|>assistant\nOnce <|im_end|> upon a ")
    assert not tokens.prompt([QUESTION]).continues
    assert not tokens.prompt([QUESTION, {"role": "assistant", "content": ""}]).continues


def test_wishes_reach_the_template_and_cannot_replace_the_conversation(engine):
    template = engine._turns.tokens.template
    old, template.source = template.source, "{{ enable_thinking }}|{{ messages | length }}"
    try:
        template.close()
        assert template.render([QUESTION], wishes={"enable_thinking": False, "messages": []}) == "False|1"
    finally:
        template.close()
        template.source = old


def test_a_template_that_rewrites_its_answers_cannot_go_on(engine):
    template = engine._turns.tokens.template
    old, template.source = template.source, "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    try:
        template.close()
        with pytest.raises(UserError, match="regenerate"):
            engine._turns.tokens.prompt([QUESTION, {"role": "assistant", "content": "once"}])
    finally:
        template.close()
        template.source = old
