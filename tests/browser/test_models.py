"""The models page and the first run in the browser: what suits this machine, downloads from a loopback Hub, level and
context with the plan's words, import of a GGUF file, the graphics card as a stand-in driver shows it."""
from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from engine import demo_model
from engine.library import catalogue
from tests.support import browser, fake_driver
from tests.support.browser import ask, expect, state, stats, told, until
from tests.support.loopback_hub import LoopbackHub

pytestmark = pytest.mark.browser
chromium, context, page = browser.chromium, browser.context, browser.page


@pytest.fixture(scope="module")
def hub():
    """A Hub in place of the public one; every repository of the catalogue is the embedded model."""
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    with LoopbackHub() as hub:
        for name in ("tester/Second-Floe", *(entry.repository for entry in catalogue.entries().values())):
            hub.add_folder(name, demo_model())
        yield hub


@pytest.fixture(scope="module")
def app(hub, tmp_path_factory):
    """The program with that Hub, a card that a stand-in driver shows, and a file manager that notes folders."""
    tools = tmp_path_factory.mktemp("tools")
    manager = tools / "xdg-open"
    manager.write_text(f'#!/bin/sh\nprintf %s "$1" > {tools}/part && mv {tools}/part {tools}/opened\n')
    manager.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("LD_LIBRARY_PATH", str(fake_driver.build(tools)))
        patch.setenv("FAKE_NVML_CARDS", fake_driver.RTX_3060)
        patch.setenv("FAKE_NVML_LINK", "12000000,250")
        with browser.running(tmp_path_factory.mktemp("data")) as app:
            app.tools = tools
            yield app


@pytest.fixture
def newcomer(app, context):
    """The page as it is at the very first start."""
    page = context.new_page()
    page.set_default_timeout(browser.PATIENCE_MS)
    page.goto(app.link)
    browser.wait_ready(page)
    return page


def models_page(page, tab: str = "On this computer") -> None:
    """The Models page at one of its tabs, drawn."""
    if page.locator("#page-models").is_hidden():
        page.get_by_role("link", name="Models").click()
    page.wait_for_selector("#machine-line:not(:empty)")
    page.get_by_role("tab", name=tab).click()


def row(page, name: str):
    """A model of this computer, shown."""
    models_page(page)
    return page.locator(f"#disk li[data-name='{name}']")


def work_row(page, name: str):
    models_page(page, "In progress")
    return page.locator(f"#model-works li[data-name='{name}']")


def fetch(page, address: str) -> None:
    """Download a repository that the catalogue does not have, by what a person pastes."""
    models_page(page, "Get models")
    page.fill("#hub-id", address)
    page.press("#hub-id", "Enter")
    page.locator("#hub-found").get_by_role("button", name="Download").click()


def test_the_first_run_asks_offers_three_and_fetches_while_the_demonstration_chats(hub, newcomer):
    page = newcomer
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator(".aim")).to_have_count(4)
    page.click(".aim[data-aim=coding]")
    offers = page.locator(".fits li")
    expect(offers).to_have_text([re.compile(r"(Recommended|Fits|Slow)[\s\S]*tokens/s")] * 3)
    page.get_by_role("button", name="Back").click()
    page.click(".aim[data-aim=fast]")
    page.wait_for_selector(".fits li")
    hub.pause = 0.2  # it is under way until the demonstration has answered
    name, title = offers.first.get_attribute("data-name"), offers.first.locator("h3").text_content()
    offers.first.get_by_role("button", name="Download").click()
    page.wait_for_selector(f"#works .work:has-text('{title}')")
    page.wait_for_selector("#welcome", state="hidden")
    expect(ask(page, "Hello!").locator(".answer")).not_to_be_empty()  # the demonstration, meanwhile
    assert [work["name"] for work in state(page)["works"]] == [name]
    hub.pause = 0.0
    page.wait_for_selector(f".notice:has-text('{title} is ready')")
    page.reload()
    browser.wait_ready(page)
    page.wait_for_selector(".message.user")
    expect(page.locator("#welcome")).to_be_hidden()  # remembered
    models_page(page, "Get models")
    page.click("#find-model")
    page.wait_for_selector(".aim[data-aim=long]")
    page.click("#welcome-skip")
    page.wait_for_selector(".message.user")


