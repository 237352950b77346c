"""What is wrong with a request, in the shape that OpenAI's clients read, with no path of this computer in it."""
from __future__ import annotations

import logging
import re
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from app.incoming import what_is_wrong
from engine import MachineError, UserError

RETRY_SECONDS = "5"
_log = logging.getLogger(__name__)
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
          404: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_PATH = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?(?:~|[/\\])[^\s'\"(),;]*[/\\]([^\s'\"(),;/\\]*)")


class ApiError(Exception):
    """Refused: an HTTP status and one sentence. code: a name that programs know; param: what of the request it is."""

    def __init__(self, status: int, sentence: str, code: str | None = None, param: str | None = None):
        super().__init__(sentence)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict:
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": without_paths(str(self)), "type": kind, "param": self.param, "code": self.code}}

    def reply(self) -> JSONResponse:
        headers = {"retry-after": RETRY_SECONDS} if self.status in (429, 503) else {}
        return JSONResponse(self.body(), self.status, headers=headers | {"cache-control": "no-store"})


def without_paths(text: str) -> str:
    """Folders of this computer are nobody's business who asks from elsewhere; a path's last name stays."""
    return _PATH.sub(lambda found: found[1] or "…", text.replace(str(Path.home()), "~"))


def of(error: BaseException) -> ApiError:
    """Whatever an answer failed of."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, MachineError):
        return ApiError(503, str(error))
    _log.error("A request of a program failed", exc_info=error)
    return ApiError(500, "The answer failed for an unknown reason; try again, and look into the program's log.")


def wrong_request(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    return ApiError(422, f"This cannot be done: {what_is_wrong(first)}.", param=where or None)


def refused_request(error: HTTPException) -> ApiError:
    """What is refused before a route is asked."""
    said = {404: "There is nothing at this address; the base URL ends in /v1.",
            405: "This address does not know this method."}
    return ApiError(error.status_code, said.get(error.status_code, "The request could not be read."))


def speak_as_openai(app: FastAPI) -> None:
    """Whatever is wrong with a request, a client of OpenAI can read it."""
    async def handled(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            return wrong_request(error).reply()
        return (refused_request(error) if isinstance(error, HTTPException) else of(error)).reply()

    for kind in (ApiError, UserError, MachineError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, handled)
