"""What a person does with conversations and messages: edit, versions, branch, queue, search, files, settings."""
from __future__ import annotations

import json
import re
import sqlite3

import browser
import pytest
from browser import ask, send, settled, stats, until

pytestmark = pytest.mark.browser
app, chromium, context, page = browser.app, browser.chromium, browser.context, browser.page

SAGA = "Tell me a story about a princess and a wolf."  # 572 tokens


def texts(page) -> list[str]:
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
    page.wait_for_function("document.querySelector('.message.user .answer')?.innerText.includes('Good morning')")
    settled(page)
    assert texts(page)[0] == "Good morning! How are you?"
    assert page.locator(".message.user .version").inner_text() == "2/2"
    act(page, "user", "Previous version")
    page.wait_for_function("document.querySelector('.message.user .version')?.innerText === '1/2'")
    assert texts(page) == before


def test_a_regenerated_answer_is_a_second_version(page):
    ask(page, "Hello!")
    act(page, "assistant", "Regenerate")
    page.wait_for_selector(".message.assistant .version, .message.running")
    settled(page)
    assert page.locator(".message.assistant .version").inner_text() == "2/2"
    act(page, "assistant", "Previous version")
    page.wait_for_function("document.querySelector('.message.assistant .version')?.innerText === '1/2'")


def test_an_answer_can_be_rewritten_and_the_model_sees_what_it_says_now(page):
    ask(page, "Hello!")
    act(page, "assistant", "Edit")
    page.fill(".editing textarea", "My **name** is Floe.")
    page.get_by_role("button", name="Save").click()
    page.wait_for_function("document.querySelector('.message.assistant strong')?.innerText === 'name'")
    assert "Edited" in page.locator(".message.assistant").inner_text()
    ask(page, "Thank you!")
    assert len(texts(page)) == 4 and texts(page)[1] == "My name is Floe."


def test_an_answer_that_ended_early_goes_on(page):
    send(page, SAGA)
    page.wait_for_function("document.querySelector('.message.running .answer')?.textContent.length > 20")
    page.click("#stop")
    settled(page)
    begun = texts(page)[1]
    act(page, "assistant", "Continue")
    until(page, lambda: len(texts(page)[1]) > len(begun) + 10)
    page.click("#stop")
    settled(page)
    assert len(texts(page)) == 2 and texts(page)[1].startswith(begun) and len(texts(page)[1]) > len(begun)


def test_a_branch_goes_on_by_itself(page):
    ask(page, "Hello!")
    ask(page, "How are you?")
    old = page.url
    act(page, "assistant", "Branch into a new conversation", n=0)
    page.wait_for_function(f"location.href !== {json.dumps(old)}")
    page.wait_for_function("document.querySelectorAll('.message').length === 2")
    ask(page, "Goodbye!")
    page.goto(old)
    page.wait_for_function("document.querySelectorAll('.message').length === 4")


def test_copy_puts_the_message_on_the_clipboard(page):
    ask(page, "Hello!")
    act(page, "user", "Copy")
    page.wait_for_selector(".notice")
    assert page.evaluate("navigator.clipboard.readText()") == "Hello!"


def test_messages_wait_visibly_and_are_answered_in_order(page):
    send(page, SAGA)
    page.wait_for_selector(".message.running")
    for text in ("first of all", "second of all", "never mind"):
        send(page, text)
        page.wait_for_selector(f".queue li:has-text('{text}')")
    page.locator(".queue li", has_text="never mind").get_by_role("button", name="Remove").click()
    page.wait_for_function("document.querySelectorAll('.queue li').length === 2")
    page.click("#stop")
    page.wait_for_function("document.querySelectorAll('.message.user').length === 3")
    settled(page)
    assert [text for text in texts(page) if text in (SAGA, "first of all", "second of all", "never mind")] == \
        [SAGA, "first of all", "second of all"]


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
    page.wait_for_function("document.querySelector('.conversations li .title').innerText === 'Harbour talk'")
    menu(page, "Harbour talk", "Delete")
    page.wait_for_function("![...document.querySelectorAll('.title')].some(t => t.innerText === 'Harbour talk')")
    page.locator(".notice").get_by_role("button", name="Undo").click()
    page.wait_for_selector(".conversations .title:has-text('Harbour talk')")
    page.wait_for_selector(".message.user:has-text('little boat')")