@pytest.mark.parametrize("left, said", [("mixtral-8x7b", "The best of the others"), ("", "No model of the catalogue")])
def test_where_little_or_nothing_is_practical_the_first_start_says_so(newcomer, left, said):
    """A slower computer in place of this one: the verdicts are another's, all else is the program's."""
    page = newcomer

    def slower(route):
        reply = route.fetch()
        shelf = reply.json()
        for offer in shelf["offers"]:
            offer.update(recommended=False, verdict="slow" if offer["name"] == left else "impractical")
        route.fulfill(response=reply, json=shelf)
    page.route("**/api/models", slower)
    page.evaluate("""fetch('/api/welcomed', {method: 'POST', body: '{"done": false}',
        headers: {'content-type': 'application/json'}})""")
    page.click(".aim[data-aim=coding]")
    expect(page.locator("#welcome")).to_contain_text(said)
    expect(page.locator("#welcome").get_by_role("button", name="Download")).to_have_count(1 if left else 0)
    page.click("#welcome-skip")
    models_page(page, "Get models")
    expect(page.locator("#offers .verdict.impractical")).to_have_count(len(catalogue.entries()) - bool(left))
    expect(page.locator("#offers > li > .card-row .primary")).to_have_count(1 if left else 0)
    expect(page.locator("#offers-said")).to_be_visible(visible=not left)


def test_a_model_is_downloaded_opened_and_deleted(hub, page):
    models_page(page, "Get models")
    expect(page.locator("#offers > li")).to_have_count(len(catalogue.entries()))
    fetch(page, f"{hub.endpoint}/tester/Second-Floe/tree/main")
    second = row(page, "Second-Floe")
    second.get_by_role("button", name="Load", exact=True).first.click()
    until(page, lambda: stats(page).get("model") == "Second-Floe")
    browser.wait_ready(page)
    expect(ask(page, "Hello!").locator(".answer")).not_to_be_empty()
    titles_by_the_model(page)
    row(page, "demo").get_by_role("button", name="Load", exact=True).first.click()
    until(page, lambda: stats(page).get("model") == "demo")
    models_page(page)
    expect(page.locator("#disk-use")).to_have_text(re.compile(r"^[1-9][\d.]* MB used by models"))
    page.on("dialog", lambda dialog: dialog.accept())
    second.get_by_role("button", name="Delete").click()
    second.wait_for(state="detached")


def titles_by_the_model(page) -> None:
    """It writes one after the first answer, if it may."""
    question = "What is the capital of France?"  # to which the small model finds what can be taken for a title
    box, title = page.get_by_label("Let the model write titles"), page.locator(".conversations .current .title")
    for wished in (False, True):
        page.get_by_role("link", name="Settings").click()
        with page.expect_response("**/api/preferences/titles"):
            box.set_checked(wished)
        page.evaluate("""async () => {
          const document = {format: 'floechat-conversations', version: 1, conversations: [
            {title: '', leaf: null, settings: {temperature: 0}, messages: []}]};
          const made = await (await fetch('/api/import', {method: 'POST', body: JSON.stringify(document),
            headers: {'content-type': 'text/plain'}})).json();
          location.hash = `c${made.made[0].id}`;
        }""")
        ask(page, question)
        if wished:
            expect(title).to_have_text(re.compile("^(?!What is).+"))
            expect(page.locator("h1")).to_have_text(title.text_content())
    expect(page.locator(".conversations .title", has_text=question)).to_have_count(1)
    page.get_by_role("link", name="Settings").click()
    page.reload()
    browser.wait_ready(page)
    expect(box).to_be_checked()
    page.get_by_role("button", name="Back to the chat").click()


def test_a_download_is_paused_goes_on_and_is_cancelled(hub, page):
    hub.pause = 0.2  # three minutes in all, if nobody pauses it
    fetch(page, "tester/Second-Floe")
    work = work_row(page, "Second-Floe")
    expect(work.locator("p")).to_contain_text(" of ")
    work.get_by_role("button", name="Pause").click()
    work.get_by_role("button", name="Resume").wait_for()
    expect(work).to_contain_text("Paused")
    work.get_by_role("button", name="Resume").click()
    work.get_by_role("button", name="Pause").wait_for()
    answers = [False, True]
    page.on("dialog", lambda dialog: dialog.accept() if answers.pop(0) else dialog.dismiss())
    work.get_by_role("button", name="Cancel").click()
    expect(work).to_be_visible()  # asked, and not yet
    work.get_by_role("button", name="Cancel").click()
    work.wait_for(state="detached")
    hub.pause = 0.0
    told(page, "deleted")
    row(page, "Second-Floe").wait_for(state="detached")


