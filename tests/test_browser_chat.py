"""A person talks to the embedded model in a real browser: streaming, Stop, reload, tabs, levels, the live panel."""
from __future__ import annotations

import json
import re

import browser
import pytest
from browser import ask, send, settled, stats, until

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


def test_an_answer_grows_before_the_eyes(page):
    page.evaluate(WATCH)
    answer = ask(page, STORY)
    seen = page.evaluate("window.seen")
    growing = [text for text, longer in zip(seen, seen[1:], strict=False) if longer.startswith(text.rstrip("▍\n"))]
    assert len(growing) >= 5
    assert page.evaluate("window.tokensAtFirst") < stats(page)["n_tokens_total"]
    assert answer.locator(".answer").inner_text().strip()
    line = answer.locator(".stats").inner_text()
    for part in ("first token", "tok/s", "tokens", "% hits", "MB/token"):
        assert part in line
    assert page.locator("#announce").inner_text().startswith("Answer finished.")


def test_stop_while_answering_keeps_what_was_said(page):
    send(page, SAGA)
    page.wait_for_function("document.querySelector('.message.running .answer')?.textContent.length > 10")
    page.click("#stop")
    settled(page)
    answer = page.locator(".message.assistant").last
    assert "Stopped." in answer.inner_text() and len(answer.locator(".answer").inner_text()) > 5
    tokens = stats(page)["n_tokens_total"]
    page.wait_for_timeout(700)
    assert stats(page)["n_tokens_total"] == tokens and stats(page)["phase"] == "idle"


def test_stop_while_the_conversation_is_read(page):
    """The script reacts to the first sign of reading, faster than any hand."""
    page.evaluate("""() => new MutationObserver(() => {
      const phase = document.querySelector('.message.running .phase');
      if (phase && phase.textContent.startsWith('Reading') && !window.pressed) {
        window.pressed = true;
        document.querySelector('#stop').click();
      }
    }).observe(document.querySelector('.messages'), {childList: true, subtree: true, characterData: true})""")
    tokens = stats(page)["n_tokens_total"]
    send(page, LONG)
    page.wait_for_function("window.pressed")
    settled(page)
    answer = page.locator(".message.assistant").last
    assert "Stopped." in answer.inner_text() and answer.locator(".answer").inner_text() == ""
    assert stats(page)["n_tokens_total"] == tokens  # not one token was computed
    message = page.evaluate("fetch('/api/conversations/' + location.hash.slice(2)).then(r => r.json())")["messages"][-1]
    assert message["stats"]["prefilled"] < message["stats"]["prompt_tokens"]


def test_escape_stops_too_and_the_next_question_is_answered(page):
    send(page, SAGA)
    page.wait_for_function("document.querySelector('.message.running .answer')?.textContent.length > 10")
    page.keyboard.press("Escape")
    settled(page)
    assert "Stopped." in page.locator(".message.assistant").last.inner_text()
    assert ask(page, "Hello!").locator(".answer").inner_text().strip()


def test_a_reload_in_the_middle_loses_nothing(page):
    send(page, TALE)
    page.wait_for_function("document.querySelector('.message.running .answer')?.textContent.length > 10")
    before = page.locator(".message.running .answer").inner_text().rstrip("▍\n ")
    page.reload()
    page.wait_for_selector(".message.assistant")
    settled(page)
    after = page.locator(".message.assistant .answer").inner_text()
    assert after.startswith(before[:-3]) and len(after) > len(before)
    assert TALE in page.locator(".message.user .answer").inner_text()
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert page.locator(".message.assistant .answer").inner_text() == after
    assert page.locator(".conversations li.current .title").inner_text().startswith("Write a long story")


