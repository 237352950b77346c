"""`python -m engine chat FOLDER`: talk to a model in the terminal, or ask it one question with --prompt."""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from engine.cli import report
from engine.core import LEVELS, Event, MachineError, Options, Sampling, UserError
from engine.paths import typed
from engine.units import parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=typed, metavar="FOLDER", help="a compressed model or an uncompressed checkpoint")
    parser.add_argument("--level", choices=LEVELS, help="default: what the plan chooses for this machine")
    parser.add_argument("--near-bytes", type=parse_bytes, metavar="SIZE", help="near memory (default: planned)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens (default: what the model can)")
    parser.add_argument("--chunk", type=int, metavar="N", help="tokens that are read at once")
    parser.add_argument("--policies", default="", metavar="SPEC",
                        help="what to fetch ahead, keep and route, as of `simulate`; route and fidelity change answers")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer here; repeatable")
    for name in ("temperature", "top-p", "min-p", "repetition-penalty"):
        parser.add_argument(f"--{name}", type=float, metavar="X", help="default: the model's recommendation")
    parser.add_argument("--top-k", type=int, metavar="N", help="default: the model's recommendation")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same answer")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")


def run(args: argparse.Namespace) -> dict | None:
    """The last answer as a document; UserError or MachineError when --prompt could not be answered."""
    if args.json and args.prompt is None:
        raise UserError("--json prints one answer; give the question with --prompt TEXT.")
    options = Options(level=args.level, near_bytes=args.near_bytes, context=args.context, chunk=args.chunk,
                      device=args.device, policies=args.policies)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
                        repetition_penalty=args.repetition_penalty, seed=args.seed, max_tokens=args.max_tokens,
                        stop=tuple(args.stop))
    from engine.chat.engine import Engine  # loads torch; wrong arguments need not wait for it

    messages = [{"role": "system", "content": args.system}] if args.system else []
    with Engine.open(args.folder, options, report) as engine:
        if args.prompt is not None:
            return ask(engine, [*messages, {"role": "user", "content": args.prompt}], sampling, not args.json)
        return _converse(engine, messages, sampling)


def ask(engine, messages: list[dict], sampling: Sampling, aloud: bool = True) -> dict:
    """One answer, streamed to standard output if `aloud`, as the document of --json. Ctrl+C ends it early."""
    answer = engine.chat(messages, sampling)
    texts = {"thinking": "", "answer": ""}
    end = None
    while end is None:
        try:
            for event in answer:
                if event.kind == "end":
                    end = event
                elif event.kind in texts:
                    texts[event.kind] += event.text
                    _say(event, aloud)
        except KeyboardInterrupt:
            engine.stop()
    if aloud:
        print()
    if end.reason == "error":
        raise answer.error if isinstance(answer.error, (UserError, MachineError)) else MachineError(end.text)
    far_bytes = end.counters.far_bytes / max(end.n_tokens, 1)
    report(f"[{end.tokens_per_second:.1f} tokens/s, {end.counters.hit_rate:.0%} near, {far_bytes / 1e6:.2f} MB/token, "
           f"{end.reason}]")
    return {**texts, "n_tokens": end.n_tokens, "tokens_per_second": end.tokens_per_second,
            "hit_rate": end.counters.hit_rate, "far_bytes_per_token": far_bytes, "reason": end.reason}


HELP = """/new          begin a new conversation
/level        which level runs, and which there are; /level NAME changes it
/help         this
Ctrl+C ends an answer, Ctrl+D (Ctrl+Z on Windows) the conversation."""


def _converse(engine, system: list[dict], sampling: Sampling) -> dict | None:
    """Question and answer until the input ends. A failed question is told and forgotten."""
    document, messages = None, list(system)
    report(f"{engine.info['name']}. /help says what else can be written here.")
    while (question := _question()) is not None:
        if not question.strip():
            continue
        if question.startswith("/"):
            messages = _command(engine, question.split(), system, messages)
            continue
        try:
            document = ask(engine, [*messages, {"role": "user", "content": question}], sampling)
        except (UserError, MachineError) as error:
            report(str(error))
            continue
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": document["answer"]}]
    return document


def _command(engine, words: list[str], system: list[dict], messages: list[dict]) -> list[dict]:
    """What begins with a slash is no question; -> the conversation that goes on."""
    name, *rest = words
    if name == "/new":
        report("A new conversation.")
        return list(system)
    if name == "/level":
        levels = engine.info["levels"]
        try:
            if rest:
                engine.configure(replace(engine.options, level=rest[0]))
            report(f"Level {engine.snapshot()['level']}; there are {', '.join(levels)}.")
        except (UserError, MachineError) as error:
            report(str(error))
        return messages
    report(HELP if name == "/help" else f"{name} is not known here.\n{HELP}")
    return messages


def _question() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _say(event: Event, aloud: bool) -> None:
    if aloud and event.text:
        dim = sys.stdout.isatty() and event.kind == "thinking"
        print(f"\033[2m{event.text}\033[0m" if dim else event.text, end="", flush=True)
