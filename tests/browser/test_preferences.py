"""The settings page: reached by its address, every section there, what is set is kept."""
from __future__ import annotations

import json
import zipfile

import httpx
import pytest

from tests.support import browser
from tests.support.browser import ask, expect, told, until, violations

pytestmark = pytest.mark.browser
app, chromium, context, page = browser.app, browser.chromium, browser.context, browser.page


def open_settings(page) -> None:
    page.get_by_role("link", name="Settings").click()
    for section in ("folders code", "look select", "titles input", "habits input", "about .line"):
        page.locator(f"#preferences-{section}").first.wait_for()


def test_every_section_is_there_and_nobody_is_shut_out(app, page):
    page.emulate_media(reduced_motion="reduce")
    open_settings(page)
    expect(page.locator("#preferences-folders")).to_contain_text(str(app.data / "logs"))
    page.locator("#licences summary").click()
    expect(page.locator("#licences")).to_contain_text("latex2mathml")
    for dark in (False, True):
        page.evaluate(f"document.body.classList.toggle('dark', {json.dumps(dark)})")
        assert violations(page) == [], dark


def test_loading_ahead_is_off_until_it_is_wanted_and_what_was_learned_can_be_deleted(app, page):
    open_settings(page)
    box = page.get_by_label("Load ahead while I type")
    expect(box).not_to_be_checked()
    with page.expect_response("**/api/preferences/habits"):
        box.check()
    folder = app.data / "habits"
    folder.mkdir(exist_ok=True)
    (folder / "a-00000000.npz").write_bytes(b"x" * 1_230_000)
    page.reload()
    expect(box).to_be_checked()
    expect(page.locator("#habits-learned")).to_contain_text("1.23 MB")
    page.locator("#habits-forget").click()
    expect(page.locator("#habits-learned")).to_have_text("Nothing")
    assert list(folder.iterdir()) == []
    with page.expect_response("**/api/preferences/habits"):
        box.uncheck()
    with page.expect_response("**/api/draft") as answer:
        page.click("#new-chat")
        page.locator("#message").fill("Tell me")
    assert answer.value.ok


def test_the_page_lies_over_the_conversation_and_a_reload_keeps_it(page):
    ask(page, "Hello!")
    conversation = page.url
    open_settings(page)
    expect(page.locator("#message")).to_be_hidden()
    page.go_back()
    expect(page.locator("#message")).to_be_visible()
    assert page.url == conversation
    open_settings(page)
    page.get_by_role("button", name="Back to the chat").click()
    expect(page.locator(".message.user")).to_be_visible()
    assert page.url == conversation
    open_settings(page)
    page.reload()
    expect(page.locator("#preferences-about .line").first).to_be_visible()
    page.click("#new-chat")
    expect(page.locator(".hero")).to_be_visible()


def test_a_key_for_a_program_is_shown_once_and_works_until_it_is_revoked(app, page):
    open_settings(page)
    page.get_by_label("New key for").fill("My editor")
    page.get_by_role("button", name="Create key").click()
    key = page.locator("#api-new-key").text_content()

    def models() -> int:
        return httpx.get(app.address + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code
    assert models() == 200
    expect(page.locator("#api-lines")).to_contain_text(f"OPENAI_API_KEY={key}")
    page.reload()
    expect(page.locator("#api-keys")).to_contain_text("My editor")
    expect(page.locator("#preferences-programs")).not_to_contain_text(key)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Revoke").click()
    expect(page.locator("#preferences-programs")).to_contain_text("No keys yet.")
    assert models() == 401


def test_a_mirror_and_allowed_hosts_are_kept_and_a_wrong_one_is_told(app, page):
    open_settings(page)
    mirror, hosts = page.get_by_label("Mirror"), page.get_by_label("Allowed hosts")
    save = page.locator("#preferences-downloads").get_by_role("button", name="Save")
    mirror.fill("hub.example.com")
    save.click()
    told(page, "is not the address of a Hub")
    expect(mirror).to_have_value("hub.example.com")
    mirror.fill("https://hub.example.com")
    hosts.fill("store.example.com")
    save.click()
    told(page, "The next download uses it")
    page.reload()
    expect(mirror).to_have_value("https://hub.example.com")
    expect(hosts).to_have_value("store.example.com")
    mirror.fill("")
    save.click()
    until(page, lambda: not (app.data / "floechat.mirror").read_text())


def test_a_theme_is_kept_and_the_systems_is_followed(page):
    dark = page.locator("body.dark")
    open_settings(page)
    page.emulate_media(color_scheme="dark")
    expect(dark).to_have_count(1)
    page.get_by_label("Theme", exact=True).select_option("Light")
    expect(dark).to_have_count(0)
    page.reload()
    expect(page.get_by_label("Theme", exact=True)).to_have_value("light")
    expect(dark).to_have_count(0)


def test_one_click_makes_a_zip_without_messages_and_with_one_conversation_where_it_is_asked_for(page):
    ask(page, "Tell me of the treasure of Captain Flint.")
    open_settings(page)
    for choice, inside in (("None", False), ("Tell me of the treasure of Captain Flint.", True)):
        page.get_by_label("Messages", exact=True).select_option(choice)
        with page.expect_download() as download:
            page.get_by_role("button", name="Make the zip").click()
        assert download.value.suggested_filename == "floechat-diagnostics.zip"
        with zipfile.ZipFile(download.value.path()) as archive:
            texts = {name: archive.read(name).decode() for name in archive.namelist()}
        assert json.loads(texts["about.json"])["engine"]["device"] == "cpu" and "tokens" in texts["plan.txt"]
        assert ("conversation.json" in texts) == ("Captain Flint" in "".join(texts.values())) == inside
        assert str(page.evaluate("localStorage.getItem('floe-key')")) not in "".join(texts.values())
