"""The page itself: readable for everybody, usable on a phone, light with 400 messages, there within seconds."""
from __future__ import annotations

import json
import re

import pytest

from engine import demo_model
from tests.app.chat import foreign_exports
from tests.bench_page import GROW, long_conversation
from tests.browser.formulas import page_of_formulas
from tests.support import browser, small_model
from tests.support.browser import STOP_AT, ask, bring, expect, settled, side, stats, until, violations, wait_ready

pytestmark = pytest.mark.browser
app, chromium, context, page = browser.app, browser.chromium, browser.context, browser.page


def test_nobody_is_shut_out(page):
    page.emulate_media(reduced_motion="reduce")  # no colour is measured half way to another
    assert violations(page) == []
    ask(page, "Hello!")
    page.locator(".message.user").hover()
    for dark in (False, True):
        page.evaluate(f"document.body.classList.toggle('dark', {json.dumps(dark)})")
        for tab, there in (("This chat", "#reset"), ("Engine", "#heat path")):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_selector(there)
            assert violations(page) == [], (dark, tab)
        for address, first in (("models", "#disk"), ("models/get", "#offers"), ("models/progress", "#model-works")):
            page.evaluate(f"location.hash = '{address}'")
            page.locator(f"{first} > li").first.wait_for()
            for summary in page.locator(f"{first} > li:first-child .card-details:not([open]) > summary").all():
                summary.click()
                page.wait_for_selector(f"{first} .picture table")
            assert violations(page) == [], (dark, address)
        page.evaluate("location.hash = 'models/get'")
        page.click("#find-model")
        page.wait_for_selector(".aim")
        assert violations(page) == [], (dark, "first run")
        page.click(".aim[data-aim=best]")
        page.wait_for_selector(".fits li")
        assert violations(page) == [], (dark, "three fits")
        page.click("#welcome-skip")
        page.click("#model-chip")
        page.locator("#switcher-level").wait_for()
        assert violations(page) == [], (dark, "switcher")
        page.keyboard.press("Escape")
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    page.wait_for_selector(".editing textarea")
    page.locator(".conversations summary").first.click()
    page.wait_for_selector(".menu-items")
    assert violations(page) == []


def test_every_control_has_a_name(page):
    ask(page, "Hello!")
    nameless = page.eval_on_selector_all(
        "button, a[href], input:not([type=hidden]), textarea, summary",
        """all => all.filter(e => e.offsetParent && !(e.textContent.trim() || e.getAttribute('aria-label') || e.title
             || e.labels?.length || e.getAttribute('aria-labelledby'))).map(e => e.outerHTML.slice(0, 120))""")
    assert nameless == []


def test_a_phone_is_wide_enough(page):
    page.set_viewport_size({"width": 360, "height": 740})
    answer = ask(page, "Hello!")
    for element in (page.locator("#message"), page.locator("#send"), answer.locator(".answer")):
        inside(page, element)
    expect(page.locator("#new-chat")).to_be_hidden()
    page.get_by_role("button", name="Show or hide chats").click()
    page.click("#new-chat")
    page.wait_for_selector(".hero")
    page.get_by_role("button", name="Show or hide the engine").click()
    page.locator("#speed-now").wait_for()
    page.get_by_role("tab", name="This chat").click()
    inside(page, page.locator("#reset"))
    page.evaluate("location.hash = 'models/get'")
    page.locator("#offers .card-details > summary").first.click()
    page.wait_for_selector("#offers .picture table")
    for part in ("#offers > li", "#offers .picture", "#offers .load-options"):
        inside(page, page.locator(part).first)
    page.click("#find-model")
    page.wait_for_selector(".aim")
    for aim in page.locator(".aim").all():
        inside(page, aim)


