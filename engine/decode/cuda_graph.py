"""The decode step as a CUDA graph: captured once for each kind of near memory, replayed for every token.

One graph for the sparse levels, one for `exact` and one for `floe`, each with and without look-ahead where that is
switched, in one memory pool. The draw is part of it where the sampler needs 256 logits and no more. A capture runs
every kernel first, because compiling and loading are not allowed inside it, and puts back whatever those runs changed.
Then the graph has to prove itself: two replays must give the logits that running the step gave at two positions, one
behind the other, because what was frozen at the first would be right there and wrong from the second on. A model that
cannot be captured runs the same kernels one by one, and `reason` says so.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from engine.decode.step import Step
from engine.experts.hook import Hook

POSITIONS = 2       # at which a graph has to prove itself
WARM_UPS = 2 * POSITIONS  # runs before the recorded one: libraries pick their algorithms in the first of them
AGREEMENT = 2e-2    # share of the largest logit: a library may choose another algorithm inside a graph
Run = Callable[[], None]


class Capture:
    """How a run becomes a graph: all graphs of one model share a memory pool and a stream."""

    def __init__(self) -> None:
        # Above the priority of what runs beside it (engine/experts/side_stream.py).
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(priority=-1)

    def beside(self, run: Run, strictly: bool) -> None:
        """Run as the recording will, without recording. strictly: RuntimeError where the run waits for the device: that
        would break a recording, and a broken one leaves torch's allocator waiting for its end."""
        mode = torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            if strictly:
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(self._stream):
                run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(self._stream)  # what was launched before it failed still writes

    def record(self, run: Run) -> Run:
        """-> the graph's replay."""
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Only what this thread calls can break the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
        finally:
            torch.cuda.set_stream(main)  # torch stays on its own when a broken capture cannot be ended
        return graph.replay


class Graphs:
    """A graph for each kind of near memory, made at its first launch. reason: why graphs do not work, else ""."""

    def __init__(self, step: Step, capture: Capture | None = None) -> None:
        self.step, self.reason = step, ""
        self._capture = capture or Capture()
        self._graphs: dict[tuple, Run] = {}
        self._hook: Hook | None = None  # with which there is a reason

    def launch(self, position: int) -> None:
        """The next token behind `position` tokens; returns before it is there."""
        key = self._key()
        if self.reason and self._hook is not key[1]:
            self.reason = ""  # what cannot be recorded with one hook may be with another
        if not self.reason and key not in self._graphs:
            self._make(key, position)
        self._graphs.get(key, self._run)()
        if not self.step.sampler.usual:
            self.step.choose()

    @property
    def _run(self) -> Run:
        """What is captured."""
        return self.step.run if self.step.sampler.usual else self.step.compute

    def _key(self) -> tuple:
        """What a graph was made for: it holds the addresses of one arena and of one hook's tensors, and one branch of
        look-ahead."""
        runtime = self.step.runtime
        return runtime.n_arenas, runtime.hook, runtime.kind, runtime.looks_ahead, self.step.sampler.usual

    def _make(self, key: tuple, position: int) -> None:
        """A graph under `key`, or a reason why not; either way the sequence is where it was."""
        # Older arenas are gone, and so are other hooks.
        self._graphs = {old: graph for old, graph in self._graphs.items() if old[:2] == key[:2]}
        before = self.step.save(position)
        try:
            graph, agrees = self._prove(before)
            if agrees:
                self._graphs[key] = graph
            else:
                self.reason = "A captured step gave other numbers than the same step run anew"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:  # whatever a model does in a capture
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.reason = f"This model's step cannot be captured ({reason[0]})"
        if self.reason:
            self._hook = key[1]
            self.reason += "; its kernels are launched one by one, which is slower."
            self.step.runtime.reset()  # a run that broke off has given places to what never came, and left its counts
        self.step.restore(before)

    def _prove(self, before: tuple) -> tuple[Run, bool]:
        """-> the graph, and whether its replays compute what the step itself does."""
        run = self._run
        for strictly in (False, True):
            self._back(before)
            expected, tokens = self._consecutive(partial(self._capture.beside, run, strictly))
        graph = self._capture.record(run)
        self._back(before)
        found, _ = self._consecutive(graph, tokens)
        return graph, all(bool((a - b).abs().max() <= AGREEMENT * b.abs().max())
                          for a, b in zip(found, expected, strict=True))

    def _back(self, before: tuple) -> None:
        """To what was saved, and, where numbers depend on what is near, to a near memory with nothing in it."""
        self.step.restore(before)
        if self.step.runtime.hook is not None and self.step.runtime.hook.sees_near:
            self.step.runtime.reset()

    def _consecutive(self, once: Run, tokens: Sequence[torch.Tensor] = ()) -> tuple[list, list]:
        """Logits and tokens of steps one behind the other. tokens: read in place of what the steps draw."""
        step, logits, drawn = self.step, [], []
        step.sampler.n_best.zero_()  # all logits are compared: -inf minus -inf is no number
        for i in range(POSITIONS):
            once()
            logits.append(step.logits.clone())
            drawn.append(step.token.clone())
            step.token.copy_(tokens[i] if tokens else drawn[i])
            step.done.zero_()  # else nothing would be at the next position
        return logits, drawn