def test_search_finds_words_of_messages(page):
    new_chat(page, "Where is the lighthouse keeper?")
    new_chat(page, "Hi!")
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("lighth keeper")
    page.wait_for_selector(".conversations mark")
    assert "lighthouse" in page.locator(".conversations .snippet").first.inner_text()
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
    page.wait_for_function(f"location.href !== {json.dumps(old)} && document.querySelectorAll('.message').length === 2")
    assert texts(page) == exported
    ask(page, "Hi again!")  # and it goes on


def test_a_text_file_is_attached_with_its_token_count(page, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("The boat is red. " * 10)
    page.set_input_files("#attach-file", file)
    page.wait_for_selector(".composer .file:has-text('notes.txt')")
    tokens = int(re.search(r"(\d+) tokens", page.locator(".composer .file").inner_text()).group(1))
    assert tokens > 40
    ask(page, "What colour is the boat?")
    assert "notes.txt" in page.locator(".message.user").inner_text()
    assert stats(page)["context_used"] > tokens
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    page.set_input_files("#attach-file", picture)
    page.wait_for_selector(".notice:has-text('is not a text file')")


def test_settings_belong_to_the_conversation_and_are_kept(app, page):
    ask(page, "Hello!")
    page.get_by_role("tab", name="This chat").click()
    page.get_by_label("System prompt").fill("You are a pirate.")
    page.get_by_label("System prompt").blur()
    page.get_by_label("Longest answer").fill("3")
    page.get_by_label("Longest answer").press("Enter")
    number = int(page.url.rsplit("#c", 1)[1])
    until(page, lambda: settings(app, number).get("max_tokens") == 3)
    assert settings(app, number)["system"] == "You are a pirate."
    answer = ask(page, SAGA)
    assert "3 tokens" in answer.locator(".stats").inner_text() and "length limit" in answer.inner_text()
    page.reload()
    page.get_by_role("tab", name="This chat").click()
    until(page, lambda: page.get_by_label("System prompt").input_value() == "You are a pirate.")
    page.click("#reset")
    until(page, lambda: "max_tokens" not in settings(app, number))
    new_chat(page)
    assert settings(app, int(page.url.rsplit("#c", 1)[1])).get("system") is None
    page.get_by_label("Temperature").fill("77")
    page.get_by_label("Temperature").blur()
    page.wait_for_selector("text=temperature must lie between")


def test_settings_made_before_the_first_message_count_for_it(app, page):
    page.click("#new-chat")
    page.get_by_role("tab", name="This chat").click()
    page.get_by_label("Longest answer").fill("4")
    page.get_by_label("Longest answer").press("Enter")
    until(page, lambda: page.get_by_label("Sampling preset").input_value() == "Custom")
    assert "4 tokens" in ask(page, SAGA).locator(".stats").inner_text()
    assert settings(app, int(page.url.rsplit("#c", 1)[1]))["max_tokens"] == 4
    new_chat(page)
    assert "max_tokens" not in settings(app, int(page.url.rsplit("#c", 1)[1]))


def settings(app, conversation_id: int) -> dict:
    with sqlite3.connect(f"file:{app.data}/chats.db?mode=ro", uri=True) as db:
        return json.loads(db.execute("SELECT settings FROM conversations WHERE id=?", (conversation_id,)).fetchone()[0])


def test_the_context_meter_counts_and_a_full_context_is_never_silent(app, page):
    ask(page, "Hello!")
    meter = page.locator("#context-meter").inner_text()
    assert 0 < int(re.search(r"Context: (\d+) of 1,024 tokens", meter).group(1)) < 100
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
    answer = ask(page, "Hello again!")
    assert re.search(r"\d+ earlier messages did not fit", answer.inner_text())
    page.get_by_role("tab", name="This chat").click()
    page.get_by_label("When the context is full").click()
    page.get_by_role("option", name="Stop and say so").click()
    number = int(page.url.rsplit("#c", 1)[1])
    until(page, lambda: settings(app, number).get("policy") == "stop")
    answer = ask(page, "And now?")
    assert "the context holds" in answer.inner_text()


def test_the_keyboard_alone_is_enough(page):
    page.keyboard.press("Control+Shift+O")
    page.wait_for_function("document.activeElement.id === 'message'")
    page.keyboard.type("Hello!")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Second line")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".message.user")
    settled(page)
    assert texts(page)[0] == "Hello!\nSecond line"


def test_dark_and_light_are_remembered(page):
    dark = page.evaluate("document.body.classList.contains('dark')")
    page.click("#theme")
    page.reload()
    page.wait_for_selector("#message")
    page.wait_for_function(f"document.body.classList.contains('dark') === {json.dumps(not dark)}")
