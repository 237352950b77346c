"""Conversation in, prompt text out, by the model's own chat template, with a bound on time, memory and size.

The template runs in a small process that is started once and kept (engine/chat/template_worker.py). When it takes
longer than it may, or more memory, it is killed and the user gets one sentence; the next rendering starts a fresh one.
Invariant: one request is under way at a time. Does not know tokens.
"""
from __future__ import annotations

import json
import queue
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from engine.core import MachineError, Stopped, UserError, never

MAX_TEMPLATE_CHARACTERS = 1 << 20     # the longest templates in use have about 30,000
MAX_PROMPT_CHARACTERS = 1 << 24       # a million tokens are about 4 million
MAX_PROCESS_BYTES = 512 << 20
MOST_SAID = 300                       # characters of what a template says itself
SECONDS = 10.0                        # of a processor; a long conversation takes milliseconds
LOOK_SECONDS = 0.02                   # how often we look whether it takes too much or was stopped
PATIENCE = 12                         # times as long by the clock: other programs may have the processor
_PROGRAM = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """One template, ready to render. UserError when it is too large, does not compile, loops or explodes.

    variables: what the template sees besides the messages (bos_token and the like).
    """

    def __init__(self, source: str, variables: dict[str, str], seconds: float = SECONDS):
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise UserError(f"The model's chat template has {len(source):,} characters, more than the "
                            f"{MAX_TEMPLATE_CHARACTERS:,} allowed; replace chat_template.jinja in the model's folder.")
        self.source = source
        self._variables = variables
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._asks: frozenset[str] = frozenset()
        self._replies: queue.SimpleQueue = queue.SimpleQueue()

    def render(self, messages: list[dict], add_generation_prompt: bool = True, wishes: Mapping | None = None,
               stopped: Callable[[], bool] = never) -> str:
        """The text of a conversation; with the generation prompt it ends where the answer begins.

        wishes: variables of this template that the user may set (enable_thinking, reasoning_effort, tools, the like).
        stopped: asked all the while; Stopped soon after it says so.
        """
        variables = {**self._variables, **(wishes or {}),
                     "messages": [_with_reasoning(message) for message in messages],
                     "tools": (wishes or {}).get("tools") or None, "documents": None,
                     "add_generation_prompt": add_generation_prompt}
        with self._turn(stopped):
            self._run(stopped)
            reply = self._ask({"variables": variables, "limit": MAX_PROMPT_CHARACTERS}, stopped)
        return reply["text"]

    def asks(self) -> frozenset[str]:
        """The variables that this template looks at: which wishes it can fulfil."""
        with self._turn(never):
            self._run(never)
        return self._asks

    def close(self) -> None:
        if process := self._process:
            process.kill()  # whoever waits for it, with the lock, need not wait any longer
        with self._lock:
            self._kill()

    @contextmanager
    def _turn(self, stopped: Callable[[], bool]) -> Iterator[None]:
        while not self._lock.acquire(timeout=LOOK_SECONDS):
            if stopped():
                raise Stopped
        try:
            yield
        finally:
            self._lock.release()

    def _run(self, stopped: Callable[[], bool]) -> None:
        if self._process is None or self._process.poll() is not None:
            self._start(stopped)

    def _start(self, stopped: Callable[[], bool]) -> None:
        self._kill()
        hidden = subprocess.CREATE_NO_WINDOW if sys.platform == "win32" else 0
        # A session (or no console) of its own: Ctrl+C is for us. -P: our folder must not shadow the standard library.
        self._process = subprocess.Popen([sys.executable, "-P", str(_PROGRAM)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
                                         creationflags=hidden, start_new_session=True)
        self._replies = queue.SimpleQueue()
        threading.Thread(target=_read_lines, args=(self._process.stdout, self._replies), daemon=True,
                         name="chat template").start()
        try:
            self._asks = frozenset(self._ask({"template": self.source}, stopped)["asks"])
        except UserError:  # it has nothing to render
            self._kill()
            raise

    def _ask(self, request: dict, stopped: Callable[[], bool]) -> dict:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._wait(stopped)
        except OSError:
            line = None
        if line is None:
            self._kill()
            raise MachineError("The process that renders the chat template ended by itself; try again, "
                               "and check that there is enough memory.")
        reply = json.loads(line)
        if "refused" in reply:
            raise UserError(f"The model's chat template refuses this conversation ({_brief(reply['refused'])}); edit "
                            "the message that it is about, or start a new chat.")
        if "broken" in reply:
            raise _broken(reply["broken"])
        return reply

    def _wait(self, stopped: Callable[[], bool]) -> str | None:
        """The reply, or None when the process ended. Kills it and raises when it takes too much or is stopped."""
        watched = psutil.Process(self._process.pid)
        begun, end = _processor_seconds(watched), time.monotonic() + PATIENCE * self._seconds
        while True:
            try:
                return self._replies.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                pass
            if stopped():
                self._kill()
                raise Stopped
            if _processor_seconds(watched) - begun > self._seconds or time.monotonic() > end:
                self._kill()
                raise _broken(f"it did not finish within {self._seconds:g} seconds")
            if _resident(watched) > MAX_PROCESS_BYTES:
                self._kill()
                raise _broken("it needs too much memory")

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()


def _read_lines(stream, replies: queue.SimpleQueue) -> None:
    try:
        with stream:
            for line in stream:
                replies.put(line)
    finally:
        replies.put(None)


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _processor_seconds(process: psutil.Process) -> float:
    try:
        return process.cpu_times().user
    except psutil.Error:
        return 0.0


def _broken(why: str) -> UserError:
    return UserError(f"The model's chat template cannot be used: {_brief(why)}; "
                     "replace chat_template.jinja in the model's folder.")


def _brief(why: str) -> str:
    """On one line: a template may say anything."""
    return textwrap.shorten(why, MOST_SAID, placeholder="…").rstrip(".")


def _with_reasoning(message: dict) -> dict:
    """Without absent fields, and with the thinking of an earlier answer under both names that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = message.get("reasoning_content", message.get("thinking"))
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
