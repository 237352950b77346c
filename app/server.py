"""The web application put together: guard outside, our routes, Gradio's page below them, one producer for all tabs."""
from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: no telemetry, no version check

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import StreamingResponse
from starlette.staticfiles import StaticFiles

from app import preferences
from app.chat.answers import Jobs
from app.chat.chat_settings import Drafts
from app.chat.chats import Chats
from app.http import api, attachments, switcher
from app.http.connection import HEADER_BYTES, Connection
from app.http.events import Stream
from app.http.request_guard import Guard
from app.http.sign_in import SignIn
from app.library.machine_status import Surroundings
from app.library.model_library import Shelf
from app.library.open_model import Models
from app.openai_api import routes as programs
from app.openai_api.keys import STORED, Keys
from app.openai_api.served import Served
from app.panel import Panel
from engine import PRESETS, Options, UserError, demo_model

PAGE_FIRST_SECONDS = 3.0
UI = Path(__file__).resolve().parents[1] / "assets" / "ui"


@dataclass
class Parts:
    """Everything that lives as long as the program."""

    chats: Chats
    drafts: Drafts
    models: Models
    jobs: Jobs
    shelf: Shelf
    panel: Panel
    stream: Stream
    around: Surroundings
    keys: Keys

    @staticmethod
    def make(data: Path, model: Path | None, options: Options, plan_level: bool = False) -> Parts:
        """model: None for the last that was open, at its level, context and preset."""
        chats, around = Chats(data / "chats.db"), Surroundings(data, options.device)
        drafts = Drafts(chats)
        if model is None:
            model, options, plan_level = _last(chats.preference("opened", {}), options, plan_level)
        models = Models(model, options, around, plan_level, remember=partial(chats.set_preference, "opened"))
        jobs = Jobs(chats, models)
        shelf = Shelf(models, around, keep=partial(chats.set_preference, "works"),
                      unfinished=chats.preference("works", []))
        keys = Keys(lambda: chats.preference(STORED, []), partial(chats.set_preference, STORED))
        panel = Panel(models)
        stream = Stream(panel, lambda: jobs.live, lambda: api.state(chats, jobs, models, shelf))
        models.on_change = jobs.on_change = shelf.works.on_change = stream.changed
        return Parts(chats, drafts, models, jobs, shelf, panel, stream, around, keys)

    def close(self) -> None:
        self.shelf.close()
        self.jobs.close()
        self.models.close()
        self.around.close()
        self.chats.close()


def _last(opened: dict, options: Options, plan_level: bool) -> tuple[Path, Options, bool]:
    """What the last start had open, as far as that still is: folder, options, whether the plan chooses the level.
    opened: a stored document, which may hold anything. A level that was asked for goes before, and a preset belongs to
    the level that it was chosen for."""
    try:
        folder, context = Path(opened["folder"]), opened["context"]
        level = opened["level"] if plan_level and opened["level"] else options.level
        policies = PRESETS.get(str(opened.get("preset")), "") if level == opened["level"] else ""
        if (folder / "config.json").is_file():
            return (folder, replace(options, level=level, context=context, policies=policies),
                    plan_level and not opened["level"])
    except (KeyError, TypeError, ValueError, OSError, UserError):
        pass
    return demo_model(), options, plan_level


def routes(parts: Parts) -> APIRouter:
    """All below /api."""
    asked = api.routes(parts.chats, parts.drafts, parts.jobs, parts.models, parts.shelf, parts.stream.changed)
    switcher.routes(asked, parts.shelf, parts.models)
    attachments.routes(asked, parts.chats)
    preferences.routes(asked, parts)
    return asked


def build(parts: Parts, port: int, entered: Callable[[str], None], lan: SignIn | None = None) -> Guard:
    """The ASGI application for one port; `entered` is told the next start link. lan: lets other devices in."""
    with _without_the_way_outside():
        import gradio as gr

        from app.page import HEAD, build_page, theme

    app = FastAPI(lifespan=_lifespan(parts), docs_url=None, redoc_url=None, openapi_url=None)
    api.speak_in_sentences(app)
    app.include_router(routes(parts))
    app.mount("/ui", StaticFiles(directory=UI))

    @app.get("/events")
    async def events():
        return StreamingResponse(parts.stream.events(), media_type="text/event-stream",
                                 headers={"cache-control": "no-store"})

    @app.get("/stats")
    def stats():
        return parts.panel.now()

    gr.mount_gradio_app(app, build_page(parts), path="/", server_name="127.0.0.1", server_port=port, ssr_mode=False,
                        run_history=False, enable_monitoring=False, footer_links=[], show_error=False,
                        max_file_size="16mb", theme=theme(), head=HEAD, pwa=False)
    asked_by_programs = programs.build(Served(parts.models, parts.shelf), parts.jobs.line, parts.keys)
    return Guard(app, port, entered, asked_by_programs, lan)


@contextmanager
def _without_the_way_outside() -> Iterator[None]:
    """What is imported here makes clients for addresses elsewhere, which are never used; of a proxy or a file of
    certificates that cannot be they would fail, and the page needs neither."""
    kept = {name: os.environ.pop(name) for name in list(os.environ)
            if name.lower() in ("all_proxy", "http_proxy", "https_proxy", "ssl_cert_file", "ssl_cert_dir")}
    try:
        yield
    finally:
        os.environ.update(kept)


class _Server(uvicorn.Server):
    """Announces the page once the port answers, and ends the open streams when asked to stop."""

    def __init__(self, config: uvicorn.Config, parts: Parts, announce: Callable[[], None]):
        super().__init__(config)
        self._parts, self._announce = parts, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig, frame) -> None:
        self._parts.stream.close()
        super().handle_exit(sig, frame)


def serve(parts: Parts, listener: socket.socket, announce: Callable[[str], None], entered: Callable[[str], None],
          lan: SignIn | None = None):
    """Serve on the bound socket until the user ends the program. announce, entered: told the first and next links."""
    guarded = build(parts, listener.getsockname()[1], entered, lan)
    config = uvicorn.Config(guarded, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=2,
                            http=Connection, h11_max_incomplete_event_size=HEADER_BYTES)
    _Server(config, parts, lambda: announce(guarded.link)).run(sockets=[listener])


async def _open_when_seen(parts: Parts) -> None:
    """Importing torch takes seconds of the interpreter's time: the page is served first, if one is coming at all."""
    with suppress(TimeoutError):
        await asyncio.wait_for(parts.stream.watched.wait(), PAGE_FIRST_SECONDS)
    parts.models.open()


def _lifespan(parts: Parts):
    @asynccontextmanager
    async def lifespan(app: FastAPI):
        parts.jobs.start()
        tasks = [asyncio.create_task(parts.stream.run()), asyncio.create_task(_open_when_seen(parts))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(parts.close)

    return lifespan