def test_level_and_context_change_the_plans_words_and_are_opened_with(page):
    demo = row(page, "demo")
    demo.get_by_text("Details", exact=True).click()
    plan = demo.locator("pre.plan")
    expect(plan).to_contain_text("1,024 tokens")
    demo.locator("select").first.select_option("fast")
    expect(plan).to_contain_text("at level fast")
    demo.locator("input[type=range]").fill("0")
    expect(plan).to_contain_text("context of 512 tokens")
    demo.get_by_label("Context (tokens)").first.fill("4096")
    expect(plan).to_contain_text("at most 1,024 tokens")
    demo.get_by_label("Context (tokens)").first.fill("640")
    expect(plan).to_contain_text("context of 640 tokens")
    expect(plan).to_have_attribute("data-verdict", re.compile("fits|slow"))
    demo.get_by_label("Near memory (MiB)").fill("8")
    demo.locator(".load-options").get_by_role("button", name="Load", exact=True).click()
    until(page, lambda: (stats(page).get("level"), stats(page).get("context")) == ("fast", 640))
    assert stats(page)["near_bytes"] <= 8 << 20
    browser.wait_ready(page)
    expect(ask(page, "Hello!").locator(".stats")).to_contain_text("fast")
    expect(page.locator("#context-meter")).to_contain_text("of 640 tokens")


def test_opening_a_model_shows_its_steps_and_the_time_left(page):
    page.evaluate("""() => {
      window.steps = new Set();
      new MutationObserver(() => {
        for (const step of document.querySelectorAll('.banner .steps li')) window.steps.add(step.textContent);
        const clock = document.querySelector('.banner .clock')?.textContent;
        if (clock) window.steps.add(clock.replace(/\\d+/, 'N'));
      }).observe(document.querySelector('.banner'), {childList: true, subtree: true, characterData: true});
    }""")
    for _ in range(5):  # a model this small may be open before the page has looked twice
        row(page, "demo").get_by_text("Details", exact=True).click()
        row(page, "demo").locator(".load-options").get_by_role("button", name="Load", exact=True).click()
        until(page, lambda: state(page)["model"]["opened"] is not None)
        browser.wait_ready(page)
        seen = set(page.evaluate("[...window.steps]"))
        if len(seen) > 1:
            break
    steps = state(page)["model"]["opened"]
    assert {"Reading the tokenizer", "Reading the weights", "Preparing near memory"} <= set(steps)
    assert seen & set(steps) and "about N s left" in seen, seen  # it was opened before: how long it takes is known


def test_the_hub_is_searched_by_words_and_a_repository_is_checked_before_it_is_fetched(page):
    models_page(page, "Get models")
    page.fill("#hub-id", "second")
    expect(page.locator("#offers > li")).to_have_count(0)
    expect(page.locator("#offers-said")).to_contain_text("The catalogue has no such model")
    page.get_by_role("button", name="Search Hugging Face").click()
    hit = page.locator("#hub-found > li")
    expect(hit).to_contain_text("safetensors · 1,234 downloads a month · 7 likes".replace(" · ", ""))
    hit.get_by_role("button", name="Check whether it fits").click()
    expect(hit.locator(".verdict")).to_have_text(re.compile("Fits|Slow"))
    hit.get_by_text("Details", exact=True).click()
    expect(hit.get_by_role("img", name="Main memory")).to_be_visible()
    page.fill("#hub-id", "https://huggingface.co/datasets/tester/pictures")
    page.press("#hub-id", "Enter")
    told(page, "is not the address of a model")
    page.fill("#hub-id", "nothing of that name")
    page.press("#hub-id", "Enter")
    expect(hit).to_have_text("Nothing was found on Hugging Face.")


def test_a_folder_elsewhere_is_added_by_its_path_and_taken_off_the_list_again(page, tmp_path):
    shutil.copytree(demo_model(), tmp_path / "Elsewhere")
    models_page(page, "Get models")
    page.get_by_role("button", name="Add a folder or GGUF").click()
    page.fill("#local-path", str(tmp_path))
    page.get_by_role("button", name="Add", exact=True).click()
    told(page, "add one of its folders: Elsewhere")
    page.fill("#local-path", str(tmp_path / "Elsewhere"))
    page.get_by_role("button", name="Add", exact=True).click()
    mine = row(page, "Elsewhere")
    expect(mine).to_contain_text("in its own folder")
    page.on("dialog", lambda dialog: dialog.accept())
    mine.get_by_role("button", name="Remove from list").click()
    page.wait_for_selector(".notice:has-text('its files stay where they are')")
    mine.wait_for(state="detached")
    assert (tmp_path / "Elsewhere" / "floe.json").is_file()


