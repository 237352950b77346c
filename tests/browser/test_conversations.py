"""What a person does with conversations and messages: edit, versions, branch, queue, search, files, settings."""
from __future__ import annotations

import base64
import json
import re
from datetime import datetime, timedelta

import pytest

from tests.app.chat import foreign_exports
from tests.app.chat.test_attachments import pdf
from tests.support import browser
from tests.support.browser import ask, bring, expect, new_chat, send, settled, stats, told, violations

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


def test_an_edit_that_was_begun_outlives_the_end_of_an_answer(app, page):
    ask(page, "Hello!")
    before = texts(page)
    act(page, "assistant", "Edit")
    page.fill(".editing textarea", "Half a ")
    with app.endless():
        send(page, SAGA)
        page.wait_for_selector(".message.running")
        page.locator(".editing textarea").focus()
    page.evaluate("fetch('/api/stop', {method: 'POST'})")
    settled(page)
    page.keyboard.press("End")
    page.keyboard.type("thought")
    expect(page.locator(".editing textarea")).to_have_value("Half a thought")
    expect(page.locator(".message.assistant").first.get_by_role("button", name="Continue", exact=True)).to_have_count(0)
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


def test_an_answer_that_ended_early_goes_on(app, page):
    with app.endless():
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
    act(page, "assistant", "Continue in a new chat", n=0)
    expect(page).not_to_have_url(old)
    expect(page.locator(".message")).to_have_count(2)
    ask(page, "Goodbye!")
    expect(page.locator(".message.user .answer")).to_have_text(["Hello!", "Goodbye!"])
    page.goto(old)
    expect(page.locator(".message.user .answer")).to_have_text(["Hello!", "How are you?"])


def test_conversations_stand_under_their_day_and_a_branch_under_its_name(page):
    new_chat(page, "Where is the harbour of yesterday?")
    act(page, "user", "Continue in a new chat")
    expect(page.locator("h1")).to_have_text("Branch · Where is the harbour of yesterday?")
    for days, name in ((0, "Today"), (1, "Yesterday"), (3, "Previous 7 days"), (20, "Previous 30 days")):
        page.clock.set_fixed_time(datetime.now() + timedelta(days=days))
        page.evaluate("import('/ui/floe.js').then(({ emit, state }) => emit('state', { now: state, before: state }))")
        expect(page.locator(".conversations li.when")).to_have_text([name])
    page.clock.set_fixed_time(datetime.now() + timedelta(days=400))
    page.evaluate("import('/ui/floe.js').then(({ emit, state }) => emit('state', { now: state, before: state }))")
    expect(page.locator(".conversations li.when")).to_have_text([f"{datetime.now():%B %Y}"])


