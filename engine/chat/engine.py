"""The engine that an app talks to: one model, one thread that owns it, answers as streams of events.

Every piece of work on the model is a job in one queue, so answers and changes of options never overlap, and
torch.inference_mode (which is per thread) is entered once. `chat` returns at once; its events come through a queue of
their own. An error in a job becomes its last event, and the thread goes on with the next job.
What an answer is made of: engine/chat/turn.py. Closing is the caller's duty (`with Engine.open(...) as engine`).
"""
from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.chat.ahead import expected, learn
from engine.chat.habits import Habits
from engine.chat.model_info import about
from engine.chat.turn import Turns
from engine.core import Event, MachineError, Options, Picks, Request, Sampling, Stopped, UserError, never
from engine.decode.decoder import Part
from engine.experts.policy_hook import choose_policies
from engine.experts.working_set import bring_near
from engine.machine.errors import in_words, reason_for
from engine.model import load
from engine.planning import explain
from engine.planning.sizes import SIDE_CONTEXT, planned_chunk
from engine.policies.choice import parse, refusal

GRACE_SECONDS = 0.5  # that a stopped model has for its last words
_log = logging.getLogger(__name__)


class Answer(Iterator[Event]):
    """The events of one answer. Closing it, or dropping it half read, stops the model.

    error: the exception behind an `end` event with reason "error". Stopped, it ends within a second, though the model
    may still be in the middle of a step, which nothing can interrupt; whoever asks next waits for the end of that.
    """

    def __init__(self, stop: threading.Event | None = None):
        self._channel = _Channel(stop or threading.Event())
        self._ended = False

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        event = self._channel.get()
        self._ended = event.kind == "end"
        return event

    @property
    def error(self) -> BaseException | None:
        return self._channel.error

    def close(self) -> None:
        """Stop the model if it is still at it; no more events."""
        self._ended = True
        self._channel.stopped.set()

    __del__ = close


class _Channel:
    """From the owner thread to one reader; the wish to stop goes the other way. Holds no Answer: one may be dropped."""

    def __init__(self, stopped: threading.Event):
        self.stopped = stopped
        self.left = False  # by its reader, who did not wait for the end
        self.error: BaseException | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._written = Event("answer")
        self.put = self._events.put

    def get(self) -> Event:
        while True:
            stopped = self.stopped.is_set()
            try:
                # A wait without end cannot be interrupted on Windows.
                event = self._events.get(timeout=GRACE_SECONDS if stopped else 0.2)
            except queue.Empty:
                if stopped:
                    self.left = True
                    return replace(self._written, kind="end", text="", reason="stopped")
                continue
            if event.kind in ("thinking", "answer"):
                self._written = event
            return event


