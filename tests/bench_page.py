"""The page's own costs: `python tests/bench_page.py [--json]`. Needs a quiet machine and Chromium.

Seconds from starting the program to a page that can be typed into; the share of the browser's main thread at 20 updates
a second under 400 messages, as shown (the newest 40) and with all of them loaded; what the event stream costs the
engine's tokens per second, read by a bare reader and by a page that draws, medians of interleaved answers.
"""
from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import httpx  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from tests.support import browser  # noqa: E402

MESSAGES, UPDATES, ROUNDS, STARTS = 400, 100, 7, 3
PARAGRAPH = "Once **upon** a time there was a `boat`, and $a^2$ was *its* name.\n\n* one\n* two\n\n" \
    "```python\nx = 1\n```\n"
# 20 updates a second of an answer that grows by a line each time and by a block every fifth time.
GROW = """async n => {
  const { emit, opened } = await import('/ui/floe.js');
  const last = document.querySelector('.message:last-child');
  last.classList.add('running');
  for (let i = 0; i < n; i += 1) {
    emit('text', {message: Number(last.dataset.id), conversation: opened.id, phase: 'decode', note: '', stats: {},
      from: Math.floor(i / 5), blocks: [`<p>${'A growing line of text. '.repeat(1 + i % 5)}</p>`],
      thinking_from: 0, thinking_blocks: []});
    await new Promise(done => setTimeout(done, 50));
  }
}"""


def long_conversation(page, n: int) -> None:
    """Import a conversation of n messages and open it."""
    browser.bring(page, "Long", [{"role": "assistant" if i % 2 else "user", "text": PARAGRAPH * (3 if i % 2 else 1)}
                                 for i in range(n)])


def load_all(page, n: int) -> None:
    while page.locator(".message").count() < n:
        before = page.locator(".message").count()
        page.get_by_role("button", name="Load earlier messages").click()
        page.wait_for_function(f"document.querySelectorAll('.message').length > {before}")


def busy_share(page, n_updates: int = UPDATES) -> float:
    """Share of the main thread's processor time that 20 updates a second take."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        return {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}["TaskDuration"]
    before = busy()
    page.evaluate(GROW, n_updates)
    return (busy() - before) / (n_updates / 20)


def seconds_to_page(chromium) -> tuple[float, float]:
    """From starting the program to a page that can be typed into, and to a model that answers."""
    with tempfile.TemporaryDirectory() as data, browser.running(Path(data)) as app:
        page = chromium.new_page()
        page.set_default_timeout(browser.PATIENCE_MS)
        page.goto(app.link)
        page.wait_for_selector("#message")
        usable = time.monotonic() - app.started
        browser.wait_ready(page)
        ready = time.monotonic() - app.started
        page.close()
        return usable, ready


def speed_of_answer(client: httpx.Client, address: str) -> float:
    """Tokens per second of one greedy answer, as the engine counts them."""
    settings = {"temperature": 0.0, "max_tokens": 200}
    document = {"format": "floechat-conversations", "version": 1, "conversations": [
        {"title": "Bench", "leaf": None, "settings": settings, "messages": [],
         "created_at": time.time()}]}  # which tells it from the one before
    made = client.post(f"{address}/api/import", content=json.dumps(document)).json()["made"][0]["id"]
    client.post(f"{address}/api/conversations/{made}/send", json={"text": "Tell me a story about a dragon."})
    while client.get(f"{address}/api/state").json()["live"]:
        time.sleep(0.5)
    message = client.get(f"{address}/api/conversations/{made}").json()["messages"][-1]
    return message["stats"]["tokens_per_second"]


@contextmanager
def reader(client: httpx.Client, address: str) -> Iterator[None]:
    """Somebody who takes the whole event stream and draws nothing."""
    ended = threading.Event()

    def read() -> None:
        with client.stream("GET", f"{address}/events") as events:
            for _ in events.iter_lines():
                if ended.is_set():
                    return
    thread = threading.Thread(target=read)
    thread.start()
    yield
    ended.set()
    thread.join()


@contextmanager
def watcher(chromium, app) -> Iterator[None]:
    """A page that shows whatever is being written."""
    page = chromium.new_page()
    page.goto(app.link)
    browser.wait_ready(page)
    page.evaluate("""async () => {
      const { on, opened } = await import('/ui/floe.js');
      on('state', ({now}) => { if (now.live && opened.id !== now.live.conversation)
        opened.id = now.live.conversation; });
    }""")
    page.wait_for_timeout(1000)
    yield
    page.close()


def speeds(chromium, app) -> dict[str, list[float]]:
    """Tokens per second with nobody watching, a reader, and a page, in turns."""
    found: dict[str, list[float]] = {"alone": [], "read": [], "watched": []}
    with httpx.Client(timeout=60, headers=app.credentials) as client:
        speed_of_answer(client, app.address)  # warms up
        for _ in range(ROUNDS):
            found["alone"].append(speed_of_answer(client, app.address))
            with reader(client, app.address):
                found["read"].append(speed_of_answer(client, app.address))
            with watcher(chromium, app):
                found["watched"].append(speed_of_answer(client, app.address))
    return found


def measure() -> dict:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.CHROMIUM, chromium_sandbox=False,
                                              args=["--disable-gpu"])
        starts = [seconds_to_page(chromium) for _ in range(STARTS)]
        with tempfile.TemporaryDirectory() as data, browser.running(Path(data)) as app:
            context = chromium.new_context(viewport={"width": 1400, "height": 860})
            page = context.new_page()
            page.set_default_timeout(browser.PATIENCE_MS)
            page.goto(app.link)
            browser.wait_ready(page)
            long_conversation(page, MESSAGES)
            shown = busy_share(page)
            page.reload()
            page.wait_for_function("document.querySelectorAll('.message').length >= 40")
            load_all(page, MESSAGES)
            loaded = busy_share(page)
            context.close()
            rates = {kind: median(values) for kind, values in speeds(chromium, app).items()}
        chromium.close()
    return {"page_seconds": median(s for s, _ in starts), "model_seconds": median(s for _, s in starts),
            "main_thread_40_shown": shown, "main_thread_400_loaded": loaded,
            **{f"tokens_per_second_{kind}": value for kind, value in rates.items()},
            "streaming_cost": 1 - rates["read"] / rates["alone"], "page_cost": 1 - rates["watched"] / rates["alone"]}


def main() -> None:
    found = measure()
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    print(f"page usable after {found['page_seconds']:.1f} s, model ready after {found['model_seconds']:.1f} s\n"
          f"main thread at 20 updates/s, {MESSAGES} messages: {100 * found['main_thread_40_shown']:.0f} % with the "
          f"newest 40 shown, {100 * found['main_thread_400_loaded']:.0f} % with all loaded\n"
          f"tokens/s alone {found['tokens_per_second_alone']:.1f}, streamed to a reader "
          f"{found['tokens_per_second_read']:.1f} ({-100 * found['streaming_cost']:+.1f} %), to a page on the same "
          f"cores {found['tokens_per_second_watched']:.1f} ({-100 * found['page_cost']:+.1f} %)")


if __name__ == "__main__":
    main()
