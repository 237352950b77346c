"""What a person does with conversations and messages: edit, versions, branch, queue, search, files, settings."""
from __future__ import annotations

import json
import re
import sqlite3

import pytest

from tests.support import browser
from tests.support.browser import ask, expect, send, settled, stats, until

pytestmark = pytest.mark.browser
app, chromium, context, page = browser.app, browser.chromium, browser.context, browser.page

SAGA = "Tell me a story about a princess and a wolf."  # 572 tokens


def texts(page) -> list[str]:
    """What is shown; read it when nothing changes any more."""
    return [text.strip() for text in page.locator(".message .answer").all_text_contents()]


def act(page, role: str, label: str, n: int = -1) -> None:
    message = page.locator(f".message.{role}").nth(n)
    message.hover()
    message.get_by_role("button", name=label, exact=True).click()


def new_chat(page, question: str = "Hello!") -> None:
    page.click("#new-chat")
    page.wait_for_selector(".hero")
    ask(page, question)


def menu(page, title: str, entry: str) -> None:
    row = page.locator(".conversations li", has_text=title).first
    row.locator("summary").click()
    row.locator(".menu-items").get_by_text(entry, exact=True).click()


def test_an_edited_question_gets_its_own_answer_and_both_versions_stay(page):
    ask(page, "Hello!")
    before = texts(page)
    act(page, "user", "Edit")
    page.fill(".editing textarea", "Good morning! How are you?")
    page.press(".editing textarea", "Control+Enter")
    expect(page.locator(".message.user .version")).to_have_text("2/2")
    settled(page)
    assert texts(page)[0] == "Good morning! How are you?"
    act(page, "user", "Previous version")
    expect(page.locator(".message.user .version")).to_have_text("1/2")
    expect(page.locator(".message .answer")).to_have_text(before)


def test_an_edit_that_was_begun_outlives_the_end_of_an_answer(page):
    ask(page, "Hello!")
    before = texts(page)
    act(page, "assistant", "Edit")
    page.fill(".editing textarea", "Half a ")
    send(page, SAGA)
    page.wait_for_selector(".message.running")
    page.locator(".editing textarea").focus()
    page.evaluate("fetch('/api/stop', {method: 'POST'})")
    settled(page)
    page.keyboard.press("End")
    page.keyboard.type("thought")
    expect(page.locator(".editing textarea")).to_have_value("Half a thought")
    expect(page.locator(".message.assistant").first.get_by_role("button", name="Continue")).to_have_count(0)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".message.assistant .answer").first).to_have_text(before[1])


def test_a_regenerated_answer_is_a_second_version(page):
    ask(page, "Hello!")
    act(page, "assistant", "Regenerate")
    expect(page.locator(".message.assistant .version")).to_have_text("2/2")
    act(page, "assistant", "Previous version")
    expect(page.locator(".message.assistant .version")).to_have_text("1/2")


def test_an_answer_can_be_rewritten_and_the_model_sees_what_it_says_now(page):
    ask(page, "Hello!")
    act(page, "assistant", "Edit")
    page.fill(".editing textarea", "My **name** is Floe.")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".message.assistant strong")).to_have_text("name")
    expect(page.locator(".message.assistant")).to_contain_text("Edited")
    ask(page, "Thank you!")
    assert len(texts(page)) == 4 and texts(page)[1] == "My name is Floe."


def test_an_answer_that_ended_early_goes_on(page):
    send(page, SAGA)
    expect(page.locator(".message.running .answer")).to_have_text(re.compile(r".{20}", re.DOTALL))
    page.click("#stop")
    settled(page)
    begun = texts(page)[1]
    act(page, "assistant", "Continue")
    expect(page.locator(".message.running .answer")).to_have_text(re.compile(f".{{{len(begun) + 10}}}", re.DOTALL))
    page.click("#stop")
    settled(page)
    assert len(texts(page)) == 2 and texts(page)[1].startswith(begun) and len(texts(page)[1]) > len(begun)


def test_a_branch_goes_on_by_itself(page):
    ask(page, "Hello!")
    ask(page, "How are you?")
    old = page.url
    act(page, "assistant", "Branch into a new conversation", n=0)
    expect(page).not_to_have_url(old)
    expect(page.locator(".message")).to_have_count(2)
    ask(page, "Goodbye!")
    expect(page.locator(".message.user .answer")).to_have_text(["Hello!", "Goodbye!"])
    page.goto(old)
    expect(page.locator(".message.user .answer")).to_have_text(["Hello!", "How are you?"])


