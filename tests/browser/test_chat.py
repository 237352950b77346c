"""A person talks to the embedded model in a real browser: streaming, Stop, reload, tabs, levels, the live panel."""
from __future__ import annotations

import os
import re
import signal

import httpx
import pytest

from tests.support import browser, waiting
from tests.support.browser import STOP_AT, ask, begun, expect, send, settled, stats, until

pytestmark = pytest.mark.browser
app, chromium, context, page = browser.app, browser.chromium, browser.context, browser.page

STORY = "Write a long story about the sea."  # 317 tokens: the embedded model recommends to take the likeliest ones
SAGA = "Tell me a story about a princess and a wolf."  # 572
TALE = "Write a long story. Use the words river, dog, moon."  # 225
LONG = "Tell me about the sea, the boat and the bird. " * 55  # 730 tokens of the demonstration's 1024

# Notes every text that the answer shows, and how many tokens the engine had computed when the first one appeared.
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const answers = document.querySelectorAll('.message.assistant .answer');
    const text = answers.length ? answers[answers.length - 1].textContent : '';
    if (!text || window.seen[window.seen.length - 1] === text) return;
    window.seen.push(text);
    if (window.seen.length === 1)
      fetch('/stats').then(r => r.json()).then(s => { window.tokensAtFirst = s.n_tokens_total; });
  }).observe(document.querySelector('.messages'), {childList: true, subtree: true, characterData: true});
}"""


def growing(page) -> list[str]:
    """The texts that were drawn, each of which the next one goes on with."""
    seen = page.evaluate("window.seen")
    return [text for text, longer in zip(seen, seen[1:], strict=False) if longer.startswith(text.rstrip("▍\n"))]


def test_an_answer_grows_before_the_eyes(app, page):
    page.evaluate(WATCH)
    with app.endless():  # however seldom a busy browser draws
        send(page, STORY)
        until(page, lambda: len(growing(page)) >= 5)
    settled(page)
    answer = page.locator(".message.assistant").last
    assert page.evaluate("window.tokensAtFirst") < stats(page)["n_tokens_total"]
    expect(answer.locator(".answer")).not_to_be_empty()
    short = answer.locator(".stats summary")
    expect(short).to_have_text(re.compile(r"^[\d.]+ tokens/s · [\d.]+ s$"))
    expect(answer.locator(".stats li").first).to_be_hidden()
    short.click()
    expect(answer.locator(".stats li").first).to_be_visible()
    expect(answer.locator(".stats li")).to_have_text([re.compile(part) for part in (
        r"^first token \d+ ms$", r"^reading \d+ tokens/s$", r"^\d+ tokens$", r"^\d+ % hits$", r"^[\d.]+ MB/token$",
        "^Demo$", "^balanced$")])
    expect(page.locator("#announce")).to_have_text(re.compile(r"^Answer finished\. \w"))


def test_stop_while_answering_keeps_what_was_said(app, page):
    with begun(app, page, SAGA):
        page.click("#stop")
        settled(page)
    answer = page.locator(".message.assistant").last
    expect(answer).to_contain_text("Stopped.")
    expect(answer.locator(".answer")).to_have_text(re.compile(r".{10}", re.DOTALL))
    tokens = stats(page)["n_tokens_total"]
    page.wait_for_timeout(700)  # an engine that went on would have computed dozens
    assert stats(page)["n_tokens_total"] == tokens and stats(page)["phase"] == "idle"


def test_stop_while_the_conversation_is_read(app, page):
    page.evaluate(STOP_AT, "Reading")
    tokens = stats(page)["n_tokens_total"]
    with app.endless():
        send(page, LONG)
        page.wait_for_function("window.pressed")
        settled(page)
    answer = page.locator(".message.assistant").last
    expect(answer).to_contain_text("Stopped.")
    expect(answer.locator(".answer")).to_be_empty()
    assert stats(page)["n_tokens_total"] == tokens  # not one token was computed
    message = page.evaluate("fetch('/api/conversations/' + location.hash.slice(2)).then(r => r.json())")["messages"][-1]
    assert message["stats"]["prefilled"] < message["stats"]["prompt_tokens"]


def test_escape_stops_too_and_the_next_question_is_answered(app, page):
    with begun(app, page, SAGA):
        page.keyboard.press("Escape")
        settled(page)
    expect(page.locator(".message.assistant").last).to_contain_text("Stopped.")
    expect(ask(page, "Hello!").locator(".answer")).not_to_be_empty()


def test_a_reload_in_the_middle_loses_nothing(app, page):
    with begun(app, page, TALE):
        before = page.locator(".message.running .answer").text_content().strip()
        page.reload()
        page.wait_for_selector(".message.running")
    settled(page)
    after = page.locator(".message.assistant .answer").text_content().strip()
    assert after.startswith(before[:-3]) and len(after) > len(before)
    expect(page.locator(".message.user .answer")).to_contain_text(TALE)
    page.reload()
    expect(page.locator(".message.assistant .answer")).to_have_text(after)
    expect(page.locator(".conversations li.current .title")).to_have_text(re.compile("^Write a long story"))


def told(app, path: str) -> dict:
    return httpx.get(app.address + path, headers=app.credentials, timeout=browser.SECONDS).json()


def test_a_closed_laptop_finds_the_answer_when_it_is_opened(app, chromium, page):
    """Every process that shows a page is stopped until the program has said everything."""
    processes = chromium.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    shows = [process["id"] for process in processes if process["type"] == "renderer"]
    try:
        with begun(app, page, TALE):
            before = page.locator(".message.running .answer").text_content()
            number = page.locator(".message.running").get_attribute("data-id")
            for pid in shows:
                os.kill(pid, signal.SIGSTOP)
        waiting.until(lambda: not told(app, "/api/state")["live"])
    finally:
        for pid in shows:
            os.kill(pid, signal.SIGCONT)
    whole = told(app, f"/api/messages/{number}")["text"]
    assert shows and len(before) < len(whole)
    expect(page.locator(f".message[data-id='{number}']:not(.running) .answer")).to_have_text(" ".join(whole.split()))


def test_two_tabs_share_one_stream_and_show_the_same(app, context, page):
    streams = []
    context.on("request", lambda request: request.url.endswith("/events") and streams.append(request.url))
    other = context.new_page()
    other.goto(page.url)
    with begun(app, page, TALE):
        other.goto(page.url)
        expect(other.locator(".message.running .answer")).to_have_text(re.compile(r".{10}", re.DOTALL))
    settled(page)
    settled(other)
    expect(other.locator(".message .answer")).to_have_text(page.locator(".message .answer").all_text_contents())
    assert streams == []  # the first tab's stream serves both
    with other.expect_request(lambda request: request.url.endswith("/events")):  # taken over
        page.close()
    expect(ask(other, "Hello!").locator(".answer")).not_to_be_empty()


def test_the_panel_shows_the_engines_own_totals(page):
    ask(page, STORY)
    names = ["needed_bytes", "hit_bytes", "far_bytes", "speculative_bytes", "wasted_bytes"]
    now = stats(page)  # nothing is being answered: these do not change any more
    assert now["counters"]["needed_bytes"] > 0
    totals = [*(now["counters"][name] for name in names), now["n_tokens_total"]]
    page.wait_for_function("""totals => JSON.stringify(totals) ===
        JSON.stringify([...document.querySelectorAll('#totals dd')].map(dd => Number(dd.dataset.value)))""", arg=totals)
    expect(page.locator(".layers rect.near")).to_have_count(len(now["residency"]))
    heights = page.eval_on_selector_all(".layers rect.near", "all => all.map(r => r.getAttribute('height') / 56)")
    assert heights == pytest.approx(now["residency"], abs=0.01)
    expect(page.locator("#speed-now")).to_have_text(re.compile("[1-9]"))


def test_the_panel_shows_which_experts_were_busy(page):
    """Of the last tokens, and of all answers of the conversation that is open."""
    page.click("#new-chat")
    expect(page.locator("#picks")).to_have_text("This model has answered nothing in this chat yet.")
    ask(page, STORY)
    now = stats(page)
    number = page.url.rpartition("#c")[2]
    shares = page.evaluate(f"fetch('/api/conversations/{number}/picks').then(reply => reply.json())")["shares"]
    most = round(100 * max(map(max, shares)))
    expect(page.locator("#picks")).to_have_attribute("aria-label", re.compile(
        f"^Experts that the answers of this chat picked: 6 layers, 16 experts; .*, {most} % of the tokens$"))
    cells = [(x, y) for y, row in enumerate(now["activity"]) for x in range(len(row))]
    most = max(max(row) for row in now["activity"])
    x, y = next((x, y) for x, y in cells if now["activity"][y][x] == most)
    page.wait_for_function("place => document.querySelector('#heat path[data-shade=\"8\"]')?.getAttribute('d')"
                           ".includes(place)", arg=f"M{x} {y}h")
    drawn = "".join(page.eval_on_selector_all("#heat path", "all => all.map(path => path.getAttribute('d'))"))
    assert drawn.count("M") == len(cells) == 6 * 16
    page.wait_for_function("end => document.querySelector('#heat').getAttribute('aria-label').endsWith(end)",
                           arg=f", {round(100 * most)} % of the tokens")
    label = page.locator("#heat").get_attribute("aria-label")
    assert label.startswith("Expert activity of the last tokens: 6 layers, 16 experts; busiest: layer ")


def test_the_panel_names_what_binds(page):
    ask(page, STORY)
    why = stats(page)["why"]
    assert why["bound"] in ("cpu", "prefill") and re.search(r"\d+ %|\d s", why["text"])
    expect(page.locator("#why")).to_have_text(why["text"])


def test_without_a_counter_the_page_says_so_in_words(page):
    expect(page.locator("#card-link")).to_have_text(re.compile(r"^\D*NVIDIA driver\D*$"))
    expect(page.locator(".memory")).to_have_text(re.compile("near memory"))
    expect(page.locator(".memory")).not_to_contain_text("video memory")


def test_a_banner_says_whether_the_card_is_used_and_can_be_hidden(page):
    banner = page.locator("#graphics")
    expect(banner).to_have_text(re.compile("^Runs on the processor.*--device cpu"))
    banner.get_by_role("button", name="Hide").click()
    page.reload()
    browser.wait_ready(page)
    expect(page.locator("#device-line")).to_contain_text("Runs on the processor")  # so the state has been drawn
    expect(banner).to_be_empty()


def test_the_charts_can_be_frozen(page):
    expect(page.locator("#totals dd").first).to_have_attribute("data-value", re.compile(r"\d"))
    page.get_by_role("button", name="Freeze charts").click()
    before = page.locator("#totals").text_content()
    ask(page, "Hello!")
    expect(page.locator("#totals")).to_have_text(before)
    page.get_by_role("button", name="Unfreeze charts").click()
    expect(page.locator("#totals")).not_to_have_text(before)


def test_the_level_is_switched_in_the_middle_of_a_conversation(page):
    expect(ask(page, "Hello!").locator(".stats")).to_contain_text("balanced")
    for level in ("exact", "balanced"):
        page.click("#level input")
        page.locator("#level [role=option]", has_text=re.compile(f"^.?\\s*{level}")).click()
        until(page, lambda wished=level: stats(page)["level"] == wished)
        expect(ask(page, "And how are you?").locator(".stats")).to_contain_text(level)
    expect(page.locator(".message.assistant .stats")).to_have_text(
        [re.compile("balanced$"), re.compile("exact$"), re.compile("balanced$")])


def test_a_level_that_is_changed_twice_during_an_answer_that_is_stopped_is_the_same_everywhere(app, page):
    def choose(level: str) -> None:
        page.click("#level input")
        page.locator("#level [role=option]", has_text=re.compile(f"^.?\\s*{level}")).click()
    with begun(app, page, TALE):
        choose("exact")
        page.click("#model-chip")
        page.locator("#switcher-level").select_option("fast")
        page.keyboard.press("Escape")
        assert stats(page)["level"] == "balanced"  # not in the middle of an answer
        page.click("#stop")
        settled(page)
    expect(page.locator("#model-chip .level")).to_have_text("fast")
    page.wait_for_function("document.querySelector('#level input').value.startsWith('fast')")
    assert stats(page)["level"] == "fast"
    expect(ask(page, "Hello!").locator(".stats")).to_contain_text("fast")
    choose("balanced")
    expect(page.locator("#model-chip .level")).to_have_text("balanced")


def test_near_memory_is_a_limit_that_is_kept_until_the_plan_has_it_again(page):
    planned = stats(page)["near_bytes"]
    page.locator("#near input[type=number]").fill("4")
    page.locator("#near input[type=number]").press("Enter")
    until(page, lambda: stats(page)["near_bytes"] <= 4 << 20 < planned)
    ask(page, "Hello!")
    now = stats(page)
    assert now["near_used_bytes"] <= now["near_bytes"] <= 4 << 20
    expect(page.locator("#near").get_by_role("button")).to_have_count(0)  # Gradio's own went to the least
    page.get_by_role("button", name="Automatic near memory").click()
    until(page, lambda: stats(page)["near_bytes"] == planned)
    page.wait_for_function("min => Number(document.querySelector('#near input[type=number]').value) > min", arg=4.5)


def test_the_page_says_what_it_is(page):
    expect(page.locator(".hero")).to_contain_text("tiny demo")
    expect(page).to_have_title("Floe Chat")
