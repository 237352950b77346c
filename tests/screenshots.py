"""The README's pictures: `python tests/screenshots.py` drives the real program and writes assets/docs/*.png."""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import browser  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

PLACE = browser.REPOSITORY / "assets" / "docs"


def main() -> None:
    with tempfile.TemporaryDirectory() as data, browser.running(Path(data)) as app, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.CHROMIUM, chromium_sandbox=False)
        page = chromium.new_page(viewport={"width": 1400, "height": 860})
        page.set_default_timeout(300_000)
        page.goto(app.link)
        browser.wait_ready(page)
        browser.ask(page, "Tell me a story about a small boat.")
        browser.ask(page, "Thank you! How are you?")
        page.screenshot(path=PLACE / "chat-light.png")
        page.click("#theme")
        page.screenshot(path=PLACE / "chat-dark.png")
        page.get_by_role("tab", name="Models").click()
        page.wait_for_selector("#offers li .verdict")
        page.screenshot(path=PLACE / "models.png")
        page.set_viewport_size({"width": 390, "height": 800})
        page.wait_for_timeout(500)
        page.screenshot(path=PLACE / "phone.png")
        chromium.close()


if __name__ == "__main__":
    main()
