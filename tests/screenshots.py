"""Pictures of the real program: `python tests/screenshots.py` writes the README's, assets/docs/*.png, and `python
tests/screenshots.py DIR` every view (first start, chat, models, details, settings) at three widths and at a zoom of
150 %, in both themes.

Colours are reduced to a palette, so that a picture stays far below 300 kB. Look at them before they are committed.
"""
from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from tests.support import browser  # noqa: E402

PLACE = browser.REPOSITORY / "assets" / "docs"
MOST_BYTES = 300_000


WIDTHS = {"desktop": (1366, 768), "large": (1920, 1080), "phone": (390, 844), "zoomed": (911, 512)}  # at 150 %


def main(everywhere: Path | None) -> None:
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        data = Path(home) / ".local" / "share" / "floechat"
        data.mkdir(parents=True)
        os.environ["HOME"] = home  # no picture names a folder of this computer
        with browser.running(data) as app:
            drive(app, playwright, everywhere)


def drive(app, playwright, everywhere: Path | None) -> None:
    chromium = playwright.chromium.launch(executable_path=browser.CHROMIUM, chromium_sandbox=False)
    page = chromium.new_page(viewport={"width": 1400, "height": 860})
    page.set_default_timeout(browser.PATIENCE_MS)
    page.goto(app.link)
    browser.wait_ready(page)
    if everywhere:
        everywhere.mkdir(parents=True, exist_ok=True)
        take_everywhere(page, everywhere)
    else:
        take(page)
    chromium.close()


def take_everywhere(page, folder: Path) -> None:
    """Each view once, then at each width in each theme."""
    def view(name: str, seen: str = "body") -> None:
        for width, (across, down) in WIDTHS.items():
            page.set_viewport_size({"width": across, "height": down})
            for theme in ("light", "dark"):
                page.emulate_media(color_scheme=theme)
                page.mouse.move(0, 0)
                page.locator(seen).first.scroll_into_view_if_needed()
                page.wait_for_timeout(400)
                page.screenshot(path=folder / f"{name}-{width}-{theme}.png")
        page.set_viewport_size({"width": 1366, "height": 768})

    view("first-start")
    page.click("#welcome-skip")
    browser.ask(page, "Hello! How are you today?")
    browser.ask(page, "Tell me a story about a small boat.")
    view("chat")
    page.evaluate("location.hash = 'models/get'")
    page.wait_for_selector("#offers > li")
    view("models")
    page.locator("#offers .card-details > summary").first.click()
    page.wait_for_selector("#offers .picture table")
    view("details", "#offers .card-details[open]")
    page.evaluate("location.hash = 'settings'")
    page.wait_for_selector("#preferences-folders .line")
    view("settings")


def take(page) -> None:
    page.wait_for_timeout(1500)
    picture(page, "first-run")
    page.click(".aim[data-aim=fast]")
    page.wait_for_selector(".fits li")
    picture(page, "three-fits")
    page.click("#welcome-skip")
    browser.ask(page, "Hello! How are you today?")
    browser.ask(page, "Tell me a story about a small boat.")
    page.wait_for_timeout(1500)
    picture(page, "chat-light")
    page.click("#theme")
    browser.side(page, "Engine")
    page.evaluate("document.querySelector('#why').scrollIntoView()")
    picture(page, "engine-dark")
    page.evaluate("location.hash = 'models/get'")
    page.locator("#offers .card-details > summary").first.click()
    page.wait_for_selector("#offers .picture table")
    picture(page, "models-dark")
    page.go_back()
    page.click("#theme")
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(500)
    picture(page, "phone")


def picture(page, name: str) -> None:
    path = PLACE / f"{name}.png"
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    page.screenshot(path=path)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    assert path.stat().st_size < MOST_BYTES, f"{path.name} is too large for a README"
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
