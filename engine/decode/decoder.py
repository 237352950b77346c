"""The decode loop of chat, bench and eval: token after token behind a prompt, as a generator of `Drawn`.

On the host a step is one forward of the model and a draw. A device runs one step ahead of its reader: the next step is
launched before the last one's token is looked at; when the answer had ended, `done` has made that step a no-op.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch

from engine.core import Sampling
from engine.decode.cuda_graph import Graphs
from engine.decode.device_sampling import DeviceSampler
from engine.decode.prefix_cache import DynamicPrefix, Prefix, StepPrefix
from engine.decode.sampling import Sampler
from engine.decode.step import Drawn, Packets, Step
from engine.experts.device import DeviceRuntime
from engine.model.static_cache import NotCapturable, StepCache
from engine.policies.prefetch import WINDOW, has_headroom

Draw = Callable[[torch.Tensor, list[int]], int]  # (logits [V], all tokens read) -> the next token
Around = Callable[[Draw], Draw]                  # sees every step's logits, on whichever device
Part = tuple[str, float]  # of preparing: what is done now, the share that lies behind
PIECE = 32                # tokens of the prompt that is read to compile: more than the kernels of a step take
COMPILING, RECORDING = "Compiling for the card (longer the first time)", "Recording a step for the card"


def steps(prefix: Prefix, ids: list[int], draw: Draw, limit: int, ends: frozenset[int] = frozenset(),
          ) -> Iterator[Drawn]:
    """At most `limit` tokens: the first forward reads `ids`, each further one the token that was drawn."""
    for left in reversed(range(limit)):
        logits = prefix.feed(ids)
        token = draw(logits, prefix.ids)
        yield Drawn(token, not left or token in ends, logits=logits)
        if token in ends:
            return
        ids = [token]


def given(tokens: Iterable[int]) -> Draw:
    """These tokens, whatever the logits: how a text is read one token a step."""
    rest = iter(tokens)
    return lambda logits, ids: next(rest)


class HostDecoder:
    """Decodes with transformers' own cache; every step waits for its token."""

    on_device, reason = False, ""

    def __init__(self, model: torch.nn.Module) -> None:
        self.prefix, self._model = DynamicPrefix(model), model

    def tokens(self, ids: list[int], sampling: Sampling, recommended, ends: frozenset[int], limit: int,
               around: Around | None = None) -> Iterator[Drawn]:
        """At most `limit` tokens behind the prompt `ids`, whose beginning `prefix` holds. around: the sampler's."""
        sampler = Sampler(sampling, recommended, self._model.device)
        draw, n_best = (around(sampler), 0) if around else (sampler, sampler.n_best)
        yield from self._drawn(ids[len(self.prefix.ids):], draw, n_best, limit, ends)

    def retold(self, ids: list[int], sampling: Sampling, recommended) -> Iterator[Drawn]:
        """A step for each of these tokens, behind those that `prefix` holds: each is drawn as an answer's are, and then
        given. What an answer costs, whatever the model would say."""
        sampler, rest = Sampler(sampling, recommended, self._model.device), given([*ids[1:], 0])

        def draw(logits: torch.Tensor, before: list[int]) -> int:
            sampler(logits, before)
            return rest(logits, before)
        yield from self._drawn(ids[:1], draw, sampler.n_best, len(ids), frozenset())

    def _drawn(self, ids: list[int], draw: Draw, n_best: int, limit: int, ends: frozenset[int]) -> Iterator[Drawn]:
        """n_best: how many of the largest logits `draw` looks at; 0: all."""
        fused = self.prefix.fused
        if fused:
            fused.n_best = n_best
        try:
            yield from steps(self.prefix, ids, draw, limit, ends)
        finally:
            if fused:
                fused.n_best = 0

    def prepare(self, recommended) -> Iterator[Part]:
        """As DeviceDecoder's; here nothing is recorded, and the processor was prepared before the weights came."""
        return iter(())