def test_what_is_dropped_is_found_where_models_usually_are(app, page):
    (app.data / "models" / "Dropped.gguf").write_bytes(b"GGUF")
    models_page(page, "Get models")
    drop = """([name, text]) => { const carried = new DataTransfer(); carried.items.add(new File([text], name));
        const dropped = new DragEvent('drop', {dataTransfer: carried, bubbles: true});
        document.querySelector('.get-models').dispatchEvent(dropped); }"""
    page.evaluate(drop, ["Dropped.gguf", "GGUF"])
    expect(page.locator("#local-path")).to_have_value(str(app.data / "models" / "Dropped.gguf"))
    page.evaluate(drop, ["Dropped.gguf", "another of that name"])
    told(page, "type its path")
    expect(page.locator("#local-path")).to_have_value("Dropped.gguf")


def test_each_tab_of_the_page_has_an_address(page):
    page.evaluate("location.hash = '#models/get'")
    expect(page.get_by_role("tab", name="Get models")).to_have_attribute("aria-selected", "true")
    page.wait_for_selector("#offers > li")
    page.keyboard.press("Tab")
    page.get_by_role("tab", name="Get models").press("ArrowRight")
    expect(page.locator("#models-progress")).to_contain_text("Nothing is in progress.")
    assert page.evaluate("location.hash") == "#models/progress"
    page.go_back()
    expect(page.locator("#message")).to_be_visible()


def test_the_folder_of_a_model_opens_in_the_file_manager(app, page):
    row(page, "demo").get_by_role("button", name="Open folder").click()
    until(page, (app.tools / "opened").exists)
    assert (app.tools / "opened").read_text() == str(demo_model())


def test_new_models_are_kept_in_another_folder(page, tmp_path):
    models_page(page)
    page.locator("summary", has_text="Model storage location").click()
    path = page.get_by_label("Folder on this computer")
    button = page.get_by_role("button", name="Store new models there")
    path.fill(str(tmp_path))
    button.click()
    told(page, f"New models are stored in {tmp_path}")
    expect(page.locator("#disk-use")).to_contain_text(str(tmp_path))
    fetch(page, "tester/Second-Floe")
    row(page, "Second-Floe").get_by_role("button", name="Load", exact=True).first.wait_for()  # a part has none
    assert (tmp_path / "Second-Floe" / "floe.json").is_file()
    page.on("dialog", lambda dialog: dialog.accept())
    row(page, "Second-Floe").get_by_role("button", name="Delete").click()
    row(page, "Second-Floe").wait_for(state="detached")
    page.locator("summary", has_text="Model storage location").click()
    path.fill("")
    button.click()
    expect(page.locator("#disk-use")).not_to_contain_text(str(tmp_path))


def test_the_aim_narrows_the_catalogue_to_three(page):
    models_page(page, "Get models")
    page.get_by_label("What will you use it for?").select_option("coding")
    best = [name for name, entry in catalogue.entries().items() if "coding" in entry.good_for]
    expect(page.locator("#offers > li")).to_have_count(min(3, len(best)))
    shown = page.eval_on_selector_all("#offers > li", "all => all.map(row => row.dataset.name)")
    assert set(shown) <= set(best) and shown


def test_a_gguf_file_of_here_or_of_the_hub_is_given_its_original(hub, page, tmp_path):
    pytest.importorskip("gguf")
    from tests.support.gguf_files import tiny
    file, original = map(str, tiny(tmp_path, "Tiny-Boat.gguf"))
    shutil.copy(demo_model() / "chat_template.jinja", original)
    models_page(page, "Get models")
    page.get_by_role("button", name="Add a folder or GGUF").click()
    page.fill("#local-path", str(tmp_path / "Tiny"))
    expect(page.locator("#local-path-files option")).to_have_attribute("value", file)
    page.fill("#local-path", page.locator("#local-path-files option").get_attribute("value"))
    page.fill("#gguf-like", original)
    page.get_by_role("button", name="Add", exact=True).click()
    made = row(page, "Tiny-Boat")
    made.get_by_role("button", name="Load", exact=True).first.click()
    until(page, lambda: stats(page).get("model") == "Tiny-Boat")
    row(page, "demo").get_by_role("button", name="Load", exact=True).first.click()
    until(page, lambda: stats(page).get("model") == "demo")
    hub.add("tester/Tiny-Sail-GGUF", {"Tiny-Sail-Q8_0.gguf": Path(file).read_bytes()})
    models_page(page, "Get models")
    page.fill("#hub-id", "tester/Tiny-Sail-GGUF")
    page.press("#hub-id", "Enter")
    found = page.locator("#hub-found > li")
    found.get_by_role("button", name="Download").click()
    expect(work_row(page, "Tiny-Sail-GGUF")).to_contain_text("name the original model")
    models_page(page, "Get models")
    found.get_by_label("Original model").fill(original)
    found.get_by_role("button", name="Download").click()
    expect(row(page, "Tiny-Sail-GGUF").get_by_role("button", name="Load", exact=True).first).to_be_visible()


