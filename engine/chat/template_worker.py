"""Render one chat template in a process of its own: a JSON line in, a JSON line out, until standard input closes.

A chat template is a downloaded program. transformers' sandbox keeps it from touching the machine but not from looping
or from filling memory, and neither can be cut off inside a thread; a process can be killed (engine/chat/template.py
does). Only jinja2 and the standard library are loaded, so it starts in a tenth of a second and stays small. The
environment is the one of transformers' `apply_chat_template`; a test compares the two. Knows no tokenizer and no model.
"""
import json
import sys
from datetime import datetime
from functools import partial

import jinja2
import jinja2.utils
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here only its body counts."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Dict:
    """`dict(...)` without the attributes of the real type."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """`namespace(...)` without names that reach into the interpreter."""

    def __init__(*args, **kwargs):  # like jinja's own, so that `namespace(self=...)` works
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _public(name)
        super().__setitem__(name, value)


def _public(name) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"names with an underscore in front are not allowed: {name}")


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Not jinja's own, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message):
    raise jinja2.TemplateError(message)


def environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=refuse, dict=Dict(), namespace=Namespace,
                       strftime_now=lambda form: datetime.now().strftime(form))
    return env


def render(template: jinja2.Template, variables: dict, limit: int) -> dict:
    """{"text"}, {"refused": why} when the template itself objects, or {"broken": why}. limit: characters."""
    pieces, size = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            return {"broken": f"it writes more than {limit:,} characters"}
    return {"text": "".join(pieces)}


def compile_into(compiled: list, source: str) -> dict:
    """-> {"asks": the variables that the template looks up}."""
    env = environment()
    compiled[:] = [env.from_string(source)]
    return {"asks": sorted(meta.find_undeclared_variables(env.parse(source)))}


def guarded(work) -> dict:
    try:
        return work()
    except jinja2.TemplateSyntaxError as error:
        return {"broken": f"line {error.lineno}: {error.message}"}
    except jinja2.TemplateRuntimeError as error:  # undefined names, security: the template's fault, not the messages'
        return {"broken": str(error)}
    except jinja2.TemplateError as error:
        return {"refused": str(error)}
    except (MemoryError, RecursionError):
        return {"broken": "it needs too much memory"}
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {error}"}


def main() -> None:
    sys.stdin.reconfigure(encoding="utf-8")
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    compiled: list[jinja2.Template] = []
    for line in sys.stdin:
        request = json.loads(line)
        if "template" in request:
            reply = guarded(partial(compile_into, compiled, request["template"]))
        else:
            reply = guarded(partial(render, compiled[0], request["variables"], request["limit"]))
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