def test_copy_puts_the_message_on_the_clipboard(page):
    ask(page, "Hello!")
    act(page, "user", "Copy")
    expect(page.locator(".notice")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "Hello!"


def test_messages_wait_visibly_and_are_answered_in_order(page):
    send(page, SAGA)
    page.wait_for_selector(".message.running")
    for text in ("first of all", "second of all", "never mind"):
        send(page, text)
        page.wait_for_selector(f".queue li:has-text('{text}')")
    page.locator(".queue li", has_text="never mind").get_by_role("button", name="Remove").click()
    expect(page.locator(".queue li")).to_have_text([re.compile("first of all"), re.compile("second of all")])
    page.click("#stop")
    expect(page.locator(".message.user .answer")).to_have_text([SAGA, "first of all", "second of all"])
    expect(page.locator(".queue li")).to_have_count(0)
    settled(page)
    expect(page.locator(".message.assistant")).to_have_count(3)


def test_rename_pin_delete_and_undo(page):
    new_chat(page, "Hello there, little boat!")
    title = "Hello there, little boat!"
    page.wait_for_selector(f".conversations .title:has-text('{title}')")
    menu(page, title, "Rename")
    page.fill(".conversations .rename", "Harbour talk")
    page.press(".conversations .rename", "Enter")
    page.wait_for_selector(".conversations .title:has-text('Harbour talk')")
    new_chat(page, "Hi!")
    menu(page, "Harbour talk", "Pin")
    expect(page.locator(".conversations .title").first).to_have_text("Harbour talk")
    menu(page, "Harbour talk", "Delete")
    expect(page.locator(".conversations .title", has_text="Harbour talk")).to_have_count(0)
    page.locator(".notice").get_by_role("button", name="Undo").click()
    page.wait_for_selector(".conversations .title:has-text('Harbour talk')")
    page.wait_for_selector(".message.user:has-text('little boat')")


def test_search_finds_words_of_messages(page):
    new_chat(page, "Where is the lighthouse keeper?")
    new_chat(page, "Hi!")
    page.keyboard.press("Control+k")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("lighth keeper")
    expect(page.locator(".conversations .snippet").first).to_contain_text("lighthouse")
    expect(page.locator(".conversations mark").first).to_have_text("lighthouse")
    page.locator(".conversations .open").first.click()
    page.wait_for_selector(".message.user:has-text('lighthouse')")
    page.fill("#search", "zyzzyva")
    page.wait_for_selector(".conversations .empty:has-text('Nothing found')")
    page.press("#search", "Escape")


@pytest.mark.parametrize("kind, entry", [("json", "Export as JSON"), ("md", "Export as Markdown")])
def test_what_was_exported_can_be_imported(page, tmp_path, kind, entry):
    question = f"Hello, please export this as {kind}"
    new_chat(page, question)
    page.wait_for_selector(f".conversations .title:has-text('{question}')")
    with page.expect_download() as download:
        menu(page, question, entry)
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.suffix == f".{kind}" and question in file.read_text()
    exported, old = texts(page), page.url
    page.set_input_files("#import-file", file)
    expect(page).not_to_have_url(old)
    expect(page.locator(".message .answer")).to_have_text(exported)
    ask(page, "Hi again!")  # and it goes on


def test_a_text_file_is_attached_with_its_token_count(page, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("The boat is red. " * 10)
    page.set_input_files("#attach-file", file)
    expect(page.locator(".composer .file")).to_have_text(re.compile(r"notes\.txt\d+ tokens"))
    tokens = int(page.locator(".composer .file small").text_content().split()[0])
    assert tokens > 40
    ask(page, "What colour is the boat?")
    expect(page.locator(".message.user")).to_contain_text("notes.txt")
    assert stats(page)["context_used"] > tokens
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    page.set_input_files("#attach-file", picture)
    page.wait_for_selector(".notice:has-text('is not a text file')")


def chat_tab(page) -> int:
    """Open the settings, wait until they are those of the open conversation; its number, 0 for none yet."""
    page.get_by_role("tab", name="This chat").click()
    number = int(page.url.partition("#c")[2] or 0)
    whose = f"[data-whose='{number}']" if number else "[data-whose*='-']"
    expect(page.locator(f"#settings:enabled{whose}")).to_be_visible()
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
  window.fetch = async (...given) => {
    const reply = await real(...given);
    if (String(given[0]).includes("/settings")) await new Promise((go) => window.held.push(go));
    return reply;
  };
  window.release = () => window.held.splice(0).forEach((go) => go());
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
    there(page, second)
    expect(message).to_have_value("Another half")


def test_an_answer_that_ends_touches_no_setting_that_is_being_typed(app, page):
    new_chat(page)
    number = chat_tab(page)
    send(page, SAGA)
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
    expect(page.get_by_role("tab", name="This chat")).to_be_visible()
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
    page.evaluate("""async text => {
      for (let i = 0; i < 2; i += 1) {
        const id = location.hash.slice(2);
        await fetch(`/api/conversations/${id}/send`, {method: 'POST', headers: {'content-type': 'application/json'},
          body: JSON.stringify({text})});
        while ((await (await fetch('/api/state')).json()).live === null) await new Promise(r => setTimeout(r, 20));
        await fetch('/api/stop', {method: 'POST'});
        while ((await (await fetch('/api/state')).json()).live) await new Promise(r => setTimeout(r, 50));
      }
    }""", filler)
    expect(ask(page, "Hello again!")).to_contain_text(re.compile(r"\d+ earlier messages did not fit"))
    number = chat_tab(page)
    for policy, said in (("stop", "the context holds"), ("newest", "earlier messages did not fit")):
        page.get_by_label("When the context is full").select_option(policy)
        until(page, lambda policy=policy: settings(app, number).get("policy") == policy)
        expect(ask(page, "And now?")).to_contain_text(said)


def test_the_keyboard_alone_is_enough(page):
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("Hello!")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Second line")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".message.user .answer")).to_have_text("Hello! Second line")
    expect(page.locator(".message.user .answer br")).to_have_count(1)
    settled(page)


def test_what_was_typed_and_not_sent_is_there_after_a_reload(page):
    page.locator("#message").fill("Half a question")
    page.reload()
    expect(page.locator("#message")).to_have_value("Half a question")
    ask(page, "A whole one")
    page.reload()
    page.wait_for_selector(".message.user")
    expect(page.locator("#message")).to_have_value("")


def test_dark_and_light_are_remembered(page):
    dark = page.evaluate("document.body.classList.contains('dark')")
    for wished in (not dark, dark):
        page.click("#theme")
        page.reload()
        page.wait_for_selector("#message")
        page.wait_for_function(f"document.body.classList.contains('dark') === {json.dumps(wished)}")
