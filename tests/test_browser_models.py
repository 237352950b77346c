"""The models page in the browser: verdicts for this machine, a download from a loopback Hub, switching models."""
from __future__ import annotations

import browser
import pytest
from browser import ask, stats, until
from loopback_hub import LoopbackHub

from engine import demo_model

pytestmark = pytest.mark.browser
chromium, context, page = browser.chromium, browser.context, browser.page


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The program, with a Hub of its own in place of the public one."""
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add_folder("tester/Second-Floe", demo_model())
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        with browser.running(tmp_path_factory.mktemp("data")) as app:
            yield app


def test_a_model_is_downloaded_opened_and_deleted(page):
    page.get_by_role("tab", name="Models").click()
    page.wait_for_selector("#offers li .verdict")
    assert page.locator("#offers li").count() > 5
    page.fill("#hub-id", "tester/Second-Floe")
    page.locator(".hub-id button").click()
    row = page.locator(".models li[data-name='Second-Floe']")
    row.get_by_role("button", name="Open").wait_for()
    row.get_by_role("button", name="Open").click()
    until(page, lambda: stats(page).get("model") == "Second-Floe")
    browser.wait_ready(page)
    assert ask(page, "Hello!").locator(".answer").inner_text().strip()
    page.locator(".models li[data-name='demo']").get_by_role("button", name="Open").click()
    until(page, lambda: stats(page).get("model") not in (None, "Second-Floe"))
    page.on("dialog", lambda dialog: dialog.accept())
    row.get_by_role("button", name="Delete").click()
    row.wait_for(state="detached")


def test_the_first_run_offers_three_for_an_aim(page):
    page.get_by_role("tab", name="Models").click()
    page.wait_for_selector("#offers li .verdict")
    page.get_by_label("What is it for?").select_option("coding")
    assert 1 <= page.locator("#offers li").count() <= 3
