"""What lies above the page and how it goes away, what is scrolled to and what stays where it is."""
from __future__ import annotations

import pytest

from tests.support import browser
from tests.support.browser import ask, bring, expect, new_chat, send

pytestmark = pytest.mark.browser
app, chromium, context, page = browser.app, browser.chromium, browser.context, browser.page
LAST = ".conversations li:last-child"


def talk(n: int, **words: str) -> list[dict]:
    """n messages; words: what the one of that number says."""
    return [{"role": "assistant" if i % 2 else "user", "text": words.get(f"at_{i}", f"Message number {i}. " * 12)}
            for i in range(n)]


def test_a_menu_of_the_last_row_is_whole_and_closes_by_escape_and_by_a_click_elsewhere(page):
    for i in range(12):
        bring(page, f"Talk {i}", talk(2))
    page.set_viewport_size({"width": 1200, "height": 420})
    items, summary = page.locator(f"{LAST} .menu-items"), page.locator(f"{LAST} summary")
    for close in (lambda: page.keyboard.press("Escape"), lambda: page.mouse.click(700, 200)):
        summary.click()
        expect(items).to_be_visible()
        box = items.bounding_box()
        assert 0 <= box["y"] and box["y"] + box["height"] <= 420 and box["x"] >= 0
        close()
        expect(items).to_be_hidden()
    summary.click()
    items.get_by_text("Pin", exact=True).click()  # what is seen can be used
    expect(page.locator(".conversations .pinned")).to_have_count(1)


@pytest.mark.parametrize("button, drawer, elsewhere", [("Show or hide chats", "#left", (385, 500)),
                                                       ("Show or hide the engine", "#right", (5, 500))])
def test_drawers_close_by_escape_and_by_a_click_beside_them(page, button, drawer, elsewhere):
    page.set_viewport_size({"width": 390, "height": 800})
    for close in (lambda: page.keyboard.press("Escape"), lambda: page.mouse.click(*elsewhere)):
        page.get_by_role("button", name=button).click()
        expect(page.locator(drawer)).to_be_visible()
        close()
        expect(page.locator(drawer)).to_be_hidden()


def test_escape_closes_a_menu_before_it_stops_an_answer(app, page):
    new_chat(page)
    with app.endless():
        send(page, "Tell me a story about a princess and a wolf.")
        page.wait_for_selector(".conversations .dot")  # this page knows of the answer that Escape would stop
        page.locator(".conversations summary").first.click()
        stops = []
        page.on("request", lambda request: request.url.endswith("/api/stop") and stops.append(request.url))
        page.keyboard.press("Escape")
        expect(page.locator(".menu-items:visible")).to_have_count(0)
        assert stops == []
        with page.expect_request("**/api/stop"):
            page.keyboard.press("Escape")


@pytest.mark.parametrize("at", [3, 97])
def test_what_a_search_has_found_is_in_sight(page, at):
    word = f"lighthouse{at}"
    bring(page, f"Long talk {at}", talk(100, **{f"at_{at}": f"The {word} keeper sleeps."}))
    new_chat(page, "Hi!")
    page.fill("#search", word)
    page.locator(".conversations .open", has=page.locator("mark")).first.click()
    expect(page.locator(".message.hit .answer")).to_have_text(f"The {word} keeper sleeps.")
    expect(page.locator(".message.hit")).to_be_in_viewport()
    page.fill("#search", "")


def test_a_search_shows_the_version_that_holds_what_was_found(page):
    new_chat(page, "Where is the windmill?")
    question = page.locator(".message.user")
    question.hover()
    question.get_by_role("button", name="Edit").click()
    page.fill(".editing textarea", "Where is the harbour?")
    page.press(".editing textarea", "Control+Enter")
    expect(page.locator(".message.user .version")).to_have_text("2/2")
    browser.settled(page)
    page.fill("#search", "windmill")
    page.locator(".conversations .open", has=page.locator("mark")).first.click()
    expect(page.locator(".message.hit")).to_contain_text("windmill")
    page.fill("#search", "")