def inside(page, element) -> None:
    """The element is shown whole between the two edges of the phone, and nothing reaches beyond them."""
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360, box
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_nothing_scrolls_sideways_on_a_phone_or_at_150_percent(page):
    wide = "| Incomprehensibilities | Internationalisation | Disestablishment |"
    bring(page, "Wide", [{"role": "user", "text": "x" * 300}, {"role": "assistant", "text":
          f"{wide}\n|---|---|---|\n{wide}\n\n```\n{'y' * 300}\n```\n\nhttps://example.org/{'z' * 300}"}])
    views = {"models": "#disk > li", "models/get": "#offers > li", "models/progress": "#model-works > li",
             "settings": "#preferences-folders .line", page.evaluate("location.hash"): ".message.assistant"}
    for width, height in ((390, 800), (911, 512)):  # 911 x 512: 1366 x 768 at a zoom of 150 %
        page.set_viewport_size({"width": width, "height": height})
        for address, there in views.items():
            page.evaluate("where => location.hash = where", address)
            page.locator(there).first.wait_for()
            assert sideways(page) == [], (width, address)
        for opener, drawer in (("chats", "#left"), ("the engine", "#right")):
            page.get_by_role("button", name=f"Show or hide {opener}").click()
            expect(page.locator(drawer)).to_be_visible()
            backdrop = page.evaluate("getComputedStyle(document.querySelector('#center'), '::after').backgroundColor")
            assert backdrop == "rgba(0, 0, 0, 0.467)" and sideways(page) == [], (width, drawer)
            page.keyboard.press("Escape")
            expect(page.locator(drawer)).to_be_hidden()


def sideways(page) -> list[str]:
    """The document and the columns of the page, those that are wider than their room (a table or code may scroll)."""
    return page.evaluate("""() => [document.scrollingElement,
        ...document.querySelectorAll('.chat, .page, .scroller, #right, #left')]
        .filter(e => e.checkVisibility({visibilityProperty: true}) && e.scrollWidth > e.clientWidth)
        .map(e => `${e.className || e.tagName} ${e.scrollWidth}`)""")


@pytest.mark.slow
def test_four_hundred_messages_leave_the_page_light(page):
    """A hundred updates of a growing answer under a long conversation: few messages are drawn, one is touched."""
    long_conversation(page, 400)
    expect(page.locator(".message")).to_have_count(40)
    page.evaluate("""() => { window.touched = new Set(); new MutationObserver(records => {
       for (const { target } of records) touched.add((target.closest ? target : target.parentNode).closest('.message'));
    }).observe(document.querySelector('.messages'), {childList: true, subtree: true, characterData: true}); }""")
    page.evaluate(GROW, 100)
    assert page.evaluate("[...touched].map(message => message?.matches(':last-child'))") == [True]
    expect(page.locator(".message:last-child .answer .block")).to_have_count(20)


def test_earlier_messages_come_when_asked_for(page):
    long_conversation(page, 100)
    page.get_by_role("button", name="Load earlier messages").click()
    expect(page.locator(".message")).to_have_count(80)
    page.get_by_role("button", name="Load earlier messages").click()
    expect(page.locator(".message")).to_have_count(100)
    expect(page.locator(".earlier")).to_have_count(0)


