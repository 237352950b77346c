"""What the model has read so far, for a model whose steps run on the device: engine/decode/prefix_cache.py's duties
over StepCache.

The same invariants: the cache holds exactly `ids`, every mark lies on them; after a failed forward call `reset`. Plain
attention goes back to any position, rings and recurrent states to marks, copies in host memory.
"""
from __future__ import annotations

import inspect
import time
from collections.abc import Iterator

import torch

from engine.core import Sampling
from engine.decode.cuda_graph import Graphs
from engine.decode.device_sampling import DeviceSampler
from engine.decode.prefix_cache import MAX_MARK_BYTES, MAX_MARKS, Prefix, common_length
from engine.decode.step import Decoder, Drawn, Step
from engine.experts.device import DeviceRuntime
from engine.model.static_cache import FullLayer, NotCapturable, Snapshot, StepCache, forward
from engine.policies.prefetch import WINDOW, has_headroom


class StepPrefix:
    """The live token ids of one model and its cache of fixed shape."""

    def __init__(self, model: torch.nn.Module, cache: StepCache) -> None:
        self.model, self.cache = model, cache
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._marks: list[Snapshot] = []
        self.ids: list[int] = []

    @property
    def wants_marks(self) -> bool:
        """Whether some layer can only go back to a mark."""
        return not all(isinstance(layer, FullLayer) for layer in self.cache.layers)

    @property
    def marks(self) -> list[int]:
        return [mark.position for mark in self._marks]

    @property
    def mark_bytes(self) -> int:
        return sum(mark.n_bytes for mark in self._marks)

    def reset(self) -> None:
        self.cache.reset()
        self._marks, self.ids = [], []

    def reuse(self, ids: list[int]) -> int:
        """Go back to the longest common part with `ids` that can be had; the number of tokens kept."""
        n_common = common_length(self.ids, ids[:-1])
        if n_common < len(self.ids):
            self._go_back(n_common)
        return len(self.ids)

    def _go_back(self, position: int) -> None:
        if not self.cache.cut(position, len(self.ids)):
            mark = max((m for m in self._marks if m.position <= position), key=lambda m: m.position, default=None)
            if mark is None:
                self.reset()
                return
            self.cache.restore(mark)
            position = mark.position
        self.ids = self.ids[:position]
        self._marks = [mark for mark in self._marks if mark.position <= position]

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Read more tokens; logits [V] after the last one."""
        logits = forward(self.model, torch.tensor([ids], device=self.cache.clock.device), self.cache, **self._last_only)
        self.ids += ids
        return logits[0, -1]

    def mark(self) -> None:
        """Remember the state here, if this model needs it and it is not remembered yet."""
        position = len(self.ids)
        if not self.wants_marks or position in self.marks:
            return
        self._marks.append(self.cache.snapshot(position))
        self._marks.sort(key=lambda mark: mark.position)
        while len(self._marks) > 1 and (len(self._marks) > MAX_MARKS or self.mark_bytes > MAX_MARK_BYTES):
            del self._marks[1 if len(self._marks) > 2 else 0]  # the first one often ends the system message


class Stepping:
    """Decodes on the device, a step ahead of its reader. sentence: why no graph is used, "" where one is or will be."""

    def __init__(self, model: torch.nn.Module, runtime: DeviceRuntime, cache: StepCache) -> None:
        device, self._runtime = cache.clock.device, runtime
        self.prefix = StepPrefix(model, cache)
        self.sampler = DeviceSampler(model.config.get_text_config().vocab_size, cache.clock.context, device)
        step = Step(model, runtime, cache, self.sampler)
        recordable = runtime.far.readable_layers == runtime.far.layers
        self._graphs = Graphs(step) if torch.device(device).type == "cuda" and recordable else None
        self._decoder = Decoder(step, self._graphs.launch if self._graphs else None)

    @property
    def sentence(self) -> str:
        return self._graphs.sentence if self._graphs else ""

    def tokens(self, ids: list[int], sampling: Sampling, recommended, ends: frozenset[int], limit: int,
               ) -> Iterator[int]:
        """Token after token behind the prompt `ids`, all but the last of which have been read; at most `limit`."""
        self.sampler.start(sampling, recommended, ids)
        position, decoder = len(self.prefix.ids), self._decoder
        limit = min(limit, self.prefix.cache.clock.context - position)
        steps = decoder.tokens(ids[-1], position, ends, limit)
        try:
            for drawn in self._watched(steps):
                self.prefix.ids = self.prefix.ids[:position] + decoder.fed
                yield drawn.token
        finally:
            steps.close()
            self.prefix.ids = self.prefix.ids[:position] + decoder.fed

    def _watched(self, steps: Iterator[Drawn]) -> Iterator[Drawn]:
        """The same, and every few tokens a look at how busy the link was: without headroom nothing is fetched ahead."""
        runtime, crossed, since = self._runtime, None, 0.0
        for n, drawn in enumerate(steps):
            if n % WINDOW == 0:
                now, total = time.perf_counter(), drawn.counts[2] + drawn.counts[3]
                if crossed is not None:
                    runtime.headroom = has_headroom(runtime.headroom, total - crossed, now - since,
                                                    runtime.link_bytes_per_second)
                crossed, since = total, now
            yield drawn


def begin(model: torch.nn.Module, runtime, context: int) -> tuple[Prefix | StepPrefix, Stepping | None]:
    """What reads and what decodes this model: the device alone where it can, else transformers' own cache.

    In the second case runtime.note says why, if a card was asked for.
    """
    if not isinstance(runtime, DeviceRuntime):
        return Prefix(model), None
    try:
        cache = StepCache(model.config, context, next(model.parameters()).device)
    except NotCapturable as error:
        runtime.note = str(error)
        return Prefix(model), None
    stepping = Stepping(model, runtime, cache)
    return stepping.prefix, stepping