class Engine:
    """One open model. Every method may be called from any thread."""

    def __init__(self, loaded: load.Loaded, options: Options, folder: str | os.PathLike | None = None):
        self._folder = Path(folder) if folder else None
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._soon: queue.SimpleQueue[tuple] = queue.SimpleQueue()  # a person's, while a program's answer is written
        self._programs = self._changes = 0  # answers of programs, and changes, in the queue or under way
        self._unfinished: deque[_Channel] = deque()
        self._closed = False
        self._process = psutil.Process()
        self._adopt(loaded, options)
        self._thread = threading.Thread(target=self._own, name="model", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, folder: str | os.PathLike, options: Options | None = None,
             progress: load.Report | None = None) -> Engine:
        """Load a model folder and prepare its first answer; progress(what is done, share), which may raise to stop
        it. UserError when the folder cannot be used, MachineError when the card cannot."""
        options, report = options or Options(), progress or (lambda text, share: None)
        loaded = load.load(folder, options, report)
        try:
            engine = cls(loaded, options, folder)
        except BaseException:
            loaded.runtime.close()  # page-locked memory stays locked until it is given back
            raise
        try:
            engine._prepare(report)
        except BaseException:
            engine.close()
            raise
        report("Ready.", 1.0)
        return engine

    def chat(self, messages: list[dict] | str, sampling: Sampling | None = None, wishes: Mapping | None = None,
             stop: threading.Event | None = None, request: Request | None = None) -> Answer:
        """The answer to a whole conversation ([{"role", "content"}, ...]); waits its turn behind a running one. A
        program's, which its request tells by an owner, is set aside for a person's where `gives_way`.

        Where the last message is the model's own, the model goes on with it; a plain text it simply goes on with.
        wishes: variables of the chat template (enable_thinking, reasoning_effort and the like; tools: those whose
        calls are told at the end). stop: set it from any thread to end this answer.
        """
        return self._ask(messages, sampling, wishes, Answer(stop), request or Request())

    def side_chat(self, messages: list[dict], sampling: Sampling | None = None,
                  wishes: Mapping | None = None) -> Answer:
        """The same for a short job beside the conversation, a title: at most engine.planning.planner.SIDE_CONTEXT
        tokens, in a cache of its own, so that the conversation's next question finds everything it had read."""
        return self._ask(messages, sampling, wishes, Answer(), None)

    def _ask(self, messages: list[dict] | str, sampling: Sampling | None, wishes: Mapping | None, answer: Answer,
             request: Request | None) -> Answer:
        """request: None for a job beside the conversation."""
        channel = answer._channel
        messages = messages if isinstance(messages, str) else list(messages)
        job = (self._answer, messages, sampling or Sampling(), dict(wishes or {}), channel, request)
        with self._lock:
            self._check_open()
            self._unfinished.append(channel)
            from_program = request is not None and bool(request.owner)
            self._programs += from_program
            overtakes = self._programs and self.gives_way and request is not None and not from_program
            (self._soon if overtakes and not self._changes else self._jobs).put(job)
        return answer

    def warm(self, picks: Picks) -> None:
        """Bring near what a conversation's answers picked most, while nobody waits: who asks next ends it within an
        expert. Changes no answer; nothing where these are another model's picks."""
        with self._lock:
            if not self._closed:
                self._jobs.put((self._warm, picks))

    def expect(self, draft: str, habits: Habits) -> None:
        """The same for what a person is writing, as far as habits know it; of several the newest. Nothing of it stays,
        and nothing is done where somebody waits already."""
        with self._lock:
            if not self._closed and not self._unfinished:
                self._jobs.put((self._expect, draft, habits))

    def learn(self, asked: str, picks: Picks, habits: Habits) -> None:
        """What an answer picked becomes a habit, where not everything is near anyway."""
        with self._lock:
            if not self._closed:
                self._jobs.put((lambda: learn(self._turns, asked, picks, habits),))

    def stop(self) -> None:
        """End the running answer; later ones stay in the queue."""
        with self._lock:
            running = next((channel for channel in self._unfinished if not channel.left), None)
            if running:
                running.stopped.set()

    def configure(self, options: Options) -> None:
        """Change level, near memory, context, chunk or policies behind the answers in the queue; waits for it."""
        self._do(self._change, options)

    def close(self) -> None:
        """Stop, end the thread, let go of the model. Answers in the queue end as stopped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for channel in self._unfinished:
                channel.stopped.set()
            self._jobs.put(None)
        self._thread.join()
        turns, self._turns = self._turns, None  # lets go of the model
        turns.tokens.close()
        turns.runtime.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def count_tokens(self, messages: list[dict] | str, wishes: Mapping | None = None,
                     stopped: Callable[[], bool] = never) -> int:
        """Tokens of the prompt that `chat` would read. Stopped soon after `stopped` says so."""
        return len(self._open_turns().tokens.prompt(messages, True, wishes, stopped).ids)

    @property
    def gives_way(self) -> bool:
        """Whether a program's answer is set aside, between two tokens, while a person's is written."""
        return self._open_turns().gives_way

    @property
    def folds_system(self) -> bool:
        """Whether the template has refused a system message, which then goes with the first question."""
        return self._open_turns().tokens.folds_system

    def weigh(self, message: dict, stopped: Callable[[], bool] = never) -> int:
        """Tokens of a message's own text, without what the chat template writes around it; kept for the next time."""
        return self._open_turns().tokens.weigh(message, stopped)

    @property
    def info(self) -> dict:
        """Name, levels with their measured loss, recommended sampling, context, layers, experts, is_demo, wishes."""
        return self._info

    def snapshot(self) -> dict:
        """What the engine is doing now; cheap, waits for nothing. Counters are totals since the model was opened;
        note is a sentence where a card does less than it might (no graph, experts on the processor), else "".
        """
        turns = self._open_turns()
        live, runtime, far = turns.live, turns.runtime, turns.runtime.far
        return {
            "model": self._info["name"], "level": runtime.level, "device": turns.model.device.type,
            "note": runtime.reason or turns.decoder.reason,
            "phase": live.phase, "tokens_per_second": live.tokens_per_second,
            "counters": asdict(live.totals) | {"hit_rate": live.totals.hit_rate}, "last": asdict(live.last),
            "answer": asdict(live.answer) | {"tokens": live.answer_tokens, "seconds": live.answer_seconds},
            "prompt": {"tokens": live.prompt_tokens, "seconds": live.prompt_seconds},
            "residency": list(live.residency), "activity": list(live.activity), "near_bytes": live.near_bytes,
            "near_most_bytes": live.near_most_bytes, "near_least_bytes": live.near_least_bytes,
            "near_used_bytes": live.near_used_bytes, "far_total_bytes": far.total_bytes,
            "mark_bytes": live.mark_bytes, "resting_bytes": live.resting_bytes,
            "resting_most_bytes": turns.resting_bytes, "rss_bytes": self._process.memory_info().rss,
            "context": turns.context, "context_used": live.context_used, "n_tokens_total": live.n_tokens_total,
            "trunk_bits": self._planner.trunk_bits, "policies": self.options.policies,
        }

    def _adopt(self, loaded: load.Loaded, options: Options) -> None:
        self._longest, self._planner = loaded.spec.context, loaded.planner
        context = self._context_for(options)
        self.options = replace(options, level=loaded.runtime.level)  # the folder may not offer the wished one
        self._turns = Turns(loaded.model, loaded.tokenizer, loaded.runtime, context, self._chunk_for(options, context))
        self._info = about(loaded, self._turns.tokens.template, self._folder, context)
        self._turns.make_room(self._planner.plan(self.options.level, self.options))

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("This model has been closed; open it again.")

    def _open_turns(self) -> Turns:
        turns = self._turns
        self._check_open()
        return turns

    def _do(self, work: Callable, *given) -> Any:
        """What the owner thread's work comes to, once the jobs in the queue are done; waits for it."""
        future: Future = Future()
        with self._lock:
            self._check_open()
            self._changes += 1
            self._jobs.put((self._into, future, work, *given))
        return future.result()

    def _prepare(self, report: load.Report) -> None:
        """Part by part, so that whoever opens can stop in between."""
        parts = self._turns.prepare()
        while part := self._do(self._next_part, parts):
            report(part[0], load.LOADED + (1 - load.LOADED) * part[1])

    # Below: the owner thread.

    def _own(self) -> None:
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                try:
                    job[0](*job[1:])
                except BaseException:  # the next job must find a thread
                    _log.exception("A job of the model failed")
                del job  # a finished job must not keep its messages, nor an old model, alive

    def _answer(self, messages: list[dict] | str, sampling: Sampling, wishes: dict, channel: _Channel,
                request: Request | None) -> None:
        last = Event("end", reason="stopped")
        try:
            if not channel.stopped.is_set():
                turns = self._turns if request else self._turns.beside(SIDE_CONTEXT)
                for event in turns.answer(messages, sampling, channel.stopped.is_set, wishes, request):
                    if event.kind == "end":
                        last = event
                    else:
                        channel.put(event)
                        self._give_way(request)
            self._turns.show("idle")
        except Stopped:
            self._turns.live.phase = "idle"
        except BaseException as error:
            last = Event("end", "The model failed; try again.", reason="error")
            last = self._failed(error, channel)
        finally:  # whatever it was, the reader must not wait for ever
            with self._lock:
                self._unfinished.remove(channel)
                self._programs -= request is not None and bool(request.owner)
            channel.put(last)
            self._after(request)

    def _give_way(self, request: Request | None) -> None:
        """What a person asked for meanwhile is answered now, while a program's answer is set aside."""
        if request is None or not request.owner or not self._turns.may_rest:
            return
        with suppress(queue.Empty):
            while job := self._soon.get_nowait():
                with self._turns.aside():
                    job[0](*job[1:])

    def _after(self, request: Request | None) -> None:
        """Behind a program's answer: a person's that came too late to be answered within it."""
        if request is None or not request.owner:
            return
        self._turns.settle()
        with suppress(queue.Empty):
            while job := self._soon.get_nowait():
                job[0](*job[1:])

    def _warm(self, picks: Picks, is_draft: bool = False) -> None:  # a draft's ends for another one, too
        runtime = self._turns.runtime
        if (picks.layers, picks.experts) == (runtime.far.layers, runtime.far.experts):
            for _ in bring_near(runtime, picks.busiest()):
                if self._unfinished or self._changes or self._closed or is_draft and not self._jobs.empty():
                    break
            self._turns.show("idle")

    def _expect(self, draft: str, habits: Habits) -> None:
        if picks := expected(self._turns, draft, habits, lambda: not self._jobs.empty()):
            self._warm(picks, is_draft=True)

    def _failed(self, error: BaseException, channel: _Channel) -> Event:
        self._turns.live.phase = "idle"
        if not isinstance(error, UserError):
            _log.error("An answer failed", exc_info=error)
        channel.error = error.with_traceback(None)  # its frames would keep tensors alive
        return Event("end", reason_for(error, self._planned()), reason="error")

    def _into(self, future: Future, work: Callable, *given) -> None:
        tell, found = future.set_result, None
        try:
            found = work(*given)
        except BaseException as error:
            tell, found = future.set_exception, error
        with self._lock:
            self._changes -= 1
        tell(found)

    def _planned(self) -> str:
        if self._planner.machine.device != "cuda":
            return ""
        return explain.memory(self._planner.plan(self.options.level, self.options))

    def _next_part(self, parts: Iterator[Part]) -> Part | None:
        try:
            return next(parts, None)
        except Exception as error:
            if words := in_words(error, self._planned()):
                raise MachineError(words) from error
            raise

    def _change(self, options: Options) -> None:
        old = self.options
        if why := refusal(parse(options.policies), options.level or old.level, self._planner.machine.device):
            raise UserError(why)
        if (options.device, options.predict) != (old.device, old.predict):
            raise UserError("Device and prediction are chosen when a model is opened; open it again to change them.")
        options = replace(options, level=options.level or old.level)
        turns, context = self._turns, self._context_for(options)
        chunk, before = self._chunk_for(options, context), (turns.context, turns.chunk)
        trades = self._planner.machine.device == "cuda" and context != turns.context  # with near memory, for the card's
        if trades and context < turns.context:
            turns.set_context(context, chunk)  # first what gives memory back
        try:
            if trades or (options.level, options.near_bytes) != (old.level, old.near_bytes):
                self._set_level(options)
        except BaseException:
            turns.set_context(*before)
            raise
        turns.set_context(context, chunk)
        if options.policies != old.policies:
            self._set_policies(options.policies)
        self.options = options
        turns.make_room(self._planner.plan(options.level, options))

    def _context_for(self, options: Options) -> int:
        """On a card its memory is taken at once, so without a wish it is the plan's."""
        if options.context is None and self._planner.machine.device == "cuda":
            return min(self._longest, self._planner.plan(options.level, options).context)
        return _context(options, self._longest)

    def _chunk_for(self, options: Options, context: int) -> int:
        return options.chunk or planned_chunk(self._planner.spec, self._planner.machine.device, context)

    def _set_policies(self, policies: str) -> None:
        turns = self._turns
        lossy = turns.runtime.hook is not None and turns.runtime.hook.lossy
        choose_policies(turns.runtime, turns.model, policies)
        if lossy or not parse(policies).is_exact:
            turns.prefix.reset()  # what was read approximately is not what would have been read

    def _set_level(self, options: Options) -> None:
        """Change level or near memory; when that fails, everything is as it was."""
        runtime = self._turns.runtime
        level, near_bytes = runtime.level, runtime.near_bytes
        try:
            runtime.set_level(options.level, self._planner.near_bytes(options.level, options))
        except BaseException:
            runtime.set_level(level, near_bytes)
            raise
        if options.level != level:
            self._turns.prefix.reset()  # what another level wrote is not what this level would have


def _context(options: Options, longest: int) -> int:
    if options.context and options.context > longest:
        raise UserError(f"This model reads at most {longest:,} tokens; choose a context up to that, "
                        f"not {options.context:,}.")
    return options.context or longest