def test_markdown_code_and_math_are_shown(page):
    long_conversation(page, 40)
    answer = page.locator(".message.assistant").last
    expect(answer.locator("strong")).to_have_count(3)
    expect(answer.locator("math msup")).to_have_count(3)
    copy = answer.locator(".copy-code").first
    copy.evaluate("""button => new MutationObserver(() => { window.said ||= button.textContent; })
        .observe(button, {childList: true, subtree: true, characterData: true})""")  # it says so for a moment only
    copy.click()
    page.wait_for_function("window.said === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1\n"


def test_each_paragraph_runs_as_its_own_script_does(page):
    arabic = "مرحبا بالعالم، كيف الحال؟"
    bring(page, arabic, [{"role": "user", "text": arabic},
                         {"role": "assistant", "text": f"Hello.\n\n{arabic}\n\n- {arabic}"}])
    edges = """element => { const range = document.createRange(); range.selectNodeContents(element);
        const text = range.getBoundingClientRect(), box = element.getBoundingClientRect();
        return [text.left - box.left, box.right - text.right]; }"""
    for place, right in ((".message.assistant p >> nth=0", False), (".message.assistant p >> nth=1", True),
                         (".message.assistant li", True), (".bar h1", True), (".conversations .current .title", True)):
        left, gap = page.locator(place).evaluate(edges)
        assert (gap < left) is right, (place, left, gap)
    page.fill("#message", arabic)
    assert page.evaluate("document.querySelector('#message').matches(':dir(rtl)')")


def test_words_of_a_table_and_formulas_stay_whole_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    row = "| Incomprehensibilities | Internationalisation | Disestablishment |"
    text = f"{row}\n|---|---|---|\n{row}\n\n{page_of_formulas()}"
    bring(page, "Table", [{"role": "user", "text": "?"}, {"role": "assistant", "text": text}])
    heights = page.eval_on_selector_all(".md td", "all => all.map(cell => cell.clientHeight)")
    one = page.locator(".md th").first.evaluate("cell => parseFloat(getComputedStyle(cell).lineHeight)")
    assert len(heights) == 3 and max(heights) < 2 * one, heights
    assert page.evaluate("document.fonts.ready.then(() => [...document.fonts].map(font => font.status))") == ["loaded"]
    cut = page.eval_on_selector_all(".math.block", """all => all.map(place => [place.scrollHeight - place.clientHeight,
        place.scrollWidth - place.clientWidth]).filter(([y, x]) => y > 0 || x > 0)""")
    expect(page.locator(".math.block")).to_have_count(30)
    assert cut == [] and page.evaluate("document.documentElement.scrollWidth") <= 390


def test_thinking_is_folded_and_timed(page):
    bring(page, "Thought", [{"role": "user", "text": "How many oars?"},
                            {"role": "assistant", "text": "Two.", "thinking": "A boat has two sides.",
                             "stats": {"thinking_s": 2.31}}])
    thought = page.locator(".thought")
    expect(thought.locator("summary")).to_have_text("Thought for 2.3 s")
    expect(page.get_by_text("A boat has two sides.")).to_be_hidden()
    thought.locator("summary").click()
    expect(page.get_by_text("A boat has two sides.")).to_be_visible()


def test_a_foreign_message_cannot_run_anything(page):
    page.evaluate("window.harmed = false")
    evil = "<img src=x onerror='window.harmed=true'> <script>window.harmed=true</script> $\\text{<img src=x "\
        "onerror=window.harmed=true>}$ ![x](http://evil.example/x.png) [y](javascript:window.harmed=true)"
    bring(page, "<img src=x onerror=window.harmed=true>",
          [{"role": "user", "text": evil}, {"role": "assistant", "text": evil, "thinking": evil}])
    page.locator(".thought summary").click()
    page.fill("#search", "img")
    page.wait_for_selector(".conversations .snippet")
    page.wait_for_timeout(500)  # an image that fails to load would call its handler in this time
    assert page.evaluate("window.harmed") is False


def test_stop_and_a_reload_while_the_model_opens_are_fine(chromium, tmp_path):
    with browser.running(tmp_path) as other:
        context = chromium.new_context()
        watch = browser.Watch()
        context.on("page", watch.over)
        page = context.new_page()
        page.set_default_timeout(300_000)
        page.goto(other.link)
        page.wait_for_selector("#message")
        page.evaluate(STOP_AT, "Waiting for the model")
        browser.send(page, "Never mind")
        page.wait_for_function("window.pressed")
        expect(page.locator(".message.assistant")).to_contain_text("Stopped.")
        with page.expect_response(lambda reply: reply.url.endswith("/send")):     # a reload would break it off
            browser.send(page, "Hello!")  # before the model is there: it is answered as soon as it is
        page.wait_for_selector(".message.running, .message.assistant .answer:not(:empty)")     # it may be done by now
        page.reload()
        wait_ready(page)
        settled(page)
        expect(page.locator(".message.assistant .answer").first).to_be_empty()
        expect(page.locator(".message.assistant .answer").last).not_to_be_empty()
        context.close()
        watch.check()


def test_engine_and_settings_are_closed_until_somebody_opens_them(page):
    page.evaluate("localStorage.removeItem('floe-right')")
    page.reload()
    expect(page.locator("#message")).to_be_visible()
    expect(page.locator("#speed-now")).to_be_hidden()
    engine = page.get_by_role("button", name="Show or hide the engine")
    engine.click()
    expect(page.locator("#speed-now")).to_be_visible()
    page.get_by_role("button", name="Show or hide this chat's settings").click()
    expect(page.get_by_label("System prompt")).to_be_visible()
    page.reload()  # which the browser remembers
    expect(page.locator("#speed-now")).to_be_visible()
    engine.click()
    expect(page.locator("#speed-now")).to_be_hidden()


def test_another_level_is_chosen_in_the_header(page):
    page.click("#model-chip")
    expect(page.locator(".switcher .entry")).to_have_text([re.compile("Demo"), "All models"])
    for level in ("exact", "balanced"):
        page.locator("#switcher-level").select_option(level)
        expect(page.locator("#model-chip .level")).to_have_text(level)
    page.get_by_role("button", name="All models").click()
    expect(page.locator("#page-models")).to_be_visible()


def test_a_slow_disk_and_a_slow_hub_are_said_and_hold_nobody(page):
    held = []
    page.route("**/api/models", lambda route: held.append(route))
    page.route("**/api/models/search**", lambda route: held.append(route))
    page.get_by_role("link", name="Models").click()
    expect(page.locator("#page-models")).to_contain_text("Checking this computer.")
    until(page, lambda: held)
    page.unroute("**/api/models")
    held.pop().continue_()
    page.wait_for_selector("#machine-line:not(:empty)")
    expect(page.locator("#page-models")).not_to_contain_text("Checking this computer.")
    page.get_by_role("tab", name="Get models").click()
    page.fill("#hub-id", "second")
    page.press("#hub-id", "Enter")
    expect(page.locator("#hub-found")).to_contain_text("Searching Hugging Face")
    page.locator("#hub-found").get_by_role("button", name="Stop").click()
    expect(page.locator("#hub-found")).to_be_empty()
    assert page.evaluate("told") == []


def test_a_newcomer_gets_everywhere_from_the_first_start(page, tmp_path):
    """To an answer of a model of one's own, to conversations of another program, to a preset, to an old message."""
    folder = small_model.make(tmp_path, demo_model())[0].rename(tmp_path / "Mine")
    export = tmp_path / "export.zip"
    export.write_bytes(foreign_exports.zipped(conversations_dot_json=[foreign_exports.chatgpt("Old boats")]))
    page.evaluate("""async () => await fetch('/api/welcomed', {method: 'POST', body: '{"done": false}',
                                                               headers: {'content-type': 'application/json'}})""")
    page.reload()
    page.click("#welcome-skip")
    page.get_by_role("link", name="Models").click()
    page.get_by_role("tab", name="Get models").click()
    page.get_by_role("button", name="Add a folder or GGUF").click()
    page.get_by_label("Path of a .gguf file or of a model's folder").fill(str(folder))
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#disk li[data-name='Mine']").get_by_role("button", name="Compress", exact=True).click()
    page.locator(".notice", has_text="Mine-floe is ready").get_by_role("button", name="Load").click()
    until(page, lambda: stats(page).get("model") == "Mine-floe")
    wait_ready(page)
    expect(page.locator("#page-models")).to_be_hidden()
    expect(ask(page, "Hello!").locator(".stats")).to_contain_text("tokens/s")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import").click()
    chooser.value.set_files(export)
    expect(page.locator(".bar h1")).to_have_text("Old boats")
    side(page, "This chat")
    page.get_by_label("Preset", exact=True).select_option(label="Precise")
    page.locator("#settings summary").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.2")
    page.click("#new-chat")
    page.fill("#search", "stones")
    page.locator(".conversations .open", has=page.locator("mark")).first.click()
    expect(page.locator(".message.hit .answer")).to_have_text("And stones?")
    expect(page.locator(".message.hit")).to_be_in_viewport()
    page.click("#model-chip")
    page.locator(".switcher").get_by_role("button", name="Demo").click()
    until(page, lambda: stats(page).get("model") == "demo")
