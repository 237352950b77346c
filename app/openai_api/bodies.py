"""The bodies of programs' requests: checked before any work. What is not known here is let pass, as clients send much
that changes nothing; what is known and cannot be done is refused in a sentence (app/openai_api/orders.py)."""
from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.openai_api.door import BODY_BYTES
from app.openai_api.errors import ApiError

MOST_DEEP = 60        # of objects and lists in each other
MOST_MESSAGES = 10_000
MOST_TOKENS = 1 << 20  # of an answer; the context ends it earlier

Words = Annotated[str, Field(max_length=4_000_000)]
Called = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Part(Body):
    type: Annotated[str, Field(max_length=40)]
    text: Words | None = None


class Function(Body):
    name: Called
    arguments: Words = "{}"


class Call(Body):
    id: Annotated[str, Field(max_length=200)] = ""
    type: Literal["function"] = "function"
    function: Function


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Words | Annotated[list[Part], Field(max_length=1000)] | None = None
    name: Annotated[str, Field(max_length=200)] | None = None
    reasoning_content: Words | None = None
    tool_calls: Annotated[list[Call], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(max_length=200)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role} needs a content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the role assistant can have tool_calls")
        return self


class Described(Body):
    name: Called
    description: Words | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Described


class Named(Body):
    name: Called


class Chosen(Body):
    type: Literal["function"]
    function: Named


class JsonSchema(Body):
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class StreamOptions(Body):
    include_usage: bool | None = None


class Drawing(Body):
    """What both kinds of completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=250)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: (Annotated[str, Field(min_length=1, max_length=200)]
           | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=16)] | None) = None
    n: Annotated[int, Field(ge=1, le=1000)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatBody(Drawing):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen | None = None
    reasoning_effort: Annotated[str, Field(pattern=r"^[a-z]{1,20}$")] | None = None
    chat_template_kwargs: Annotated[dict[str, str | bool | int | float | None], Field(max_length=20)] | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None


class TextBody(Drawing):
    prompt: Words | list[Any]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1000)] | None = None
    echo: bool | None = None
    suffix: Words | None = None


class Careful(APIRoute):
    """Reads a body no further than it may go, and refuses what cannot be text or a number before anything is made."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def careful(request: Request) -> Response:
            request._body = await _whole(request)
            if request._body:
                request._json = check(request._body)  # FastAPI takes it from there: a body is parsed once
            return await handle(request)
        return careful


async def _whole(request: Request) -> bytes:
    """A body may come in pieces and not say how long it is."""
    read = bytearray()
    async for piece in request.stream():
        read += piece
        if len(read) > BODY_BYTES:
            raise ApiError(413, f"This request is larger than {BODY_BYTES >> 20} MB; send less at once.")
    return bytes(read)


def check(body: bytes) -> Any:
    """The document. ApiError unless it is JSON whose numbers are finite and whose texts are text."""
    try:
        document = json.loads(body, parse_constant=_no_number)
        _sound(document, 0)
        return document
    except (ValueError, RecursionError) as error:  # json's own errors and those of digits and encodings are ValueErrors
        raise ApiError(400, "The body is no JSON that can be used: its numbers have to be finite, its texts valid "
                            "Unicode, and nothing may lie too deep.") from error


def _no_number(name: str) -> None:
    raise ValueError(name)


def _sound(value: object, depth: int) -> None:
    if depth > MOST_DEEP:
        raise ValueError("too deep")
    if isinstance(value, str):
        value.encode()  # a lone surrogate is no text
    elif isinstance(value, float) and not math.isfinite(value):  # 1e999
        raise ValueError("not finite")
    elif isinstance(value, dict):
        for name, item in value.items():
            name.encode()
            _sound(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _sound(item, depth + 1)