def test_copy_puts_the_message_on_the_clipboard(page):
    ask(page, "Hello!")
    act(page, "user", "Copy")
    told(page, "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "Hello!"


def test_messages_wait_visibly_and_are_answered_in_order(app, page):
    with app.endless():
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
    exported = texts(page)
    page.set_input_files("#import-file", file)
    told(page, "Here already: 1")
    menu(page, question, "Delete")
    expect(page.locator(".message")).to_have_count(0)
    page.set_input_files("#import-file", file)
    expect(page.locator(".message .answer")).to_have_text(exported)
    ask(page, "Hi again!")  # and it goes on


def test_an_export_of_chatgpt_dropped_on_the_list_is_a_conversation_with_its_versions(page):
    export = foreign_exports.zipped(conversations_dot_json=[foreign_exports.chatgpt("Old boats")])
    dropped = page.evaluate_handle("""raw => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(raw), (letter) => letter.charCodeAt(0))], "export.zip"));
        return data;
    }""", base64.b64encode(export).decode())
    page.dispatch_event("nav.list", "drop", {"dataTransfer": dropped})
    expect(page.locator(".conversations li.current .title")).to_have_text("Old boats")
    expect(page.locator(".message.assistant .version").first).to_have_text("1/2")
    expect(page.locator(".message.assistant").first).to_contain_text("<script>")  # as text: nothing of it runs
    assert "caught" not in page.title() and page.locator(".message img").count() == 0
    page.fill("#search", "corks")
    page.wait_for_selector(".conversations .snippet:has-text('Corks do')")
    page.press("#search", "Escape")
    ask(page, "Hello!")


def test_a_text_file_is_attached_with_its_token_count(page, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("The boat is red. " * 10)
    page.set_input_files("#attach-file", file)
    expect(page.locator(".composer .file")).to_have_text(re.compile(r"notes\.txt\d+ tokens"))
    tokens = int(page.locator(".composer .file small").text_content().split()[0])
    assert tokens > 40
    ask(page, "What colour is the boat?")
    page.locator(".message.user").get_by_role("button", name="notes.txt", exact=True).click()
    expect(page.locator("dialog.preview pre")).to_have_text(re.compile("The boat is red"))
    page.keyboard.press("Escape")
    assert stats(page)["context_used"] > tokens
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    page.set_input_files("#attach-file", picture)
    told(page, "is not a text file")


def test_a_long_paste_becomes_a_file_that_can_be_looked_at_and_taken_away(page, tmp_path):
    page.click("#new-chat")
    page.fill("#message", "What is this?")
    expect(page.locator("#draft-tokens")).to_have_text(re.compile(r"^\d+ tokens in this message$"))
    page.evaluate("""() => {
        const data = new DataTransfer(); data.setData('text/plain', 'The boat is red. '.repeat(300));
        document.querySelector('#message').dispatchEvent(new ClipboardEvent('paste', {clipboardData: data,
            bubbles: true, cancelable: true})); }""")
    file = page.locator(".composer .file")
    expect(file).to_contain_text("Pasted text")
    file.get_by_role("button", name="Pasted text", exact=True).click()
    expect(page.locator("dialog.preview pre")).to_contain_text("The boat is red.")
    assert violations(page) == []
    page.keyboard.press("Escape")
    expect(page.locator("dialog.preview")).to_have_count(0)
    file.get_by_role("button", name="Remove Pasted text").click()
    expect(file).to_have_count(0)
    paper = tmp_path / "paper.pdf"
    paper.write_bytes(pdf("The lighthouse is green."))
    page.set_input_files("#attach-file", paper)
    file.get_by_role("button", name="paper.pdf", exact=True).click()
    expect(page.locator("dialog.preview pre")).to_have_text("The lighthouse is green.")
    page.keyboard.press("Escape")
    paper.write_bytes(pdf("secret", password="x"))
    page.set_input_files("#attach-file", paper)
    told(page, "protected by a password")
    page.click("#new-chat")


def test_a_message_longer_than_a_screen_is_folded(page):
    long = "A line of the sea.\n\n" * 60
    bring(page, "Long", [{"role": role, "text": text} for role, text in (
        ("user", long), ("assistant", f"{long}A zephyr."), ("user", "And?"), ("assistant", long))])
    for kind in (".message.user >> nth=0", ".message.assistant >> nth=0"):
        answer, more = page.locator(kind).locator(".answer"), page.locator(kind).locator(".unfold")
        expect(more).to_have_text("Show all")
        folded = answer.bounding_box()["height"]
        more.click()
        expect(more).to_have_text("Show less")
        assert answer.bounding_box()["height"] > 2 * folded
        more.click()
    expect(page.locator(".unfold")).to_have_count(2)  # not the newest answer
    page.fill("#search", "zephyr")
    page.locator(".conversations .snippet").first.click()
    expect(page.locator(".message.hit .unfold")).to_have_attribute("aria-expanded", "true")  # the end is what was found
    page.fill("#search", "")
    with page.expect_response(lambda reply: reply.url.endswith("/send")):
        send(page, "Hello!")
    expect(page.locator(".message.assistant >> nth=1 >> .unfold")).to_have_text("Show all")  # not newest any more
    settled(page)


def test_the_keyboard_alone_is_enough(page):
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("Hello!")
    for composing in ({"isComposing": True}, {"keyCode": 229}):  # an Enter that confirms a word of an input method
        page.evaluate("""more => document.querySelector('#message').dispatchEvent(new KeyboardEvent('keydown',
            {key: 'Enter', bubbles: true, cancelable: true, ...more}))""", composing)
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