def test_what_is_seen_stays_in_its_place_when_earlier_messages_come(page):
    bring(page, "Long talk", talk(100))
    expect(page.locator(".message")).to_have_count(40)
    button = page.get_by_role("button", name="Load earlier messages")
    for n in (80, 100):
        page.locator(".scroller").evaluate("place => place.scrollTo(0, 0)")
        first = page.locator(".message").first.get_attribute("data-id")
        before = page.locator(f"[data-id='{first}']").bounding_box()["y"]
        button.click()
        expect(page.locator(".message")).to_have_count(n)
        page.wait_for_function("""([id, y]) => Math.abs(document.querySelector(`[data-id='${id}']`)
            .getBoundingClientRect().top - y) < 60""", arg=[first, before])


def test_the_end_stays_in_sight_when_the_window_changes_its_size_and_what_is_read_above_it_is_left(page):
    bring(page, "Long talk", talk(30))
    newest = page.locator(".message").last
    expect(newest).to_be_in_viewport()
    page.set_viewport_size({"width": 390, "height": 600})
    expect(newest).to_be_in_viewport(ratio=0.5)
    page.locator(".scroller").evaluate("place => place.scrollTo(0, 0)")
    page.wait_for_selector(".jump", state="visible")
    page.set_viewport_size({"width": 1400, "height": 860})
    expect(page.locator(".message").first).to_be_in_viewport()
    expect(newest).not_to_be_in_viewport()


@pytest.mark.parametrize("button, beside", [("Show or hide chats", "#new-chat"),
                                            ("Show or hide the engine", "#right [role=tablist]")])
def test_on_a_phone_a_notice_is_seen_above_a_drawer_and_covers_not_its_head(page, button, beside):
    page.set_viewport_size({"width": 390, "height": 800})
    page.evaluate("import('/ui/floe.js').then(({ notice }) => notice('One moment.', ['Undo', () => {}]))")
    page.get_by_role("button", name=button).click()
    box, head = page.locator(".notice").bounding_box(), page.locator(beside).bounding_box()
    assert box["y"] > head["y"] + head["height"] and box["y"] + box["height"] <= 800
    page.locator(".notice").get_by_role("button", name="Undo").click()
    expect(page.locator(".notice")).to_have_count(0)


def test_notices_cover_neither_queue_nor_tabs_nor_the_place_to_write(app, page):
    new_chat(page)
    with app.endless():
        send(page, "Tell me a story about a princess and a wolf.")
        page.wait_for_selector(".message.running")
        send(page, "And then?")
        page.wait_for_selector(".queue li")
        page.evaluate("import('/ui/floe.js').then(({ notice }) => notice('One moment.', ['Undo', () => {}]))")
        box = page.locator(".notice").bounding_box()
        for place in (".queue li", "#right [role=tablist]", "#message", ".conversations"):
            other = page.locator(place).first.bounding_box()
            assert box["y"] + box["height"] <= other["y"] or other["y"] + other["height"] <= box["y"] or \
                box["x"] + box["width"] <= other["x"] or other["x"] + other["width"] <= box["x"], place


def test_scrollbars_and_lists_are_dark_where_the_page_is(page):
    for dark in (True, False):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        schemes = page.evaluate("['.scroller', '.conversations', '#right', '#message'].map((name) => "
                                "getComputedStyle(document.querySelector(name)).colorScheme)")
        assert set(schemes) == {"dark" if dark else "light"}


def test_one_more_version_says_something_else_or_why_not(page):
    answer = ask(page, "Tell me a story about a princess and a wolf.")
    first = answer.locator(".answer").text_content()

    def again():
        answer = page.locator(".message.assistant").last
        answer.hover()
        answer.get_by_role("button", name="Regenerate").click()
    again()
    expect(page.locator(".message.assistant .version")).to_have_text("2/2")
    browser.settled(page)
    assert page.locator(".message.assistant .answer").text_content() != first  # left alone, the demo is certain
    page.get_by_role("tab", name="This chat").click()
    page.locator("#settings summary").click()
    page.locator("#settings:enabled").get_by_label("Temperature").fill("0")
    again()
    expect(page.locator(".message.assistant .version")).to_have_text("3/3")
    browser.settled(page)
    expect(page.locator(".message.assistant")).to_contain_text("With temperature 0 or a fixed seed")
