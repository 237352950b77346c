"""From the body of a program's request to what the engine is asked, or a sentence that says what cannot be done."""
from __future__ import annotations

import json
from dataclasses import dataclass, field

from app.openai_api.bodies import ChatBody, Chosen, Drawing, Message, TextBody, Tool
from app.openai_api.errors import ApiError
from engine import Request, Sampling, checked_schema

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")  # the engine's own, of a template's variables
_HELD = ("#/$defs/", "#/definitions/")
_NOT_SERVED = "{what} is not served here; leave it out."


@dataclass(frozen=True)
class Order:
    """One answer that is wanted. prompt: a conversation, or a text to go on with. forced: the answer is a call of a
    tool in JSON, whatever the family's own format. usage: the stream tells it at its end."""

    model: str
    prompt: list[dict] | str
    sampling: Sampling
    request: Request
    wishes: dict = field(default_factory=dict)
    forced: bool = False
    stream: bool = False
    usage: bool = False

    @property
    def characters(self) -> int:
        """Of the prompt, as far as it is text."""
        return len(self.prompt) if isinstance(self.prompt, str) else sum(
            len(message["content"]) for message in self.prompt if isinstance(message.get("content"), str))


def of_chat(body: ChatBody, owner: str) -> Order:
    """owner: the id of the key. UserError, ApiError for what cannot be."""
    _refuse(body, {"functions": body.functions, "modalities": set(body.modalities or ()) - {"text"}})
    tools, forced = _offered(body)
    wishes = _wishes(body) | ({"tools": [_tool(tool) for tool in tools]} if tools else {})
    schema = _call_schema(tools) if forced else _schema(body)
    told = (body.top_logprobs or 0) if body.logprobs else None
    return Order(body.model, [_message(message) for message in body.messages],
                 _sampling(body, body.max_completion_tokens or body.max_tokens),
                 Request(checked_schema(schema) if schema is not None else "", told, owner), wishes, forced,
                 bool(body.stream), _usage(body))


def of_text(body: TextBody, owner: str) -> Order:
    _refuse(body, {"best_of": body.best_of not in (None, 1), "echo": body.echo, "suffix": body.suffix})
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise ApiError(400, "One prompt at a time can be gone on with, and it has to be text.", param="prompt")
    return Order(body.model, texts[0], _sampling(body, body.max_tokens or 16), Request("", body.logprobs, owner),
                 stream=bool(body.stream), usage=_usage(body))


def _refuse(body: Drawing, others: dict) -> None:
    if body.n not in (None, 1):
        raise ApiError(400, "One answer at a time is written here; leave n out, or ask again for another.", param="n")
    wanted = {"frequency_penalty": body.frequency_penalty, "presence_penalty": body.presence_penalty,
              "logit_bias": body.logit_bias} | others
    for name, value in wanted.items():
        if value:
            raise ApiError(400, _NOT_SERVED.format(what=name), "unsupported_parameter", name)


def _usage(body: Drawing) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _sampling(body: Drawing, max_tokens: int | None) -> Sampling:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    seed = None if body.seed is None else body.seed % (1 << 63)
    return Sampling(body.temperature, body.top_k, body.top_p, body.min_p, body.repetition_penalty, seed, max_tokens,
                    stop)


def _wishes(body: ChatBody) -> dict:
    given = body.chat_template_kwargs or {}
    if own := [name for name in given if name in _RESERVED]:
        raise ApiError(400, _NOT_SERVED.format(what=f"{own[0]} in chat_template_kwargs"), param="chat_template_kwargs")
    effort = body.reasoning_effort
    thinking = {"enable_thinking": effort != "none", "reasoning_effort": effort} if effort else {}
    return thinking | given


def _message(message: Message) -> dict:
    told = {"role": "system" if message.role == "developer" else message.role, "content": _text(message)}
    told |= {name: value for name in ("name", "reasoning_content", "tool_call_id")
             if (value := getattr(message, name)) is not None}
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": "function",
             "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)}}
            for call in message.tool_calls]
    return told


def _text(message: Message) -> str:
    if isinstance(message.content, list):
        if others := [part.type for part in message.content if part.type != "text"]:
            raise ApiError(400, f'The models of this program read text alone; send no part of the type "{others[0]}".',
                           param="messages")
        if any(part.text is None for part in message.content):
            raise ApiError(400, "A part of the type text needs a text.", param="messages")
        return "\n".join(part.text for part in message.content)
    return message.content or ""


def _arguments(text: str) -> dict:
    """As templates want them."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, "The arguments of a tool call have to be a JSON object, as text.", param="messages")
    return found


def _offered(body: ChatBody) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one has to be."""
    tools, choice = body.tools or [], body.tool_choice or "auto"
    if isinstance(choice, Chosen):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    if choice != "auto" and choice != "none" and not tools:
        raise ApiError(400, "tool_choice asks for a tool that is not among tools.", param="tool_choice")
    return ([], False) if choice == "none" else (tools, choice != "auto")


def _tool(tool: Tool) -> dict:
    function = tool.function.model_dump(exclude_none=True)
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "function", "function": {"description": "", "parameters": nothing} | function}


def _schema(body: ChatBody) -> dict | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    return wanted.json_schema.schema_ if wanted.type == "json_schema" else {"type": "object"}


def _call_schema(tools: list[Tool]) -> dict:
    """{"name": one of the tools, "arguments": by its own schema}."""
    kinds, shared = [], {}
    for i, tool in enumerate(tools):
        arguments = _moved(dict(_tool(tool)["function"]["parameters"]), f"#/$defs/{i}.")
        for name in ("$defs", "definitions"):
            held = arguments.pop(name, {})
            shared |= {f"{i}.{key}": value for key, value in held.items()} if isinstance(held, dict) else {}
        kinds.append({"type": "object", "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
                      "required": ["name", "arguments"], "additionalProperties": False})
    return {"anyOf": kinds, "$defs": shared}


def _moved(schema: object, to: str) -> object:
    """A schema inside another one: what it refers to has moved."""
    if isinstance(schema, dict):
        return {key: to + value.split("/", 2)[2] if key == "$ref" and str(value).startswith(_HELD)
                else _moved(value, to) for key, value in schema.items()}
    return [_moved(item, to) for item in schema] if isinstance(schema, list) else schema