class DeviceDecoder:
    """Decodes on the device alone. graphs: None launches a step's kernels one by one. adapts: whether fetching ahead
    ends where the link is busy."""

    on_device = True

    def __init__(self, model: torch.nn.Module, runtime: DeviceRuntime, cache: StepCache, adapts: bool = True) -> None:
        device, self._runtime, self._adapts = cache.clock.device, runtime, adapts
        self.prefix = StepPrefix(model, cache)
        sampler = DeviceSampler(model.config.get_text_config().vocab_size, cache.clock.context, device)
        self.step = Step(model, runtime, cache, sampler)
        self.graphs = Graphs(self.step) if torch.device(device).type == "cuda" else None
        self._packets = Packets(self.step.packet)

    @property
    def reason(self) -> str:
        """Why no graph is used, "" where one is or will be."""
        if self._runtime.hook is not None and self._runtime.hook.note:
            return self._runtime.hook.note
        return self.graphs.reason if self.graphs else ""

    def tokens(self, ids: list[int], sampling: Sampling, recommended, ends: frozenset[int], limit: int,
               around: Around | None = None) -> Iterator[Drawn]:
        """As HostDecoder's; the context is a limit as well. With `around` the host takes part in every step."""
        step, prefix = self.step, self.prefix
        if unread := ids[len(prefix.ids):-1]:
            self._runtime.phase = "prefill"
            prefix.feed(unread)
        if around:
            self._runtime.phase = "decode"
            draw = around(Sampler(sampling, recommended, step.sampler.device))
            yield from steps(prefix, ids[-1:], draw, min(limit, prefix.cache.clock.context - len(prefix.ids)), ends)
            return
        step.sampler.start(sampling, recommended, ids)
        position, turn = len(prefix.ids), 0
        step.start(ids[-1], ends, min(limit, prefix.cache.clock.context - position))
        prefix.ids.append(ids[-1])
        try:
            self._launch(position, turn)
            while True:
                self._launch(position + turn + 1, turn + 1)
                drawn = self._packets.read(turn)
                self._runtime.counted = list(drawn.counts)
                if self._runtime.hook is not None:
                    self._runtime.hook.counted(drawn.counts)
                if not drawn.ended:
                    prefix.ids.append(drawn.token)  # the step ahead has read it
                if self._adapts and turn % WINDOW == 0:
                    self._adapt(drawn, is_first=not turn)
                yield drawn
                if drawn.ended:
                    return
                turn += 1
        finally:
            # Behind the step ahead. What is read, computed and counted next is not of this answer.
            step.done.zero_()
            self._runtime.counted = None

    def prepare(self, recommended) -> Iterator[Part]:
        """What the first answer would wait for, part by part, each told before it begins: kernels are compiled by a
        short prompt and a step, graphs are made. Afterwards nothing is read, near or counted; broken off, the model is
        to be closed."""
        step, context = self.step, self.prefix.cache.clock.context
        hook = self._runtime.hook
        before = [tensor.clone() for tensor in hook.state()] if hook else []
        ids = list(range(min(PIECE, context, len(step.logits))))
        yield COMPILING, 0.0
        self._runtime.phase = "prefill"
        self.prefix.feed(ids)
        yield COMPILING, 0.3
        step.sampler.start(Sampling(), recommended, ids)
        step.start(ids[-1], frozenset(), context)
        step.run()
        step.packet.tolist()  # waits: what fails on the card fails here
        if self.graphs and not self._runtime.asks_the_host:
            yield from self._record(len(ids) + 1)
        self.prefix.reset()
        self._runtime.forget()
        for tensor, kept in zip(hook.state() if hook else [], before, strict=True):
            tensor.copy_(kept)

    def _record(self, position: int) -> Iterator[Part]:
        """Graphs for the level that is set, also the one that an answer changes to where the link gets busy."""
        runtime = self._runtime
        kinds = (False, True) if self._adapts and runtime.looks_ahead else (True,)
        for turn, runtime.headroom in enumerate(kinds):
            yield RECORDING, 0.6 + 0.2 * turn
            self.graphs.launch(position + turn)
            self.step.packet.tolist()

    def _launch(self, position: int, turn: int) -> None:
        if self.graphs and not self._runtime.asks_the_host:
            self.graphs.launch(position)
        else:
            self.step.run()
        self._packets.send(turn)

    def _adapt(self, drawn: Drawn, is_first: bool) -> None:
        """Without headroom on the link since the last look, nothing is fetched ahead."""
        runtime, now, crossed = self._runtime, time.perf_counter(), drawn.counts[2] + drawn.counts[3]
        if not is_first:
            before, since = self._last_look
            runtime.headroom = has_headroom(runtime.headroom, crossed - before, now - since,
                                            runtime.link_bytes_per_second)
        self._last_look = crossed, now


Decoder = HostDecoder | DeviceDecoder


def decoder_for(model: torch.nn.Module, runtime, context: int) -> Decoder:
    """The device alone where it can, else transformers' own cache; runtime.reason then says why, on a graphics card."""
    if not isinstance(runtime, DeviceRuntime):
        return HostDecoder(model)
    try:
        return DeviceDecoder(model, runtime, StepCache(model.config, context, next(model.parameters()).device))
    except NotCapturable as error:
        runtime.reason = str(error)
        return HostDecoder(model)
