"""The addresses that OpenAI's clients ask, and two of our own: whether the program is well, and what it is doing."""
from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from app.chat.line import Line
from app.http.leaving import until_gone
from app.openai_api import errors
from app.openai_api.asking import PATIENCE_SECONDS, Asking, Requests
from app.openai_api.bodies import Careful, ChatBody, TextBody
from app.openai_api.door import HEALTH, KEY, Door
from app.openai_api.errors import ApiError
from app.openai_api.keys import Keys
from app.openai_api.orders import Order, of_chat, of_text
from app.openai_api.replies import ChatReply, TextReply
from app.openai_api.served import Served

OWNER = "floe-chat"
READ_TIMEOUT = "x-stainless-read-timeout"  # seconds after which OpenAI's client gives up
STREAM = {"cache-control": "no-store", "x-accel-buffering": "no"}
Reply = ChatReply | TextReply


def build(served: Served, line: Line, keys: Keys) -> Door:
    """The whole of it, as one ASGI application."""
    app = FastAPI(title="Floe Chat", version="1", openapi_url="/v1/openapi.json", docs_url=None, redoc_url=None)
    errors.speak_as_openai(app)
    requests = Requests()
    keys.on_revoked = requests.stop
    router = APIRouter(route_class=Careful)
    _model_routes(router, served)
    _state_routes(router, served, line)
    _completion_routes(router, served, line, requests)
    app.include_router(router)
    return Door(app, keys)


def _model_routes(router: APIRouter, served: Served) -> None:
    started = int(time.time())

    def shown(name: str) -> dict:
        return {"id": name, "object": "model", "created": started, "owned_by": OWNER}

    @router.get("/v1/models")
    def models():
        """Every model on this computer; one that is not open is opened when it is asked."""
        return {"object": "list", "data": [shown(name) for name in served.names()]}

    @router.get("/v1/models/{name}")
    def model(name: str):
        served.check(name)
        return shown(name)


def _state_routes(router: APIRouter, served: Served, line: Line) -> None:
    @router.get(HEALTH)
    def health():
        """Answers without a key, and tells nothing else."""
        if served.models.state != "ready":
            raise ApiError(503, "No model is open yet.", "loading")
        return {"status": "ok"}

    @router.get("/v1/status")
    def status():
        """Model, level, speed, what was near."""
        now = served.models.snapshot()
        counters = now.get("counters", {})
        return {"state": now["state"], "model": served.names()[0], "level": now.get("level"),
                "phase": now.get("phase"), "tokens_per_second": now.get("tokens_per_second"),
                "tokens": now.get("n_tokens_total"), "waiting": len(line),
                "context": {"tokens": now.get("context"), "used": now.get("context_used")},
                "cache": {"hit_rate": counters.get("hit_rate"), "near_bytes": now.get("near_bytes"),
                          "near_used_bytes": now.get("near_used_bytes")}}


def _completion_routes(router: APIRouter, served: Served, line: Line, requests: Requests) -> None:
    async def answered(request: Request, order: Order, reply_of: Callable[..., Reply]) -> Response:
        asking = requests.begin(served, line, order, _patience(request))
        gone = asyncio.create_task(_leave_with(request, asking))
        try:
            reply = reply_of(order, await asking.begun())
            if not order.stream:
                async for event in asking.events():
                    reply.told.take(event)
                return JSONResponse(reply.whole(), headers={"cache-control": "no-store"})
        except BaseException:
            asking.stop.set()
            raise
        finally:
            if not order.stream:
                gone.cancel()
        return StreamingResponse(_stream(asking, reply, gone), media_type="text/event-stream", headers=STREAM)

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request):
        order = await run_in_threadpool(of_chat, body, request.scope[KEY].id)
        return await answered(request, order, ChatReply)

    @router.post("/v1/completions")
    async def completions(body: TextBody, request: Request):
        return await answered(request, of_text(body, request.scope[KEY].id), TextReply)


def _patience(request: Request) -> float:
    """No longer than its client will wait."""
    with suppress(ValueError):
        wished = float(request.headers.get(READ_TIMEOUT, ""))
        return min(max(wished, 0.0), PATIENCE_SECONDS) if wished == wished else PATIENCE_SECONDS
    return PATIENCE_SECONDS


async def _leave_with(request: Request, asking: Asking) -> None:
    await until_gone(request)
    asking.leave()


async def _stream(asking: Asking, reply: Reply, gone: asyncio.Task) -> AsyncIterator[str]:
    """Server-sent events; a comment while the prompt is read, so that nobody thinks the line is dead."""
    try:
        for chunk in reply.first():
            yield _event(chunk)
        async for event in asking.events():
            if event.kind == "prefill":
                yield ": reading\n\n"
            for chunk in reply.chunks(event):
                yield _event(chunk)
        if reply.told.order.usage:
            yield _event(reply.usage())
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    finally:
        asking.stop.set()
        gone.cancel()


def _event(document: dict) -> str:
    return f"data: {json.dumps(document, allow_nan=False, separators=(',', ':'))}\n\n"