def test_two_tabs_share_one_stream_and_show_the_same(app, context, page):
    streams = []
    context.on("request", lambda request: request.url.endswith("/events") and streams.append(request.url))
    other = context.new_page()
    other.goto(page.url)
    send(page, TALE)
    page.wait_for_selector(".message.running")
    other.goto(page.url)
    other.wait_for_function("document.querySelector('.message.running .answer')?.textContent.length > 10")
    settled(page)
    settled(other)
    assert other.locator(".message .answer").all_text_contents() == \
        page.locator(".message .answer").all_text_contents()  # a tab in the background lays out nothing
    assert streams == []  # the first tab's stream serves both
    page.close()
    other.wait_for_event("request", lambda request: request.url.endswith("/events"))  # taken over
    assert ask(other, "Hello!").locator(".answer").inner_text().strip()


def test_the_panel_shows_the_engines_own_totals(page):
    ask(page, STORY)
    names = ["needed_bytes", "hit_bytes", "far_bytes", "speculative_bytes", "wasted_bytes"]
    counters = stats(page)["counters"]
    page.wait_for_function("n => document.querySelectorAll('#totals dd')[0].dataset.value === String(n)",
                           arg=counters["needed_bytes"])
    shown = page.eval_on_selector_all("#totals dd", "all => all.map(dd => Number(dd.dataset.value))")
    assert shown == [*(counters[name] for name in names), stats(page)["n_tokens_total"]]
    assert counters["needed_bytes"] > 0
    residency = stats(page)["residency"]
    assert page.locator(".layers rect.near").count() == len(residency)
    heights = page.eval_on_selector_all(".layers rect.near", "all => all.map(r => r.getAttribute('height') / 56)")
    assert heights == pytest.approx(residency, abs=0.01)
    assert float(page.locator("#speed-now").inner_text()) > 0


def test_the_panel_shows_which_experts_were_busy(page):
    ask(page, STORY)
    now = stats(page)
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
    page.wait_for_function("why => document.querySelector('#why').textContent === why", arg=why["text"])


def test_without_a_counter_the_page_says_so_in_words(page):
    page.wait_for_function("document.querySelector('#card-link').textContent.includes('NVIDIA driver')")
    assert not re.search(r"\d", page.locator("#card-link").inner_text())
    assert "video memory" not in page.locator(".memory").inner_text()


def test_a_banner_says_whether_the_card_is_used_and_can_be_hidden(page):
    banner = page.locator("#graphics")
    page.wait_for_selector("#graphics:has-text('--device cpu')")
    assert banner.inner_text().startswith("Runs on the processor")
    banner.get_by_role("button", name="Hide").click()
    page.reload()
    browser.wait_ready(page)
    assert banner.inner_text() == ""
    page.wait_for_selector("#device-line:has-text('Runs on the processor')")


def test_the_panel_can_be_paused(page):
    page.get_by_role("button", name="Pause").click()
    before = page.locator("#totals").inner_text()
    ask(page, "Hello!")
    assert page.locator("#totals").inner_text() == before
    page.get_by_role("button", name="Go on").click()
    page.wait_for_function("text => document.querySelector('#totals').innerText !== text", arg=before)


def test_the_level_is_switched_in_the_middle_of_a_conversation(page):
    first = ask(page, "Hello!")
    level = "exact" if "balanced" in first.locator(".stats").inner_text() else "balanced"
    page.click("#level input")
    page.locator("#level [role=option]", has_text=re.compile(f"^.?\\s*{level}")).click()
    until(page, lambda: stats(page)["level"] == level)
    assert level in ask(page, "And how are you?").locator(".stats").inner_text()


def test_near_memory_is_a_limit_that_is_kept(page):
    page.locator("#near input[type=number]").fill("4")
    page.locator("#near input[type=number]").press("Enter")
    until(page, lambda: stats(page)["near_bytes"] <= 4 << 20)
    ask(page, "Hello!")
    now = stats(page)
    assert now["near_used_bytes"] <= now["near_bytes"] <= 4 << 20
    page.locator("#near input[type=number]").fill("64")
    page.locator("#near input[type=number]").press("Enter")
    until(page, lambda: stats(page)["near_bytes"] > 4 << 20)


def test_the_page_says_what_it_is(page):
    assert "tiny demonstration" in page.locator(".hero").inner_text()
    assert json.loads(page.evaluate("JSON.stringify(document.title)")) == "Floe Chat"
