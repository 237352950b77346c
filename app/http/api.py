"""What the page's scripts ask for: plain JSON routes over chats, jobs and models. The guard stands in front of them."""
from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import Annotated, BinaryIO

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from app import incoming
from app.chat.answers import Jobs
from app.chat.chat_settings import ChatSettings, Drafts, Presets, checked, remote_of
from app.chat.chats import Chats, Conversation, Message, TakenIn
from app.chat.context_window import to_prompt
from app.chat.import_export import export_json, export_markdown, import_file
from app.http.download import download
from app.http.models_api import model_routes
from app.incoming import BODY_BYTES, FILE_BYTES, Id, Name, what_is_wrong
from app.library.model_library import Shelf
from app.library.open_model import Models
from app.markdown import render
from app.remote.server import Servers
from app.strings import TEXT
from engine import MachineError, UserError, trouble

IMPORT = "/import"
IMPORT_SECONDS = 0.3  # between two looks at how far it is
WINDOW = 40  # messages a page shows at first: its cost follows their number


class _Json(JSONResponse):
    """In ASCII: a name on this computer's disk may hold what UTF-8 cannot say."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class _Sized(APIRoute):
    """Refuses a body that is too large before any of it is read. (FastAPI's own limit answers without our sentence.)"""

    def get_route_handler(self):
        handle = super().get_route_handler()
        most = FILE_BYTES if self.path == f"/api{IMPORT}" else BODY_BYTES

        async def sized(request: Request) -> Response:
            if int(request.headers.get("content-length", 0)) > most:
                raise HTTPException(413)
            return await handle(request)
        return sized


def state(chats: Chats, jobs: Jobs, models: Models, shelf: Shelf) -> dict:
    """Everything that is not text of a conversation: small, sent whenever it changes."""
    live, snapshot = jobs.live, models.snapshot()
    return {"model": {"state": models.state, "step": models.step, "name": models.folder.name,
                      "title": models.title,
                      "opening": models.opening(), "opened": models.opened(),
                      "near_bytes": snapshot.get("near_bytes"), "refused": models.refused} | _shown_info(models),
            "level": models.level,
            "live": live and {"message": live.message_id, "conversation": live.conversation_id, "phase": live.phase},
            "waiting": [{name: item[name] for name in ("id", "conversation_id", "text")} for item in chats.waiting()],
            "conversations": [_listed(conversation) for conversation in chats.conversations()],
            "importing": chats.taking_in, "works": shelf.works.shown(), "finished": shelf.works.finished,
            "graphics": models.around.graphics(snapshot.get("device")),
            "server": server.place.host if (server := Servers(chats).current()) else "",
            "welcome": not chats.preference("welcomed", False), "disk_trouble": jobs.disk_trouble or chats.mended}


def routes(chats: Chats, drafts: Drafts, jobs: Jobs, models: Models, shelf: Shelf, changed) -> APIRouter:
    """All routes below /api but those of the settings page. `changed` tells every open page to look again."""
    router = APIRouter(prefix="/api", route_class=_Sized, default_response_class=_Json)

    @router.get("/strings")
    def strings():
        return TEXT

    @router.get("/state")
    def present_state():
        return state(chats, jobs, models, shelf)

    _conversation_routes(router, chats, drafts, jobs, models, changed)
    _settings_routes(router, drafts, Presets(chats), Servers(chats), changed)
    _message_routes(router, chats, jobs, changed)
    _file_routes(router, chats, jobs, models, changed)
    model_routes(router, shelf)

    @router.post("/welcomed")
    def welcomed(wish: incoming.Welcomed):
        chats.set_preference("welcomed", wish.done)
        changed()
        return {}

    return router


def _conversation_routes(router: APIRouter, chats: Chats, drafts: Drafts, jobs: Jobs, models: Models, changed) -> None:
    @router.post("/conversations")
    def create(wish: incoming.Begin):
        conversation = drafts.begin(wish.draft)
        changed()
        return _listed(conversation)

    @router.get("/conversations/{conversation_id}")
    def read(conversation_id: Id, limit: int = WINDOW, reach: Annotated[int, Query(alias="with")] = 0):
        """The newest `limit` messages, and more where only that reaches the one called `with`."""
        jobs.picks.opened(conversation_id)
        return _document(chats, jobs, conversation_id, max(1, min(limit, 10_000)), reach)

    @router.get("/conversations/{conversation_id}/context")
    def context(conversation_id: Id):
        """How full the model's context is: {"used": tokens, None where that is unknown, "total"}."""
        wishes = ChatSettings.of(chats.conversation(conversation_id).settings)
        if wishes.remote:  # only that server can count
            return {"used": None, "total": 0}
        path = chats.path(conversation_id)
        prompt = to_prompt(path, wishes.system, wishes.keep_thinking)
        return {"used": models.used(prompt, wishes.template()) if path else 0, "total": models.info().get("context", 0)}

    @router.get("/conversations/{conversation_id}/picks")
    def picks(conversation_id: Id):
        """Of each layer, for each expert, the share of the answers' tokens that picked it: {"shares"}, no rows where
        the open model has answered nothing."""
        chats.conversation(conversation_id)
        found = jobs.picks.of(conversation_id)
        return {"shares": found.shares() if found else []}

    @router.patch("/conversations/{conversation_id}")
    def change(conversation_id: Id, wish: incoming.Change):
        chats.conversation(conversation_id)
        if wish.title is not None:
            chats.rename(conversation_id, wish.title)
        if wish.pinned is not None:
            chats.pin(conversation_id, wish.pinned)
        changed()
        return _listed(chats.conversation(conversation_id))

    @router.delete("/conversations/{conversation_id}")
    def delete(conversation_id: Id):
        if jobs.live and jobs.live.conversation_id == conversation_id:
            jobs.stop()
        chats.delete(conversation_id)
        changed()
        return {}

    @router.post("/conversations/{conversation_id}/restore")
    def restore(conversation_id: Id):
        chats.restore(conversation_id)
        changed()
        return {}

    @router.get("/search")
    def search(q: Annotated[str, Query(max_length=1000)]):
        return chats.search(q)


Whose = Annotated[Name, Query()]  # the number of a conversation, or the name of a draft


def _settings_routes(router: APIRouter, drafts: Drafts, presets: Presets, servers: Servers, changed) -> None:
    def shown(whose: str, settings: dict) -> dict:
        server = servers.current()
        return {"whose": whose, "settings": settings, "preset": presets.name_of(settings),
                "presets": presets.choices(), "remotes": list(server.models) if server else []}

    @router.get("/settings")
    def read_settings(whose: Whose):
        return shown(whose, drafts.settings(whose))

    @router.patch("/settings")
    def change_settings(whose: Whose, wish: incoming.Settings):
        def change(stored: dict) -> dict:
            settings = presets.chosen(wish.preset, stored) if wish.preset else stored
            return checked(settings | wish.changes)
        settings = drafts.change(whose, change)
        if "remote" in wish.changes:
            changed()
        return shown(whose, settings)

    @router.post("/settings/preset")
    def keep_preset(whose: Whose, wish: incoming.Preset):
        settings = drafts.settings(whose)
        presets.keep(wish.name, settings)
        return shown(whose, settings)

    @router.delete("/settings/preset")
    def forget_preset(whose: Whose, wish: incoming.Preset):
        presets.forget(wish.name)
        return shown(whose, drafts.settings(whose))


def _message_routes(router: APIRouter, chats: Chats, jobs: Jobs, changed) -> None:
    @router.post("/conversations/{conversation_id}/send")
    def send(conversation_id: Id, wish: incoming.Question):
        return jobs.send(conversation_id, wish.text, [file.model_dump() for file in wish.attachments])

    @router.get("/messages/{message_id}")
    def read_message(message_id: Id):
        message = chats.message(message_id)
        return {"text": message.text, "thinking": message.thinking}

    @router.post("/messages/{message_id}/edit")
    def edit(message_id: Id, wish: incoming.Written):
        return jobs.edit(message_id, wish.text)

    @router.post("/messages/{message_id}/regenerate")
    def regenerate(message_id: Id):
        return jobs.regenerate(message_id)

    @router.post("/messages/{message_id}/continue")
    def resume(message_id: Id):
        return jobs.resume(message_id)

    @router.post("/messages/{message_id}/show")
    def show(message_id: Id):
        chats.show(message_id)
        changed()
        return {}

    @router.post("/messages/{message_id}/branch")
    def branch(message_id: Id):
        conversation = chats.branch(message_id)
        changed()
        return _listed(conversation)

    @router.post("/stop")
    def stop():
        jobs.stop()
        return {}

    @router.delete("/waiting/{waiting_id}")
    def unwait(waiting_id: Id):
        taken = chats.unwait(waiting_id)
        changed()
        return {"text": taken["text"] if taken else ""}


def _file_routes(router: APIRouter, chats: Chats, jobs: Jobs, models: Models, changed) -> None:
    @router.get("/export")
    def export_all():
        return download(export_json(chats, [c.id for c in chats.conversations()]), "floe-chat.json")

    @router.get("/conversations/{conversation_id}/export.{kind}")
    def export(conversation_id: Id, kind: str):
        name = _file_name(chats.conversation(conversation_id).title)
        if kind == "md":
            return download(export_markdown(chats, conversation_id), f"{name}.md")
        return download(export_json(chats, [conversation_id]), f"{name}.json")

    @router.post(IMPORT)
    async def take_in(request: Request):
        """A file of any size: it goes to the disk as it comes, and from there conversation by conversation."""
        try:
            with TemporaryFile(dir=chats.file.parent) as file:
                async for chunk in request.stream():
                    file.write(chunk)
                taken = await run_in_threadpool(_import, chats, file, changed)
        except OSError as error:
            raise trouble(error, chats.file.parent) from error
        return {"made": [_listed(each) for each in taken.made], "grown": [_listed(each) for each in taken.grown],
                "known": taken.known}

    @router.post("/count")
    def count(wish: incoming.Written):
        return {"tokens": models.used([{"role": "user", "content": wish.text}], {})}

    @router.post("/draft")
    def draft(wish: incoming.Written):
        """The same of what is being written; what it will need may come near meanwhile. Nothing of it is kept."""
        jobs.habits.written(wish.text)
        return count(wish)


def _import(chats: Chats, file: BinaryIO, changed: Callable[[], None]) -> TakenIn:
    told = 0.0

    def heard(share: float) -> None:
        nonlocal told
        chats.taking_in = round(share, 3)
        if time.monotonic() - told > IMPORT_SECONDS:
            told = time.monotonic()
            changed()
    try:
        return import_file(chats, file, heard)
    finally:
        chats.taking_in = None
        changed()


async def user_error(request: Request, error: UserError) -> Response:
    """A sentence for the page instead of a stack trace."""
    return _Json({"error": str(error)}, status_code=400)


async def machine_error(request: Request, error: MachineError) -> Response:
    return _Json({"error": str(error)}, 503)


async def database_error(request: Request, error: sqlite3.Error) -> Response:
    full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    said = TEXT["not_saved"] if full else TEXT["database_failed"]
    return _Json({"error": said.format(error=error)}, 507)


async def wrong_request(request: Request, error: RequestValidationError) -> Response:
    return _Json({"error": TEXT["request_wrong"].format(what=what_is_wrong(error.errors()[0]))}, 422)


async def refused_request(request: Request, error: HTTPException) -> Response:
    """What FastAPI refuses before a route is asked."""
    said = TEXT["request_large"] if error.status_code == 413 else TEXT["request_unread"]
    return _Json({"error": said}, error.status_code)


def speak_in_sentences(app: FastAPI) -> None:
    """Whatever is wrong with a request, its answer says what to do."""
    for kind, answer in ((UserError, user_error), (MachineError, machine_error), (sqlite3.Error, database_error),
                         (HTTPException, refused_request), (RequestValidationError, wrong_request)):
        app.add_exception_handler(kind, answer)


def _shown_info(models: Models) -> dict:
    info = models.info()
    names = ("name", "levels", "is_demo", "layers", "experts", "context", "sampling", "wishes")
    return {name: info[name] for name in names if name in info}


def _listed(conversation: Conversation) -> dict:
    return {"id": conversation.id, "title": conversation.title, "pinned": conversation.pinned,
            "updated_at": conversation.updated_at,
            "remote": remote_of(conversation.settings)}


def _document(chats: Chats, jobs: Jobs, conversation_id: Id, limit: int, reach: int) -> dict:
    conversation = chats.conversation(conversation_id)
    path = chats.path(conversation_id)
    limit = max(limit, *(len(path) - i for i, message in enumerate(path) if message.id == reach), 1)
    versions = chats.versions(conversation_id)
    shown = [_shown(message, versions[message.id], jobs) for message in path[-limit:]]
    return {"conversation": _listed(conversation), "messages": shown, "n_messages": len(path)}


def _shown(message: Message, versions: list[int], jobs: Jobs) -> dict:
    live = jobs.live
    text, thinking, stats = message.text, message.thinking, message.stats
    if live and live.message_id == message.id:
        text, thinking, stats = live.text, live.thinking, live.stats
    return {"id": message.id, "role": message.role, "html": render(text), "thinking_html": render(thinking),
            "status": "running" if live and live.message_id == message.id else message.status, "stats": stats,
            "versions": versions, "attachments": [{"name": a["name"], "chars": len(a["text"])}
                                                  for a in message.attachments]}


def _file_name(title: str) -> str:
    return re.sub(r"[^\w\- ]+", "", title).strip()[:60] or "conversation"
