"""What a person sets of a conversation: stored for the one it was set in, whatever is opened meanwhile."""
from __future__ import annotations

import json
import re
import sqlite3

import pytest

from tests.support import browser
from tests.support.browser import ask, expect, new_chat, send, settled, until

pytestmark = pytest.mark.browser
app, chromium, context, page = browser.app, browser.chromium, browser.context, browser.page

SAGA = "Tell me a story about a princess and a wolf."  # 572 tokens


def chat_tab(page) -> int:
    """Open the settings, wait until they are those of the open conversation; its number, 0 for none yet."""
    browser.side(page, "This chat")
    number = int(page.url.partition("#c")[2] or 0)
    whose = f"[data-whose='{number}']" if number else "[data-whose*='-']"
    expect(page.locator(f"#settings:enabled{whose}")).to_be_visible()
    if page.locator("#settings details").get_attribute("open") is None:
        page.locator("#settings summary").click()
    return number


def test_settings_belong_to_the_conversation_and_are_kept(app, page):
    ask(page, "Hello!")
    number = chat_tab(page)
    page.get_by_label("System prompt").fill("You are a pirate.")
    page.get_by_label("System prompt").blur()
    page.get_by_label("Max response tokens").fill("3")
    page.get_by_label("Max response tokens").press("Enter")
    until(page, lambda: settings(app, number).get("max_tokens") == 3)
    until(page, lambda: settings(app, number).get("system") == "You are a pirate.")
    answer = ask(page, SAGA)
    expect(answer.locator(".stats")).to_contain_text("3 tokens")
    expect(answer).to_contain_text("length limit")
    page.reload()
    chat_tab(page)
    expect(page.get_by_label("System prompt")).to_have_value("You are a pirate.")
    page.click("#reset")
    until(page, lambda: "max_tokens" not in settings(app, number))
    assert settings(app, number)["system"] == "You are a pirate."
    new_chat(page)
    assert settings(app, chat_tab(page)).get("system") is None
    page.get_by_label("Temperature").fill("77")
    page.get_by_label("Temperature").blur()
    page.wait_for_selector("text=Temperature must be 0–10, not 77.")
    expect(page.get_by_label("Temperature")).to_have_value("")


# Every answer about settings comes later than what is done next, and no later one overtakes it.
LATE = """() => {
  const real = window.fetch;
  window.held = [];
  window.late = true;
  window.fetch = async (...given) => {
    const reply = await real(...given);
    if (late && String(given[0]).includes("/settings")) await new Promise((go) => window.held.push(go));
    return reply;
  };
  window.release = () => { late = false; held.splice(0).forEach((go) => go()); };  // and those that are on their way
}"""


@pytest.fixture
def two(page):
    """The numbers of two conversations without settings; the first is open."""
    new_chat(page)
    second = chat_tab(page)
    new_chat(page)
    return chat_tab(page), second


def there(page, number: int) -> None:
    page.evaluate("number => { location.hash = `c${number}`; }", number)
    page.wait_for_selector(f"#settings[data-whose='{number}']", state="attached")  # two at once would be one


def test_what_is_typed_is_stored_for_the_conversation_that_it_was_typed_in_however_late_answers_come(app, page, two):
    first, second = two
    system = page.get_by_label("System prompt")
    page.evaluate(LATE)
    system.fill("You are one.")
    page.get_by_label("Preset", exact=True).focus()  # left; the answer is under way
    there(page, second)
    expect(system).to_have_value("")
    there(page, first)  # several are asked for before one has answered
    there(page, second)
    until(page, lambda: settings(app, first) == {"system": "You are one."})
    page.wait_for_function("window.held.length >= 3")
    page.evaluate("release()")
    chat_tab(page)
    expect(system).to_have_value("")
    page.evaluate("late = true")
    system.fill("You are two.")
    there(page, first)  # left by opening another one, without another word
    until(page, lambda: settings(app, second) == {"system": "You are two."})
    page.wait_for_function("window.held.length >= 2")
    page.evaluate("release()")
    chat_tab(page)
    expect(system).to_have_value("You are one.")
    assert settings(app, first) == {"system": "You are one."}


@pytest.mark.parametrize("label, value, stored", [
    ("Temperature", "0.7", {"temperature": 0.7}), ("Max response tokens", "9", {"max_tokens": 9}),
    ("System prompt", "Be short.", {"system": "Be short."})])
def test_every_field_that_is_left_by_opening_another_conversation_is_stored_for_its_own(app, page, two, label, value,
                                                                                      stored):
    first, second = two
    page.get_by_label(label).fill(value)
    page.locator(f".conversations li[data-id='{second}'] .open").click()
    expect(page.locator(f"#settings:enabled[data-whose='{second}']").get_by_label(label)).to_have_value("")
    until(page, lambda: settings(app, first) == stored)
    assert settings(app, second) == {}


def test_a_list_that_was_opened_and_closed_changes_nothing(app, page, two):
    first, second = two
    page.get_by_label("System prompt").fill("You are one.")
    page.get_by_label("Preset", exact=True).focus()
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.press("Escape")
    there(page, second)
    chat_tab(page)
    expect(page.get_by_label("System prompt")).to_have_value("")
    until(page, lambda: settings(app, first) == {"system": "You are one."})
    assert settings(app, second) == {}


