"""One turn of a conversation on the thread that owns the model: read the prompt, then write the answer, as events.

The prompt is read in chunks, all but its last token; that one is the first decode step. So every generated token is
exactly one decode step (bytes per token need no correction), and asking again repeats the same arithmetic.
`stopped` is asked before every chunk and every step. Does not know threads or queues.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace

import torch

from engine.chat.growing_calls import GrowingCalls
from engine.chat.reasoning_parser import ANSWER, ReasoningParser
from engine.chat.tokenizer import Prompt, Tokens
from engine.chat.tool_calls import format_of
from engine.core import Counters, Event, Likelihood, Picks, Request, Sampling, Stopped, ToolCall, UserError
from engine.decode.decoder import Around, Draw, HostDecoder, Part, decoder_for
from engine.decode.grammar import Grammar, Grammars
from engine.decode.prefix_cache import Prefix, common_length
from engine.decode.sampling import end_tokens, most_tokens
from engine.decode.step import Drawn
from engine.planning.plan import Plan

MARKED_MESSAGES = 4                   # ends of the last messages where uncuttable state is remembered
CONTEXT_TOKENS = 4                    # of an answer that goes on: some tokens decode differently at the start of a text
RESIDENCY_SECONDS = 0.2


@dataclass
class Live:
    """What the panel shows. Written by the owner thread, read by any: every field is replaced, never changed.

    totals, last, answer: since the model was opened, of the last token, of the last answer. prompt_*: what the last
    answer's prefill read. activity: L rows of E numbers.
    """

    phase: str = "idle"
    tokens_per_second: float = 0.0
    totals: Counters = field(default_factory=Counters)
    last: Counters = field(default_factory=Counters)
    answer: Counters = field(default_factory=Counters)
    answer_tokens: int = 0
    answer_seconds: float = 0.0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    residency: tuple[float, ...] = ()
    activity: tuple[list[float], ...] = ()
    near_bytes: int = 0
    near_most_bytes: int = 0
    near_least_bytes: int = 0
    near_used_bytes: int = 0
    mark_bytes: int = 0
    resting_bytes: int = 0
    context_used: int = 0
    n_tokens_total: int = 0


class Turns:
    """Answers of one loaded model, one after another. context: tokens; chunk: of one forward of prefill."""

    def __init__(self, model, tokenizer, runtime, context: int, chunk: int):
        self.model, self.runtime = model, runtime
        self.tokens = Tokens(tokenizer)
        self.decoder = decoder_for(model, runtime, context)
        self.context, self.chunk = context, chunk
        self.live = Live()
        self._recommended = getattr(model, "generation_config", None)
        self._ends = end_tokens(self._recommended, tokenizer)
        self._grammars = Grammars(tokenizer, self._ends)
        self.resting_bytes = self.resting_tokens = 0  # of an answer that is set aside, at most, where there is room
        self._owner = ""  # of what the prefix holds
        self._residency_at = 0.0
        self._other: tuple[Prefix, str] | None = None  # of an answer that another was set aside for, and its owner
        self._between = (Counters(), 0.0)  # what others used, and how long, while this answer was set aside

    @property
    def prefix(self) -> Prefix:
        return self.decoder.prefix

    def beside(self, context: int) -> Turns:
        """For one short job, a title: the same model with a small cache of its own, which goes when the job is over."""
        side = copy.copy(self)
        side.decoder, side.live = HostDecoder(self.model), Live()
        side.context = min(context, self.context)
        return side

    @property
    def gives_way(self) -> bool:
        """Whether an answer can be set aside. Not on a device, whose recorded step has one cache, and not where a
        second one does not fit."""
        return self.resting_bytes > 0

    @property
    def may_rest(self) -> bool:
        """Whether the answer under way is no longer than what was planned for one that is set aside: a context that
        nobody chose is planned shorter than a model reads."""
        return len(self.prefix.ids) <= self.resting_tokens

    def make_room(self, plan: Plan) -> None:
        """Between answers: for one that is set aside, as planned."""
        self.resting_tokens = plan.context
        self.resting_bytes = plan.resting_bytes if plan.gives_way and not self.decoder.on_device else 0
        self.show("idle")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Between two events of an answer. Inside, others are written, with another cache; behind it this one goes on
        with every bit as it was. The other cache stays until `settle`."""
        phase, before, begun = self.runtime.phase, self.runtime.counters(), time.perf_counter()
        used, seconds = self._between
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
            self.runtime.phase = phase
            self._between = (used + (self.runtime.counters() - before), seconds + time.perf_counter() - begun)

    def settle(self) -> None:
        """An answer that gave way is over: the cache of what was written meanwhile is the one that stays."""
        if self._other:
            self._exchange()
            self._other = None

    def _exchange(self) -> None:
        other = self._other or (HostDecoder(self.model).prefix, "")
        self._other = (self.decoder.prefix, self._owner)
        self.decoder.prefix, self._owner = other

    def set_context(self, context: int, chunk: int) -> None:
        """Between answers; what was read is read again where the device's cache has to be made anew."""
        if self.decoder.on_device and context != self.context:
            self.decoder = decoder_for(self.model, self.runtime, context)
        self.context, self.chunk = context, chunk

    def prepare(self) -> Iterator[Part]:
        """What the first answer would else wait for, part by part, each told before it begins."""
        return self.decoder.prepare(self._recommended)

    def answer(self, messages: list[dict] | str, sampling: Sampling, stopped: Callable[[], bool],
               wishes: Mapping | None = None, request: Request | None = None) -> Iterator[Event]:
        """The events of an answer, ending with "end". UserError before anything is read when it cannot fit; Stopped
        while it is not yet known what is to be read."""
        request = request or Request()
        prompt = self.tokens.prompt(messages, True, wishes, stopped)
        check_room(len(prompt.ids), self.context)
        if max(prompt.ids, default=0) >= self.model.config.vocab_size:  # a card that is asked for such a row is lost
            raise UserError("The tokenizer of this model makes words that its weights do not know; download the model "
                            "again.")
        grammar = self._grammars.of(request.schema) if request.schema else None
        try:
            if request.owner != self._owner:  # how soon an answer comes would tell what somebody else had asked
                self.prefix.reset()
                self._owner = request.owner
            yield from self._read(messages, prompt, stopped, wishes)
            if self.runtime.hook is not None:
                self.runtime.hook.prompt_read()
            yield from self._write(prompt, sampling, stopped, (wishes or {}).get("tools") or [], request, grammar)
        except (Stopped, GeneratorExit):  # between two forwards: what was read stays
            raise
        except BaseException:
            self.prefix.reset()   # some layers may have read what others have not
            self.runtime.reset()  # a slot may have been given to an expert that never arrived
            raise

    def show(self, phase: str) -> None:
        """Bring the panel's numbers up to date; near memory's state only a few times a second."""
        totals = self.runtime.counters()
        self.live.phase, self.live.totals, self.live.context_used = phase, totals, len(self.prefix.ids)
        now = time.monotonic()
        if phase == "idle" or now - self._residency_at > RESIDENCY_SECONDS:
            self.live.residency, self._residency_at = tuple(self.runtime.residency()), now
            self.live.activity = tuple(self.runtime.activity())
            self.live.near_bytes, self.live.near_used_bytes = self.runtime.near_bytes, self.runtime.near_used_bytes()
            self.live.near_most_bytes = self.runtime.everything_bytes()
            self.live.near_least_bytes = self.runtime.smallest_bytes()
            self.live.mark_bytes = self.prefix.mark_bytes
            self.live.resting_bytes = self._other[0].cache_bytes if self._other else 0

    def _read(self, messages: list[dict] | str, prompt: Prompt, stopped: Callable[[], bool],
              wishes: Mapping | None) -> Iterator[Event]:
        """Prefill what is new of the prompt, up to its last token."""
        ids, end = prompt.ids, len(prompt.ids) - 1
        self.runtime.phase = "prefill"
        done = self.prefix.reuse(ids)
        breaks = self._breaks(messages, ids, wishes, stopped) if self.prefix.wants_marks else []
        first, start, self._between = done, time.perf_counter(), (Counters(), 0.0)
        self._measure(0, 0.0)
        self.show("prefill")
        yield _reading(done, len(ids))
        while done < end and not stopped():
            upto = min([done + self.chunk, end, *(position for position in breaks if position > done)])
            self.prefix.feed(ids[done:upto])
            done = upto
            if done in breaks:
                self.prefix.mark()
            self._measure(done - first, time.perf_counter() - start - self._between[1])
            self.show("prefill")
            yield _reading(done, len(ids))

    def _measure(self, n_tokens: int, seconds: float) -> None:
        """What reading has cost; the answer has not begun."""
        self.live.prompt_tokens, self.live.prompt_seconds = n_tokens, seconds
        self.live.answer, self.live.answer_tokens, self.live.answer_seconds = Counters(), 0, 0.0

    def _breaks(self, messages: list[dict] | str, ids: list[int], wishes: Mapping | None,
                stopped: Callable[[], bool]) -> list[int]:
        """Positions where the last messages end, and the end of what prefill reads: a later prompt may differ there."""
        breaks = {len(ids) - 1}
        n = 0 if isinstance(messages, str) else len(messages)
        for n_messages in range(max(1, n - MARKED_MESSAGES + 1), n + 1):
            try:
                part = self.tokens.prompt(messages[:n_messages], False, wishes, stopped)
            except UserError:  # some templates refuse a conversation that ends here
                continue
            breaks.add(common_length(part.ids, ids[:-1]))
        return sorted(breaks - {0})

    def _write(self, prompt: Prompt, sampling: Sampling, stopped: Callable[[], bool], tools: list[dict],
               request: Request, grammar: Grammar | None) -> Iterator[Event]:
        """Decode until an end token, a stop text, a limit, the end of a grammar or `stopped`."""
        after = prompt.ids[-CONTEXT_TOKENS:] if prompt.continues or prompt.plain else ()
        form = format_of(self.tokens.template.source) if tools else None
        growing = GrowingCalls(form.begins if form else "", names_of(tools))
        sections = ReasoningParser(self.tokens, prompt.text, sampling.stop, after, form, prompt.plain)
        usual = most_tokens(self._recommended) or self.context
        limit = min(sampling.max_tokens or usual, self.context - len(self.prefix.ids))
        self.runtime.phase = "decode"
        before, picks = self.runtime.counters(), self.runtime.picks[1].clone()
        self.live.totals, n, start, event = before, 0, time.perf_counter(), Event("answer")
        self._between = (Counters(), 0.0)
        kind, reason = ANSWER, None
        around = _around(grammar, request)
        with closing(self.decoder.tokens(prompt.ids, sampling, self._recommended, self._ends, limit, around)) as tokens:
            while reason is None:
                if stopped():
                    reason = "stopped"
                elif n == limit:
                    reason = "length"
                else:
                    if grammar:  # thinking is free
                        grammar.active = sections.section == ANSWER
                    drawn, n = next(tokens), n + 1
                    ended = drawn.token in self._ends
                    pieces = [] if ended else sections.push(drawn.token)
                    event = self._count(n, start, before)
                    reason = "stop" if ended or sections.stopped or grammar and grammar.complete else None
                    likely = None if ended else self._likely(drawn, request.top_logprobs)
                    for section, text in pieces or [(kind, "")]:
                        kind = section
                        yield replace(event, kind=kind, text=text, likely=likely)
                        likely = None
                    for piece in growing.push(sections.calls):
                        yield replace(event, kind=ANSWER, piece=piece)
        rest, calls = sections.flush(), self._calls(sections, tools)
        for kind, text in rest if calls or not sections.calls else [*rest, (ANSWER, sections.calls)]:
            yield replace(event, kind=kind, text=text)
        yield replace(event, kind="end", text="", n_tokens=n, reason=reason, calls=calls,
                      picks=self._picked_since(picks))

    def _picked_since(self, before: torch.Tensor) -> Picks:
        """before: the runtime's totals then. To within a token where a device is a step ahead."""
        far = self.runtime.far
        *counts, tokens = (self.runtime.picks[1] - before).int().tolist()
        return Picks(far.layers, far.experts, tokens, tuple(counts))

    def _calls(self, sections: ReasoningParser, tools: list[dict]) -> tuple[ToolCall, ...]:
        """What was called of what was offered; none where any of it is no such call, which then is text."""
        form = format_of(self.tokens.template.source)
        calls = form.read(sections.calls, tools) if form and sections.calls else ()
        offered = names_of(tools)
        return calls if all(call.name in offered for call in calls) else ()

    def _likely(self, drawn: Drawn, top: int | None) -> Likelihood | None:
        if top is None:
            return None
        shares = drawn.logits.float().log_softmax(-1)
        best = shares.topk(min(top, len(shares)))
        told = [(self.tokens.decode([token]), value)
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        return Likelihood(self.tokens.decode([drawn.token]), float(shares[drawn.token]), tuple(told))

    def _count(self, n_tokens: int, start: float, before: Counters) -> Event:
        """The numbers after one more token, for the panel and for the events of this token."""
        previous = self.live.totals
        self.show("decode")
        seconds = max(time.perf_counter() - start - self._between[1], 1e-9)
        live, speed = self.live, n_tokens / seconds
        live.last, live.answer = live.totals - previous, live.totals - before - self._between[0]
        live.tokens_per_second = speed
        live.answer_tokens, live.answer_seconds = n_tokens, seconds
        live.n_tokens_total += 1
        lossy = self.runtime.hook.lossy if self.runtime.hook is not None else ""
        return Event("answer", "", n_tokens, speed, live.answer, lossy=lossy)


def names_of(tools: list[dict]) -> set[str]:
    return {tool["function"]["name"] for tool in tools}


def check_room(n_prompt: int, context: int) -> None:
    """UserError unless a prompt leaves room for at least one token of answer."""
    if n_prompt >= context:
        raise UserError(f"This conversation is {n_prompt:,} tokens long, {n_prompt - context + 1:,} too many for the "
                        f"context of {context:,} (one is kept for the answer); shorten it or start a new chat.")


def _reading(done: int, total: int) -> Event:
    return Event("prefill", f"Read {done:,} of {total:,} tokens", done)


def _around(grammar: Grammar | None, request: Request) -> Around | None:
    """None where a device may go its own way: nobody needs to see the logits."""
    if grammar:
        return grammar.around
    return None if request.top_logprobs is None else _as_it_is


def _as_it_is(draw: Draw) -> Draw:
    return draw
