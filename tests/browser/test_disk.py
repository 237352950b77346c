"""A full disk while chatting: said, nothing lost, and the chat goes on when there is room. On a disk of 6 MB that is
the program's own (a tmpfs in a mount namespace)."""
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support import browser
from tests.support.browser import TOLD, ask, expect, send, settled, stats, told, until

pytestmark = pytest.mark.browser
chromium, context, page = browser.chromium, browser.context, browser.page

TALE = "Write a long story. Use the words river, dog, moon."


def on_small_disk(folder: Path) -> tuple[str, ...]:
    """A command that runs another one with 6 MB of room in `folder`; skips the test where that is not allowed."""
    inside = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=6m none "{folder}" && exec "$@"', "sh")
    try:
        allowed = subprocess.run([*inside, "true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("needs unprivileged mount namespaces (unshare -rm)")
    return inside


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    with browser.running(data, inside=on_small_disk(data), program="tests.browser.program") as app:
        yield app


def fill(app) -> Path:
    """Leave not one byte free on the program's disk; -> the file that takes the room."""
    path = Path(f"/proc/{app.process.pid}/root{app.data}/filler")
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


@pytest.fixture
def context(app, chromium):  # noqa: F811
    """As everywhere, but errors in the console are expected: the program answers 507."""
    context = chromium.new_context(viewport={"width": 1400, "height": 860})
    context.add_init_script(TOLD)
    yield context
    context.close()


def test_a_full_disk_is_said_nothing_is_lost_and_the_chat_goes_on(app, page):
    ask(page, "Hello!")
    with app.endless():
        send(page, TALE)
        expect(page.locator(".message.running .answer")).to_have_text(re.compile(r".{10}", re.DOTALL))
        filler = fill(app)
    page.wait_for_selector(".banner.bad:has-text('make room on the disk')")
    until(page, lambda: stats(page)["phase"] == "idle")  # the answer went on to its end
    send(page, "Are you still there?")
    told(page, "Nothing was saved")
    expect(page.locator("#message")).to_have_value("Are you still there?")  # what was typed is still there
    grown = page.locator(".message.assistant .answer").last.text_content().strip()
    filler.unlink()
    page.wait_for_selector(".banner:empty", state="attached")
    settled(page)
    page.reload()
    assert len(grown) > 40
    expect(page.locator(".message.assistant .answer").last).to_have_text(re.compile(re.escape(grown)))
    expect(ask(page, "And now?").locator(".answer")).not_to_be_empty()