def test_what_is_not_sent_stays_in_its_conversation(page, two, tmp_path):
    first, second = two
    file = tmp_path / "notes.txt"
    file.write_text("The boat is red.")
    message, attached = page.locator("#message"), page.locator(".composer .file")
    message.fill("Half a question")
    page.set_input_files("#attach-file", file)
    expect(attached).to_have_count(1)
    there(page, second)
    expect(message).to_have_value("")
    expect(attached).to_have_count(0)
    message.fill("Another half")
    page.click("#new-chat")
    expect(message).to_have_value("")
    there(page, first)
    expect(message).to_have_value("Half a question")
    expect(attached).to_have_count(1)
    page.reload()
    expect(message).to_have_value("Half a question")
    chat_tab(page)
    there(page, second)
    expect(message).to_have_value("Another half")


def test_an_answer_that_ends_touches_no_setting_that_is_being_typed(app, page):
    new_chat(page)
    number = chat_tab(page)
    with app.endless():
        send(page, SAGA)
        page.wait_for_selector(".message.running")
        page.get_by_label("System prompt").fill("You are being typed")
    page.evaluate("fetch('/api/stop', {method: 'POST'})")
    settled(page)
    expect(page.get_by_label("System prompt")).to_have_value("You are being typed")
    page.get_by_label("System prompt").blur()
    until(page, lambda: settings(app, number).get("system") == "You are being typed")


def test_settings_are_kept_under_a_name_and_chosen_for_another_conversation(app, page):
    new_chat(page)
    first = chat_tab(page)
    for label, value in (("System prompt", "You are a pirate."), ("Temperature", "0.4")):
        page.get_by_label(label).fill(value)
        page.get_by_label(label).blur()
    until(page, lambda: settings(app, first) == {"system": "You are a pirate.", "temperature": 0.4})
    page.get_by_label("Save as preset").fill("Pirate")
    page.get_by_role("button", name="Save preset").click()
    expect(page.get_by_label("Preset", exact=True)).to_have_value("Pirate")
    page.reload()
    new_chat(page)
    second = chat_tab(page)
    choose_preset(page, "Pirate")
    expect(page.get_by_label("System prompt")).to_have_value("You are a pirate.")
    assert settings(app, second) == settings(app, first)
    choose_preset(page, "Precise")  # a way of sampling leaves the rest
    until(page, lambda: settings(app, second) == {"system": "You are a pirate.", "temperature": 0.2, "top_p": 0.9})
    page.get_by_label("Save as preset").fill("Precise")
    page.get_by_label("Save as preset").press("Enter")
    page.wait_for_selector("text=Give the preset a name of its own")
    choose_preset(page, "Pirate")
    page.get_by_role("button", name="Delete preset").click()
    expect(page.get_by_label("Preset", exact=True)).to_have_value("custom")
    assert settings(app, second) == settings(app, first)  # the conversations keep what they have


def choose_preset(page, name: str) -> None:
    preset = page.get_by_label("Preset", exact=True)
    preset.select_option(label=name)
    expect(preset.locator("option:checked")).to_have_text(name)


def test_settings_made_before_the_first_message_count_for_it(app, page):
    page.click("#new-chat")
    chat_tab(page)
    page.get_by_label("Max response tokens").fill("4")
    page.get_by_label("Max response tokens").press("Enter")
    expect(page.get_by_label("Preset", exact=True)).to_have_value("custom")
    page.reload()
    chat_tab(page)
    expect(page.get_by_label("Max response tokens")).to_have_value("4")
    page.get_by_label("Max response tokens").focus()  # left while the conversation begins
    expect(ask(page, SAGA).locator(".stats")).to_contain_text("4 tokens")
    assert settings(app, chat_tab(page))["max_tokens"] == 4
    expect(page.get_by_label("Max response tokens")).to_have_value("4")
    new_chat(page)
    assert "max_tokens" not in settings(app, chat_tab(page))
    expect(page.get_by_label("Max response tokens")).to_have_value("")


def settings(app, conversation_id: int) -> dict:
    with sqlite3.connect(f"file:{app.data}/chats.db?mode=ro", uri=True) as db:
        return json.loads(db.execute("SELECT settings FROM conversations WHERE id=?", (conversation_id,)).fetchone()[0])


def test_the_context_meter_counts_and_a_full_context_is_never_silent(app, page):
    ask(page, "Hello!")
    expect(page.locator("#context-meter")).to_have_text(re.compile(r"^Context: [1-9]\d? of 1,024 tokens$"))
    filler = "Tell me about the sea, the boat and the bird. " * 50
    for _ in range(2):
        with app.endless():
            send(page, filler)
            page.wait_for_selector(".message.running")
            page.click("#stop")
            settled(page)
    expect(ask(page, "Hello again!")).to_contain_text(re.compile(r"\d+ earlier messages did not fit"))
    number = chat_tab(page)
    for policy, said in (("stop", "the context holds"), ("newest", "earlier messages did not fit")):
        page.get_by_label("When the context is full").select_option(policy)
        until(page, lambda policy=policy: settings(app, number).get("policy") == policy)
        expect(ask(page, "And now?")).to_contain_text(said)