def test_a_checkpoint_is_compressed_measured_and_then_offers_its_levels(app, page, tmp_path):
    from tests.support import small_model
    checkpoint, _ = small_model.make(tmp_path, demo_model())
    with (checkpoint / "chat_template.jinja").open("a", encoding="utf-8") as template:
        template.write("{% if enable_thinking and reasoning_effort %}{% endif %}")  # the demonstration has neither
    shutil.move(checkpoint, app.data / "models" / "Little")
    text = tmp_path / "tales.txt"
    text.write_text("<|endoftext|>\n".join(f"The boat came back with {n} fish.\n" * 8 for n in range(9)))
    page.on("dialog", lambda dialog: dialog.accept())
    checkpoint = row(page, "Little")
    checkpoint.locator("summary", has_text="Compress for quality").click()
    checkpoint.get_by_label("Text file to compress with").fill(str(tmp_path / "none.txt"))
    checkpoint.get_by_role("button", name="Compress for quality").click()
    told(page, "There is no text file")
    checkpoint.get_by_label("Text file to compress with").fill(str(text))
    checkpoint.get_by_role("button", name="Compress for quality").click()
    made = page.locator(".notice", has_text="Little-floe is ready at level exact")
    expect(made.get_by_role("button")).to_have_count(3)  # open, measure, hide
    made.get_by_role("button", name="Load").click()
    until(page, lambda: stats(page).get("model") == "Little-floe")
    browser.wait_ready(page)
    page.get_by_role("tab", name="Engine").click()
    expect(page.locator("#level")).to_contain_text("have not been measured yet")
    little = row(page, "Little-floe")
    little.locator("summary", has_text="Measure levels").click()
    little.get_by_role("button", name="Measure levels").click()  # on our own text
    work = work_row(page, "Little-floe")
    expect(work.locator("p")).to_contain_text("at most")
    work.get_by_role("button", name="Pause").click()
    expect(work).to_contain_text("measurements so far are kept")
    work.get_by_role("button", name="Cancel").click()
    work.wait_for(state="detached")
    models_page(page)
    little.get_by_label("Text file to measure on").fill(str(tmp_path / "tales"))
    expect(little.locator("datalist option")).to_have_attribute("value", str(text))
    little.get_by_label("Text file to measure on").fill(str(text))
    little.get_by_role("button", name="Measure levels").click()
    page.wait_for_selector("#works .work:has-text('Little-floe')")  # above the conversation, too
    measured = page.locator(".notice", has_text="The levels of Little-floe are measured")
    expect(little.locator("summary", has_text="Measure levels")).to_have_count(0)
    measured.get_by_role("button", name="Load").click()
    until(page, lambda: "fast" in state(page)["model"].get("levels", {}))
    page.get_by_role("tab", name="Engine").click()
    expect(page.locator("#level")).to_contain_text(re.compile("[Ll]ower levels"))
    page.click("#level input")
    expect(page.locator("#level [role=option]")).to_contain_text(["exact", "quality", "balanced", "fast", "floe"])
    page.locator("#level [role=option]", has_text="fast").click()
    until(page, lambda: stats(page)["level"] == "fast")
    expect(ask(page, "Hello!").locator(".stats")).to_contain_text("fast")
    page.get_by_role("tab", name="This chat").click()
    for wish in ("Thinking", "Effort"):
        expect(page.get_by_label(wish, exact=True)).to_be_visible()
    page.click("#model-chip")  # what is open, and the way to the models
    page.get_by_role("button", name="All models").click()
    page.wait_for_selector("#disk li")
    row(page, "demo").get_by_role("button", name="Load", exact=True).first.click()
    until(page, lambda: stats(page).get("model") == "demo")
    expect(page.locator("#model-chip")).to_contain_text("Demo")
    page.get_by_role("tab", name="This chat").click()
    for wish in ("Thinking", "Effort"):
        expect(page.get_by_label(wish, exact=True)).to_be_hidden()


def test_the_card_counts_beside_the_engine(page):
    expect(page.locator("#card-link")).to_contain_text("12.0 GB/s to the card, 250.0 kB/s from it")
    page.wait_for_selector(".link polyline.card", state="attached")
    expect(page.locator(".memory .bar-row", has_text="video memory")).to_contain_text("406.8 MB / 12.9 GB")
    assert stats(page)["card"]["name"].endswith("RTX 3060")
